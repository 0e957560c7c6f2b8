"""NumPy arrays and tensors as pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from .pictures import check_floats, fit_image

__all__ = ["Picture", "array_picture", "fit_pixels"]

Picture = Image.Image | np.ndarray
"""RGB of 8 bits, or float32 [H, W, 3] from 0 to 1 of what has more."""


def array_picture(array: np.ndarray, name: str = "image") -> Picture:
    """A picture of [H, W, 3]: uint8 from 0 to 255, uint16 from 0 to 65535 or floats from 0 to 1.

    Raises:
        ValueError: of another shape or dtype, not finite, or out of range.
    """
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"an image has three channels, and {name} has shape {list(array.shape)}")
    if 0 in array.shape:
        raise ValueError(f"{name} is empty: {array.shape[1]} × {array.shape[0]} pixels")
    if array.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(array))
    if array.dtype == np.uint16:
        return array.astype(np.float32) / 65535
    if array.dtype.kind == "f":
        return check_floats(array, name)
    raise ValueError(
        f"{name} is of {array.dtype}: give uint8 from 0 to 255, uint16 from 0 to 65535, or floats from 0 to 1"
    )


def fit_pixels(picture: Picture, height: int, width: int) -> np.ndarray:
    """float32 [height, width, 3] from 0 to 1, fitted as `fit_image` does."""
    if isinstance(picture, Image.Image):
        return np.asarray(fit_image(picture, height, width), dtype=np.float32) / 255.0
    if picture.shape[:2] == (height, width):
        return picture
    channels: Any = [
        fit_image(Image.fromarray(np.ascontiguousarray(picture[..., i])), height, width) for i in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], -1).clip(0, 1)
