"""Images to start from, as users have them: one kind of picture, in a size that the model can make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .._numbers import whole
from ..data.arrays import Picture, array_picture, fit_pixels
from ..data.pictures import to_rgb
from .choices import MAX_SIDE

__all__ = ["fitted_size", "picture_size", "pixels_of", "start_latents", "start_pictures"]


def start_latents(image: Any, channels: int, prompts: int) -> torch.Tensor | None:
    """The latents that an image is given as, float32 [B, C, h, w], or None where it is a picture.

    Args:
        image: latents are a tensor [B, C, h, w], scaled, as `output_type="latent"` gives them.
        channels: C; 3 are a picture's.
        prompts: how many there are; one image serves all.

    Raises:
        ValueError: latents that aren't one or one a prompt, or that aren't finite.
    """
    if not isinstance(image, torch.Tensor) or image.ndim != 4 or image.shape[1] != channels or channels == 3:
        return None
    if len(image) not in (1, prompts):
        raise ValueError(f"{prompts} prompts need one image or as many, got {len(image)}")
    if not image.is_floating_point() or not image.isfinite().all():
        raise ValueError(f"image is taken for latents, and these must be finite floats, got {image.dtype}")
    return image.detach().float()


def start_pictures(image: Any, prompts: int) -> list[Picture]:
    """Pictures of whatever an image is given as: one, or one a prompt.

    Args:
        image: PIL of any mode, turned as its EXIF data say; NumPy [H, W, 3] or [B, H, W, 3] or a tensor
            [3, H, W] or [B, 3, H, W], uint8 from 0 to 255, uint16 from 0 to 65535 or floats from 0 to 1; or a
            list of these, one a prompt.
        prompts: how many there are; one image serves all.

    Raises:
        ValueError: what cannot be an image to start from.
    """
    listed = isinstance(image, list | tuple)
    if listed and not image:
        raise ValueError("image must hold at least one image")
    batched = not listed and getattr(image, "ndim", 3) == 4
    images = list(image) if listed or batched else [image]
    if len(images) not in (1, prompts):
        raise ValueError(f"{prompts} prompts need one image or as many, got {len(images)}")
    names = ["image"] if len(images) == 1 else [f"image {i}" for i in range(1, len(images) + 1)]
    return [_picture(one, name) for one, name in zip(images, names, strict=True)]


def _picture(image: Any, name: str) -> Picture:
    if isinstance(image, Image.Image):
        return to_rgb(image, name)
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"an image has three channels, and {name} has shape {list(image.shape)}")
        image = image.detach().cpu().permute(1, 2, 0)
        return array_picture((image.float() if image.is_floating_point() else image).numpy(), name)
    if isinstance(image, np.ndarray):
        return array_picture(image, name)
    raise ValueError(
        "image must be a PIL image, a NumPy array, a tensor or a list of these, got "
        + type(image).__name__
        + (": open a file with PIL.Image.open" if isinstance(image, str) else "")
    )


def picture_size(picture: Picture) -> tuple[int, int]:
    """(height, width)."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    return picture.shape[0], picture.shape[1]


def fitted_size(
    pictures: Sequence[Picture] | None,
    side: int,
    multiple: int,
    height: int | None = None,
    width: int | None = None,
) -> tuple[int, int]:
    """(height, width) of what is made: what is given, else the model's own size; from a picture, in its
    proportions, with about as many pixels.

    Args:
        pictures: to start from, of which the first one counts; None for noise.
        side: of the square that the model was made for.
        multiple: what heights and widths are multiples of.
        height, width: where they were asked for.

    Raises:
        ValueError: one of these that isn't a number of pixels.
    """
    height = None if height is None else whole("height", height, MAX_SIDE)
    width = None if width is None else whole("width", width, MAX_SIDE)
    own_height, own_width = side, side
    if pictures is not None:
        own_height, own_width = picture_size(pictures[0])
        scale = side / math.sqrt(own_height * own_width)
        if height is not None:
            scale = height / own_height
        elif width is not None:
            scale = width / own_width
        longest = max(side, side * side // multiple)  # of a strip as narrow as can be
        own_height, own_width = (
            multiple * max(1, round(min(own * scale, longest) / multiple)) for own in (own_height, own_width)
        )
    return own_height if height is None else height, own_width if width is None else width


def pixels_of(pictures: Sequence[Picture], height: int, width: int) -> torch.Tensor:
    """float32 [B, 3, height, width] in [-1, 1]: each one resized to cover the size and cut at the centre."""
    fitted = np.stack([fit_pixels(picture, height, width) for picture in pictures])
    return 2.0 * torch.from_numpy(fitted).permute(0, 3, 1, 2).contiguous() - 1.0
