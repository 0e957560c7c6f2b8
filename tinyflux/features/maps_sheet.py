"""A picture of what Sol attends to: its maps over the images, from noise to data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from moe_sampler.tinyflux.features.cache_read import FeatureCache
from moe_sampler.viewing.sheets import INK, Sheet, scalable_font, wrapped

__all__ = ["maps_sheet"]

_COLOURS = ((20, 60, 140), (110, 165, 215), (246, 243, 236), (244, 140, 80), (178, 20, 40))
_RANGE = 3.0
_GAP, _HEADER, _LABEL = 6, 48, 150


def _colour(values: np.ndarray) -> np.ndarray:
    """uint8 [..., 3]: attention over its mean on a logarithmic scale, blue below it and red above."""
    place = np.log(np.maximum(values, 1e-6)) / np.log(_RANGE)
    places = np.linspace(-1, 1, len(_COLOURS))
    return np.stack([np.interp(place, places, channel) for channel in zip(*_COLOURS, strict=True)], -1)


def _tile(picture: Image.Image | None, values: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """The map's colours, drawn through the picture's outlines where there is one; values: [S, S], mean 1."""
    smooth = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
    colour = _colour(smooth)
    if picture is not None:
        # Local contrast alone: a bright sky should not look like much attention.
        grey = picture.convert("L")
        blurred = grey.filter(ImageFilter.GaussianBlur(size[0] / 10))
        detail = np.asarray(grey, np.float32) - np.asarray(blurred, np.float32)
        colour = colour * (0.92 + np.clip(detail / 130, -0.5, 0.08))[..., None]
    return Image.fromarray(np.clip(colour, 0, 255).astype(np.uint8))


def _legend(draw: ImageDraw.ImageDraw, right: int, font: ImageFont.FreeTypeFont) -> None:
    """A bar from a third of the mean to three times the mean, its right end at `right`."""
    width = 120
    draw.text((right, 5), f"{_RANGE:g}x mean", fill=INK, font=font, anchor="ra")
    left = right - 60 - width
    for i in range(width):
        value = np.asarray(_RANGE ** (2 * i / (width - 1) - 1))
        draw.line(((left + i, 8), (left + i, 16)), fill=tuple(int(c) for c in _colour(value)))
    draw.text((left - 6, 5), f"mean / {_RANGE:g}", fill=INK, font=font, anchor="ra")


def maps_sheet(cache: FeatureCache, indices: Sequence[int], tile: int = 88) -> Image.Image:
    """Rows of samples: caption, picture, and Sol's map at every bucket.

    Blue is less attention than a place's mean, red more, on a logarithmic scale from a third to three times.

    Raises:
        ValueError: a cache without Sol, or an index it doesn't have.
    """
    if not cache.has_sol:
        raise ValueError(f"{cache.folder} has no features of Sol's")
    if not indices or not all(0 <= i < len(cache) for i in indices):
        raise ValueError(f"samples must lie in 0..{len(cache) - 1}, got {list(indices)}")
    pictures = [cache.preview(i) for i in indices]
    height = tile
    if pictures[0] is not None:
        height = round(tile * pictures[0].shape[0] / pictures[0].shape[1])
    buckets, first = cache.manifest.t_buckets, _LABEL
    if pictures[0] is not None:
        first += tile + 2 * _GAP
    font, small = scalable_font(13), scalable_font(12)
    margins = (first, _HEADER, 2 * _GAP, 2 * _GAP)
    sheet = Sheet(len(buckets), len(indices), (tile, height), gap=_GAP, margins=margins)
    title = "Sol's attention, from noise (t = 0) to data (t = 1)"
    sheet.draw.text((first, 5), title, fill=INK, font=small)
    _legend(sheet.draw, sheet.image.width - _GAP, small)
    for column, t in enumerate(buckets):
        sheet.heading(column, _HEADER - 12, f"t = {t:g}", font)
    for row, (index, preview) in enumerate(zip(indices, pictures, strict=True)):
        _, top = sheet.corner(0, row)
        text = wrapped(cache.caption(index), 22, lines=max(1, height // 15))
        sheet.draw.multiline_text((_GAP, top + 2), text, fill=INK, font=small, spacing=2)
        picture = None
        if preview is not None:
            picture = Image.fromarray(preview.numpy()).resize((tile, height), Image.Resampling.BICUBIC)
            sheet.image.paste(picture, (_LABEL, top))
        maps = cache[index]["sol_maps"].numpy()
        for column, values in enumerate(maps * maps[0].size):
            sheet.paste(_tile(picture, values, (tile, height)), column, row)
    return sheet.image
