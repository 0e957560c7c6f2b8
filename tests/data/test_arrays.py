"""Arrays as pictures: what their numbers mean, and what is no picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from moe_sampler.data.arrays import array_picture, fit_pixels


@pytest.mark.parametrize("shape", [(4,), (4, 4), (4, 4, 1), (4, 4, 4), (3, 4, 4), (1, 4, 4, 3)])
def test_a_picture_is_height_width_and_three_channels(shape):
    with pytest.raises(ValueError, match="mine has shape"):
        array_picture(np.zeros(shape, np.uint8), "mine")


@pytest.mark.parametrize(("shape", "size"), [((0, 4, 3), "4 × 0"), ((4, 0, 3), "0 × 4")])
def test_an_empty_one_is_none(shape, size):
    with pytest.raises(ValueError, match=f"mine is empty: {size} pixels"):
        array_picture(np.zeros(shape, np.float32), "mine")


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int64, np.uint32, np.uint64, bool, complex])
def test_integers_of_other_ranges_say_nothing_of_white(dtype):
    with pytest.raises(ValueError, match=f"image is of {np.dtype(dtype)}: give uint8 from 0 to 255, uint16"):
        array_picture(np.zeros((2, 2, 3), dtype))


def test_black_and_white_in_every_type():
    for dtype, white in ((np.uint8, 255), (np.uint16, 65535), (np.float16, 1), (np.float32, 1), (float, 1)):
        array = np.zeros((2, 5, 3), dtype)
        array[0], array[1, 0] = white, white / 2
        pixels = fit_pixels(array_picture(array), 2, 5)
        assert pixels.dtype == np.float32 and pixels.shape == (2, 5, 3)
        assert (pixels[0] == 1).all() and (pixels[1, 1:] == 0).all()
        np.testing.assert_allclose(pixels[1, 0], 0.5, atol=0.5 / 255)


def test_what_is_eight_bits_is_a_picture_and_the_rest_keeps_its_own():
    array = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)[:, ::-1]
    picture = array_picture(array)
    assert isinstance(picture, Image.Image) and (np.asarray(picture) == array).all()
    fine = np.full((2, 3, 3), 1001, np.uint16)
    assert np.allclose(fit_pixels(array_picture(fine), 2, 3), 1001 / 65535, atol=1e-7)


@pytest.mark.parametrize("size", [(4, 4), (6, 2), (2, 6), (16, 24)])
def test_fitted_it_is_of_its_size_and_not_squashed(size):
    """The middle of a picture whose left half is dark: its edge stays in the middle."""
    array = np.zeros((8, 8, 3), np.float32)
    array[:, 4:] = 0.8
    for given in (array, (array * 255).astype(np.uint8)):
        pixels = fit_pixels(array_picture(given), *size)
        assert pixels.shape == (*size, 3)
        left, right = pixels[:, 0], pixels[:, -1]
        assert np.abs(left).max() < 0.1 and np.abs(right - 0.8).max() < 0.1
