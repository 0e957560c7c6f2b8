"""Images to start from: their size, and their pixels, whatever they are given as."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from moe_sampler.pipelines.start_images import fitted_size, pixels_of, start_pictures


@pytest.mark.parametrize(
    ("size", "given", "made"),
    [
        ((64, 64), {}, (64, 64)),
        ((512, 512), {}, (64, 64)),
        ((1, 1), {}, (64, 64)),
        ((499, 1001), {}, (48, 96)),
        ((1001, 499), {}, (96, 48)),
        ((499, 1001), {"width": 32}, (16, 32)),
        ((499, 1001), {"height": 96}, (96, 192)),
        ((499, 1001), {"height": 64, "width": 64}, (64, 64)),
        ((70, 60), {}, (64, 64)),
        ((1, 5000), {}, (16, 256)),
        ((5000, 1), {}, (256, 16)),
    ],
)
def test_the_size_has_the_images_proportions_and_the_models_pixels(size, given, made):
    pictures = start_pictures(Image.new("L", size[::-1]), 1)
    assert fitted_size(pictures, 64, 16, **given) == made
    assert fitted_size([np.zeros((*size, 3), np.float32)], 64, 16, **given) == made


def test_without_an_image_it_is_the_models_own_or_what_is_given():
    assert fitted_size(None, 64, 16) == (64, 64)
    assert fitted_size(None, 64, 16, width=80) == (64, 80)


def test_pixels_are_exact_where_nothing_is_resized():
    array = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    wanted = torch.from_numpy(array.astype(np.float64) / 127.5 - 1).permute(2, 0, 1)[None]
    deep = array.astype(np.uint16) * 257
    for image in (array, Image.fromarray(array), array / 255, torch.from_numpy(array).permute(2, 0, 1), deep):
        pixels = pixels_of(start_pictures(image, 1), 16, 16)
        assert pixels.dtype == torch.float32
        torch.testing.assert_close(pixels.double(), wanted, atol=1e-6, rtol=0)


def test_a_resized_array_is_the_resized_picture():
    array = np.random.default_rng(0).integers(80, 180, (50, 70, 3), dtype=np.uint8)
    eight = pixels_of(start_pictures(array, 1), 32, 32)
    deep = pixels_of(start_pictures(array / 255, 1), 32, 32)
    assert (eight - deep).abs().max() < 2.1 / 255 and deep.abs().max() <= 1
    # Not squashed: a circle in a wide picture stays one.
    y, x = np.mgrid[:64, :128]
    disc = (np.hypot(x - 63.5, y - 31.5) < 20).astype(np.float32)[..., None].repeat(3, -1)
    fitted = (pixels_of(start_pictures(disc, 1), 32, 32)[0, 0] + 1) / 2
    assert abs(fitted.sum(0).gt(0.5).sum() - fitted.sum(1).gt(0.5).sum()) <= 1


def test_every_picture_of_a_list_is_fitted():
    pictures = start_pictures([Image.new("RGB", (40, 20), "red"), np.ones((9, 3, 3))], 2)
    assert pixels_of(pictures, 16, 32).shape == (2, 3, 16, 32)
    with pytest.raises(ValueError, match="image 2 holds NaN"):
        start_pictures([Image.new("RGB", (4, 4)), np.full((4, 4, 3), np.nan)], 2)


def test_edges_of_resized_floats_stay_between_black_and_white():
    """A resampling that is sharp goes beyond them."""
    edges = np.zeros((32, 32, 3), np.float32)
    edges[:, 16:] = 1
    pixels = pixels_of([edges], 20, 20)
    assert pixels.min() == -1 and pixels.max() == 1


def test_what_is_turned_or_see_through_is_shown_as_it_looks():
    picture = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    picture.getexif()[0x0112] = 6
    (shown,) = start_pictures(picture, 1)
    assert shown.size == (20, 40) and shown.getpixel((0, 0)) == (255, 255, 255)
