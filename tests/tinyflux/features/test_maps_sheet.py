"""A map's colours over a picture: what is bright there is not what is attended to."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from moe_sampler.tinyflux.features.maps_sheet import _colour, _tile

SIZE = (40, 40)


def test_blue_is_less_than_the_mean_and_red_more():
    less, mean, more = _colour(np.array([1 / 3, 1.0, 3.0]))
    assert less[2] > less[0] and more[0] > more[2]
    assert abs(mean[0] - mean[2]) < min(less[2] - less[0], more[0] - more[2])
    # On a logarithmic scale that ends at a third and three times the mean.
    assert np.array_equal(_colour(np.array([0.0, 1e-9, 0.1])), [less] * 3)
    assert np.array_equal(_colour(np.array([9.0])), [more])


@pytest.mark.parametrize("attention", [0.5, 1.0, 2.0])
def test_an_even_picture_changes_no_colour_however_bright_it_is(attention):
    values = np.full((8, 8), attention)
    alone = np.asarray(_tile(None, values, SIZE), float)
    shown = [
        np.asarray(_tile(Image.new("RGB", SIZE, grey), values, SIZE), float) for grey in ("black", "white")
    ]
    assert np.abs(shown[0] - shown[1]).max() <= 1
    assert np.abs(shown[0] - 0.92 * alone).max() <= 1.5 and np.ptp(alone, axis=(0, 1)).max() <= 1


def test_outlines_are_drawn_through_it():
    picture = Image.new("RGB", SIZE, "white")
    picture.paste("black", (18, 0, 22, 40))
    tile = np.asarray(_tile(picture, np.ones((8, 8)), SIZE), float).mean(-1)
    assert tile[:, 19:21].mean() < 0.7 * tile[:, :6].mean()
    assert np.ptp(tile[5:-5], axis=0).max() <= 2  # the same in every row
