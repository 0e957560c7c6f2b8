"""Light and sky at four times of day, shared by the castle and the street."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .drawing import Canvas, Colour, jitter


@dataclass(frozen=True)
class TimeOfDay:
    """Sky colours from zenith to horizon, the light that falls on surfaces, and window colours."""

    top: Colour
    middle: Colour
    horizon: Colour
    light: Colour
    window: Colour
    luminary: Colour


TIMES = {
    "day": TimeOfDay(
        (70, 142, 220), (128, 186, 238), (206, 230, 246), (1, 1, 1), (52, 62, 84), (255, 246, 196)
    ),
    "dusk": TimeOfDay(
        (58, 44, 108), (204, 84, 104), (255, 182, 92), (0.56, 0.43, 0.52), (255, 206, 104), (255, 232, 150)
    ),
    "night": TimeOfDay(
        (8, 10, 34), (16, 22, 60), (38, 50, 104), (0.42, 0.47, 0.68), (255, 216, 112), (244, 244, 224)
    ),
    "dawn": TimeOfDay(
        (146, 178, 222), (226, 198, 214), (255, 230, 196), (0.92, 0.80, 0.82), (58, 50, 74), (255, 246, 196)
    ),
}


def draw_sky(
    canvas: Canvas, time: str, horizon: float, rng: np.random.Generator, sun: tuple[float, float], high=False
) -> None:
    """Gradient, sun or moon, and (full picture only) clouds or stars.

    Args:
        horizon: y of the horizon in scene units.
        sun: the x range where the sun or moon stands.
        high: keep it well above the horizon, where something else stands in front of the sky.
    """
    palette = TIMES[time]
    top, middle, low = (jitter(c, rng, 5) for c in (palette.top, palette.middle, palette.horizon))
    canvas.gradient([(0, top), (horizon * 0.55, middle), (horizon, low)])
    x = rng.uniform(*sun)
    low_sun = (horizon - 22, horizon - 17) if high else (horizon - 15, horizon - 9)
    y = rng.uniform(*(low_sun if time in ("dusk", "dawn") else (7, 16)))
    radius = rng.uniform(4.2, 5.4) if time in ("dusk", "dawn") else rng.uniform(3.6, 4.6)
    strength = {"day": 0.5, "dusk": 0.75, "dawn": 0.7, "night": 0.15}[time]
    clouds = [
        (rng.uniform(0, 64), rng.uniform(4, horizon * 0.6), rng.uniform(6, 11))
        for _ in range(rng.integers(2, 5))
    ]
    stars = rng.uniform((0, 0), (64, horizon - 4), (26, 2))
    canvas.glow(x, y, radius * 3.4, palette.luminary, strength)
    if time == "night":
        for sx, sy in stars:
            size = 0.34 + 0.3 * ((sx * 7) % 1)
            canvas.ellipse(sx, sy, size, size, (230, 232, 250), detail=True)
    canvas.ellipse(x, y, radius, radius, palette.luminary)
    if time == "night":
        canvas.ellipse(x + radius * 0.5, y - radius * 0.25, radius * 0.8, radius * 0.8, top)
        return
    tint = {"day": (255, 255, 255), "dusk": (232, 112, 112), "dawn": (255, 240, 236)}[time]
    for cx, cy, width in clouds:
        if time == "dusk":
            canvas.ellipse(cx, cy + 4, width, 0.9, tint, detail=True)
            canvas.ellipse(cx + width * 0.4, cy + 5.6, width * 0.7, 0.7, tint, detail=True)
        else:
            for dx, dy, scale in ((-0.45, 0.5, 0.5), (0.1, 0, 0.62), (0.5, 0.6, 0.45)):
                canvas.ellipse(cx + dx * width, cy + dy, width * scale, 2.6 * scale, tint, detail=True)
