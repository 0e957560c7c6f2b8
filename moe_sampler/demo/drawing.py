"""A supersampled canvas for the demo scenes: filled shapes that are flat or shaded, in scene units.

Scene units are pixels of the final image (0..64, y downwards). A flat canvas ignores every `shade` and every
stroke marked as detail, which is what turns one drawing routine into both the full picture and its
structure-only version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
COUNTS = {"none": 0, "one": 1, "two": 2, "three": 3}
"""What an attribute that counts things says."""
SUPERSAMPLING = 4
_FIELD = 512

Colour = tuple[float, float, float]
Point = tuple[float, float]
Shade = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(x [1, W], y [H, 1]) in scene units -> brightness factor, broadcastable to [H, W] or [H, W, 1 or 3]."""


def lit(colour: Sequence[float], light: Sequence[float]) -> Colour:
    """Surface colour under coloured light, both RGB; colour 0..255, light around 1."""
    red, green, blue = (min(255.0, c * k) for c, k in zip(colour, light, strict=True))
    return red, green, blue


def blend(a: Sequence[float], b: Sequence[float], weight: float) -> Colour:
    """a at weight 0, b at weight 1."""
    red, green, blue = (x + (y - x) * weight for x, y in zip(a, b, strict=True))
    return red, green, blue


def jitter(colour: Sequence[float], rng: np.random.Generator, amount: float = 8.0) -> Colour:
    """The colour, a little brighter or darker and tinted."""
    common = rng.normal(0.0, amount)
    red, green, blue = (float(np.clip(c + common + rng.normal(0.0, amount / 3), 0, 255)) for c in colour)
    return red, green, blue


@lru_cache(maxsize=16)
def _noise_field(cell: int) -> np.ndarray:
    """[512, 512] float32 periodic smooth noise in about -1..1, features `cell` supersampled pixels wide."""
    count = max(4, round(_FIELD / cell))
    grid = np.random.default_rng(cell).uniform(-1, 1, (count, count)).astype(np.float32)
    side = _FIELD * (count + 4) // count
    image = Image.fromarray(np.pad(grid, 2, mode="wrap")).resize((side, side), Image.Resampling.BICUBIC)
    margin = 2 * _FIELD // count
    return np.asarray(image)[margin : margin + _FIELD, margin : margin + _FIELD]


@lru_cache(maxsize=1)
def _block_tones() -> np.ndarray:
    return np.random.default_rng(7).uniform(-1, 1, (64, 64)).astype(np.float32)


class Canvas:
    """Draws in scene units; `image()` gives the antialiased uint8 [64, 64, 3] picture.

    Args:
        flat: structure only: shades are ignored and `detail` shapes are not drawn.
        rng: decides texture offsets, nothing of the geometry.
    """

    def __init__(self, flat: bool, rng: np.random.Generator) -> None:
        self.flat = flat
        self.rng = rng
        side = SIZE * SUPERSAMPLING
        self._image = Image.new("RGB", (side, side))
        self._draw = ImageDraw.Draw(self._image)

    def image(self) -> np.ndarray:
        return np.asarray(self._image.reduce(SUPERSAMPLING))

    # Shapes. `detail=True` shapes exist only in the full picture.

    def polygon(
        self, points: Sequence[Point], colour: Colour, shade: Shade | None = None, detail=False
    ) -> None:
        self._shape("polygon", points, colour, shade, detail)

    def rectangle(self, x0, y0, x1, y1, colour: Colour, shade: Shade | None = None, detail=False) -> None:
        self._shape("polygon", [(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour, shade, detail)

    def ellipse(self, cx, cy, rx, ry, colour: Colour, shade: Shade | None = None, detail=False) -> None:
        self._shape("ellipse", [(cx - rx, cy - ry), (cx + rx, cy + ry)], colour, shade, detail)

    def line(self, points: Sequence[Point], width: float, colour: Colour, detail=True) -> None:
        if detail and self.flat:
            return
        scaled = [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points]
        self._draw.line(scaled, fill=_rgb(colour), width=max(1, round(width * SUPERSAMPLING)), joint="curve")

    def gradient(self, stops: Sequence[tuple[float, Colour]]) -> None:
        """Vertical gradient over the whole canvas; stops are (y, colour), y ascending."""
        y = (np.arange(SIZE * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
        heights = [stop[0] for stop in stops]
        column = np.stack([np.interp(y, heights, [stop[1][c] for stop in stops]) for c in range(3)], axis=-1)
        rows = np.repeat(column[:, None, :].astype(np.uint8), SIZE * SUPERSAMPLING, axis=1)
        self._image.paste(Image.fromarray(rows))

    def glow(self, cx, cy, radius, colour: Colour, strength: float) -> None:
        """Soft light around a point, full picture only."""
        if self.flat:
            return
        box = _box([(cx - radius, cy - radius), (cx + radius, cy + radius)])
        if box is None:
            return
        x, y = _axes(box)
        falloff = np.clip(1 - np.hypot(x - cx, y - cy) / radius, 0, 1) ** 2
        mask = Image.fromarray((255 * strength * falloff).astype(np.uint8))
        self._image.paste(_rgb(colour), box, mask)

    def mirror(self, y: float, colour: Colour, weight: float, ripple: float) -> None:
        """Fill everything below y with the upside-down picture above it, tinted: still water."""
        side = SIZE * SUPERSAMPLING
        top = round(y * SUPERSAMPLING)
        rows = np.arange(side - top)
        source = np.asarray(self._image)[np.clip(top - 1 - rows, 0, None)].astype(np.float32)
        if not self.flat:
            phase = self.rng.uniform(0, 2 * np.pi)
            depth = rows[:, None] / SUPERSAMPLING
            shift = np.sin(depth * 2.6 + phase) * ripple * (0.3 + depth / 14)
            columns = np.arange(side)[None, :] + np.rint(shift * SUPERSAMPLING).astype(int)
            source = np.take_along_axis(source, np.clip(columns, 0, side - 1)[..., None], axis=1)
            source *= (1 + 0.05 * np.sin(depth * 3.1 + phase))[..., None]
        water = source * (1 - weight) + np.asarray(colour, dtype=np.float32) * weight
        self._image.paste(Image.fromarray(np.clip(water, 0, 255).astype(np.uint8)), (0, top))

    # Shades.

    def grain(self, cell: float, amount: float, stretch: float = 1.0) -> Shade:
        """Mottling with features of `cell` units; stretch > 1 makes them wide, < 1 tall."""
        field = _noise_field(max(2, round(cell * SUPERSAMPLING)))
        ox, oy = self.rng.integers(0, _FIELD, 2)

        def shade(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            columns = ((x[0] / stretch) * SUPERSAMPLING + ox).astype(int) % _FIELD
            rows = (y[:, 0] * SUPERSAMPLING + oy).astype(int) % _FIELD
            return 1 + amount * field[np.ix_(rows, columns)]

        return shade

    def masonry(self, height: float, width: float, amount: float) -> Shade:
        """Courses of stone blocks: each block its own tone, darker joints."""
        tones = _block_tones()
        ox, oy = self.rng.integers(0, 64, 2)

        def shade(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            row = np.floor(y / height).astype(int)
            across = (x + (row % 2) * width / 2) / width
            column = np.floor(across).astype(int)
            joint = ((y / height) % 1 < 0.22) | (across % 1 < 0.14)
            return 1 + amount * tones[(row + oy) % 64, (column + ox) % 64] - 1.3 * amount * joint

        return shade

    def _shape(self, kind: str, points: Sequence[Point], colour: Colour, shade: Shade | None, detail) -> None:
        if detail and self.flat:
            return
        scaled = [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points]
        if shade is None or self.flat:
            getattr(self._draw, kind)(scaled, fill=_rgb(colour))
            return
        box = _box(points)
        if box is None:
            return
        mask = Image.new("L", (box[2] - box[0], box[3] - box[1]))
        getattr(ImageDraw.Draw(mask), kind)([(x - box[0], y - box[1]) for x, y in scaled], fill=255)
        factor = np.asarray(shade(*_axes(box)), dtype=np.float32)
        factor = factor if factor.ndim == 3 else factor[..., None]
        patch = np.clip(factor * np.asarray(colour, dtype=np.float32), 0, 255).astype(np.uint8)
        patch = np.broadcast_to(patch, (mask.height, mask.width, 3))
        self._image.paste(Image.fromarray(np.ascontiguousarray(patch)), box, mask)


def across(x0: float, x1: float, bright: float, dark: float) -> Shade:
    """Brightness from `bright` at x0 to `dark` at x1: the light and the shadow side of a body."""
    return lambda x, y: np.interp(x[0], sorted((x0, x1)), (bright, dark) if x0 < x1 else (dark, bright))[
        None, :
    ]


def product(*shades: Shade) -> Shade:
    def shade(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        result = shades[0](x, y)
        for other in shades[1:]:
            result = result * other(x, y)
        return result

    return shade


def _rgb(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = (int(min(255, max(0, c))) for c in colour)
    return red, green, blue


def _box(points: Sequence[Point]) -> tuple[int, int, int, int] | None:
    """Bounding box in supersampled pixels, clipped to the canvas; None when it lies outside."""
    side = SIZE * SUPERSAMPLING
    xs, ys = [p[0] * SUPERSAMPLING for p in points], [p[1] * SUPERSAMPLING for p in points]
    x0, y0 = max(0, int(min(xs))), max(0, int(min(ys)))
    x1, y1 = min(side, int(max(xs)) + 2), min(side, int(max(ys)) + 2)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _axes(box: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    x = (np.arange(box[0], box[2]) + 0.5) / SUPERSAMPLING
    y = (np.arange(box[1], box[3]) + 0.5) / SUPERSAMPLING
    return x[None, :], y[:, None]
