"""A picture from a table's cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from .pictures import read_picture, to_rgb

__all__ = ["CAPTIONS", "IMAGES", "cell_picture"]

IMAGES = ("image", "img", "jpg", "png", "webp", "picture")
CAPTIONS = ("text", "caption", "captions", "prompt", "txt", "description")
"""What such columns are called, the likeliest first."""


def cell_picture(value: Any, name: str, max_pixels: int | None = None) -> Image.Image:
    """RGB, as large as it came.

    Args:
        value: a file's bytes, its path, or both as `datasets` has them; a picture of Pillow's; or its pixels,
            uint8 [H, W] or [H, W, 1, 3 or 4].
        name: what errors call it.
        max_pixels: see `pictures.pixel_limit`.

    Raises:
        ValueError: none of these, or what `read_picture` raises.
    """
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str):
        if value.startswith(("http://", "https://")):
            raise ValueError(f"{name} is an address; fetch the images first (img2dataset)")
        import fsspec

        opened: Any = fsspec.open(value, "rb")
        with opened as file:
            value = file.read()
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3):
        value = Image.fromarray(value[..., 0] if value.shape[2:] == (1,) else np.ascontiguousarray(value))
    if isinstance(value, Image.Image):
        return to_rgb(value, name, max_pixels)
    if not isinstance(value, bytes):
        raise ValueError(f"{name} holds no picture, but {type(value).__name__}")
    return read_picture(value, name, max_pixels)
