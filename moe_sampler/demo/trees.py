"""Trees that can be counted: beside a castle or in front of it."""

from __future__ import annotations

from functools import partial

import numpy as np

from .drawing import Canvas, Colour, across, blend, jitter, lit

_SMALL, _LARGE = 3.7, 4.4  # radius of a crown


def plant_row(
    canvas: Canvas, kind: str, count: int, span: tuple[float, float], feet: tuple[float, float], light, rng
) -> None:
    """`count` trees that don't cover each other's crowns, farthest first.

    Args:
        kind: the ground they grow on.
        span: the x range that crowns stay in.
        feet: y of the farthest and the nearest foot; equal where all stand on one line.
    """
    left, right = span
    line = feet[0] == feet[1]
    pitch = (right - left) / count
    if line or pitch > 2 * _SMALL + 1:
        radius = min(_LARGE, pitch / 2 - 0.4)
        slack = max(0.0, pitch / 2 - radius - 0.4)
        x = left + pitch * (np.arange(count) + 0.5) + rng.uniform(-slack, slack, count)
        y = rng.uniform(*feet, count)
    else:
        # No room side by side: one behind the other, to the left and to the right in turn.
        radius = _SMALL
        x = np.where(np.arange(count) % 2 == rng.integers(2), left + radius, right - radius)
        y = np.linspace(*feet, count) if count > 1 else rng.uniform(*feet, 1)
    for place in np.argsort(y):
        _GROWN[kind](canvas, float(x[place]), float(y[place]), radius, light, rng)


def conifer(canvas: Canvas, x: float, foot: float, height: float, colour: Colour, trunk: Colour) -> None:
    """Three tiers of branches on a short trunk."""
    canvas.rectangle(x - 0.8, foot - 2, x + 0.8, foot + 2, trunk)
    for level in range(3):
        half, low = 4.6 - level * 1.1, foot - level * height * 0.25
        points = [(x - half, low), (x + half, low), (x, low - height * 0.48)]
        canvas.polygon(points, colour, across(x - half, x + half, 1.25, 0.7))


def _round(
    canvas: Canvas, x: float, foot: float, radius: float, light, rng, leaves: Colour = (44, 106, 48)
) -> None:
    canvas.rectangle(x - 0.8, foot - 4, x + 0.8, foot, lit((98, 68, 44), light))
    colour = jitter(lit(leaves, light), rng, 6)
    canvas.ellipse(x, foot - 3 - radius, radius, radius, colour, canvas.grain(1.4, 0.22))


def _fir(canvas: Canvas, x: float, foot: float, radius: float, light, rng) -> None:
    colour = jitter(lit((54, 100, 84), light), rng, 5)
    canvas.rectangle(x - 0.7, foot - 1.5, x + 0.7, foot, lit((84, 58, 40), light))
    shade = across(x - radius, x + radius, 1.25, 0.7)
    canvas.polygon([(x - radius, foot - 1.2), (x + radius, foot - 1.2), (x, foot - 10.5)], colour, shade)


def _palm(canvas: Canvas, x: float, foot: float, radius: float, light, rng) -> None:
    lean = rng.uniform(-0.8, 0.8)
    top = foot - 7.5
    canvas.line([(x - lean, foot), (x, top)], 1.3, lit((136, 96, 60), light), detail=False)
    green = jitter(lit((70, 156, 74), light), rng, 5)
    dark = blend(green, (0, 20, 10), 0.3)
    for dx, dy, colour in ((-1, 0.75, dark), (1, 0.75, dark), (-1, -0.2, green), (1, -0.2, green)):
        tip = (x + dx * radius, top + dy * 3.0)
        canvas.polygon(
            [(x, top - 0.6), (x + dx * radius * 0.55, top - 2.4 + dy), tip, (x, top + 0.9)], colour
        )
    canvas.polygon([(x - 1.1, top), (x + 1.1, top), (x, top - 3.2)], green)


# Light before the dark shore, dark before the meadow.
_GROWN = {"meadow": _round, "lake": partial(_round, leaves=(84, 152, 70)), "snow": _fir, "desert": _palm}
