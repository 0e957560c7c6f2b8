"""The city street: rows of houses in one-point perspective, road, cars, trees or lamps on either side."""

from __future__ import annotations

import numpy as np

from .drawing import Canvas, Colour, blend, jitter, lit
from .sky import TIMES, draw_sky

ATTRIBUTES = {
    "time": ("day", "dusk", "night", "dawn"),
    "houses": ("brick", "pale", "colourful", "glass"),
    "windows": ("lit", "dark"),
    "position": ("left", "centre", "right"),
    "left_side": ("trees", "lamps", "bare"),
    "right_side": ("trees", "lamps", "bare"),
    "cars": ("none", "one", "two"),
    "lane": ("left", "right"),
    "car": ("red", "blue", "yellow", "white"),
    "other_car": ("red", "blue", "yellow", "white"),
}
"""`car` is the only car's colour or that of the left one; `other_car` is the right one's of two."""
LAYOUT = {
    "position": "place",
    "left_side": "relation",
    "right_side": "relation",
    "cars": "count",
    "lane": "place",
}
_LIT = {"day": 0.0, "dawn": 0.25, "dusk": 0.8, "night": 0.9}
"""Lit windows belong to the dark hours."""
_HOUSE = {
    "brick": ((168, 86, 66), (148, 70, 58), (184, 104, 78)),
    "pale": ((228, 214, 186), (214, 204, 190), (236, 226, 206)),
    "colourful": ((222, 132, 96), (112, 168, 178), (228, 190, 98), (150, 178, 118), (206, 134, 152)),
    "glass": ((124, 152, 176), (106, 132, 160), (142, 168, 188)),
}
_CAR = {"red": (206, 44, 44), "blue": (52, 98, 198), "yellow": (242, 194, 46), "white": (236, 236, 238)}
_VANISHING = {"left": 19.0, "centre": 32.0, "right": 45.0}


def choices(name: str, so_far: dict[str, str]) -> dict[str, float]:
    """An attribute's possible values after those drawn before it, with their shares; none: no such thing."""
    if name == "windows":
        share = _LIT[so_far["time"]]
        return {value: part for value, part in (("lit", share), ("dark", 1 - share)) if part}
    if name in ("lane", "car", "other_car"):
        counts = {"lane": ("one",), "car": ("one", "two"), "other_car": ("two",)}[name]
        return dict.fromkeys(ATTRIBUTES[name], 1.0) if so_far["cars"] in counts else {}
    return dict.fromkeys(ATTRIBUTES[name], 1.0)


class _View:
    """One-point perspective: a point (x, y, depth) of the street, depth 1 at the picture's plane."""

    def __init__(self, vx: float, vy: float) -> None:
        self.vx, self.vy = vx, vy

    def __call__(self, x: float, y: float, depth: float) -> tuple[float, float]:
        return self.vx + x / depth, self.vy + y / depth

    def wall(self, x: float, y0: float, y1: float, near: float, far: float) -> list[tuple[float, float]]:
        """Corners of an upright rectangle along the street at distance x from its axis."""
        return [self(x, y0, near), self(x, y0, far), self(x, y1, far), self(x, y1, near)]


def draw(canvas: Canvas, attributes: dict[str, str], rng: np.random.Generator) -> None:
    """Draw one street; `rng` decides the geometry."""
    time = attributes["time"]
    light = TIMES[time].light
    view = _View(_VANISHING[attributes["position"]] + rng.uniform(-1.5, 1.5), rng.uniform(36, 39))
    sun = (3, view.vx - 8) if view.vx > 32 else (view.vx + 8, 61)
    draw_sky(canvas, time, view.vy, rng, sun)
    ground = 66 - view.vy
    road = lit((104, 104, 112), light)
    pavement = lit((172, 166, 158), light)
    canvas.rectangle(0, view.vy, 64, 64, pavement, canvas.grain(1.6, 0.05, 2))
    kerb = 0.60 * 34
    points = [
        view(-kerb, ground, 0.8),
        view(kerb, ground, 0.8),
        view(kerb, ground, 14),
        view(-kerb, ground, 14),
    ]
    canvas.polygon(points, road, canvas.grain(1.4, 0.06, 2))
    for near in (0.95, 1.35, 2.0, 3.2):
        dash = [
            view(sx, ground, d)
            for sx, d in ((-1.1, near), (1.1, near), (1.1, near * 1.2), (-1.1, near * 1.2))
        ]
        canvas.polygon(dash, lit((232, 226, 196), light), detail=True)
    end = blend(TIMES[time].horizon, lit((130, 126, 140), light), 0.55)
    canvas.rectangle(view.vx - 5, view.vy - 5, view.vx + 5, view.vy + 2.4, end)
    for side in (-1, 1):
        _row(canvas, view, attributes, side, ground, rng)
    _roadside(canvas, view, attributes, ground, rng)
    _cars(canvas, view, attributes, ground, rng)


def _row(canvas: Canvas, view: _View, attributes, side: int, ground: float, rng) -> None:
    """One side's houses, drawn from far to near."""
    time, style = attributes["time"], attributes["houses"]
    palette, colours = TIMES[time], _HOUSE[style]
    x = side * 34.0
    depths = [0.7]
    while depths[-1] < 6.5:
        depths.append(depths[-1] * rng.uniform(1.42, 1.75))
    heights = rng.uniform(40, 62, len(depths)) if style == "glass" else rng.uniform(24, 40, len(depths))
    order = rng.permutation(len(depths))
    pattern = rng.uniform(0, 1, (len(depths), 16, 8))
    for i in reversed(range(len(depths) - 1)):
        near, far, top = depths[i], depths[i + 1], -float(heights[i])
        colour = jitter(lit(colours[order[i] % len(colours)], palette.light), rng, 4)
        shadow = 0.80 if side > 0 else 1.0
        colour = lit(colour, (shadow,) * 3)
        colour = blend(colour, palette.horizon, min(0.45, 0.09 * (near - 0.7)))
        # The wall that faces us where this house rises above its nearer neighbour is out of sight behind it;
        # where it stands lower, the neighbour's gable is not drawn either: houses stand wall to wall.
        shade = canvas.masonry(1.6, 2.6, 0.07) if style == "brick" else canvas.grain(2.2, 0.05)
        canvas.polygon(view.wall(x, top, ground, near, far), colour, shade)
        trim = blend(colour, (255, 250, 240) if style != "glass" else (20, 30, 50), 0.35)
        canvas.polygon(view.wall(x, top, top + 2.4, near, far), trim, detail=True)
        canvas.polygon(
            view.wall(x, ground - 4, ground, near, far), blend(colour, (0, 0, 0), 0.28), detail=True
        )
        _windows(canvas, view, attributes, x, near, far, top, ground, colour, pattern[i])


def _windows(canvas, view, attributes, x, near, far, top, ground, colour: Colour, pattern) -> None:
    style, time = attributes["houses"], attributes["time"]
    glass = style == "glass"
    floor, gap = (7.4, 0.16) if glass else (9.6, 0.27)
    columns = 3
    glow = (255, 214, 110)
    pane = blend(lit((70, 88, 116), TIMES[time].light), colour, 0.15)
    if glass:
        pane = blend(lit((176, 206, 226), TIMES[time].light), colour, 0.2)
    rows = int((ground - 6 - (top + 4)) / floor)
    step = (far / near) ** (1 / columns)
    for r in range(rows):
        y0 = top + 4.4 + r * floor
        for c in range(columns):
            d0 = near * step ** (c + gap)
            d1 = near * step ** (c + 1 - gap)
            on = attributes["windows"] == "lit" and pattern[r % 16, c] < 0.62
            fill = glow if on else pane
            canvas.polygon(
                view.wall(x, y0, y0 + floor * (0.66 if glass else 0.58), d0, d1), fill, detail=True
            )


def _roadside(canvas: Canvas, view: _View, attributes, ground: float, rng) -> None:
    offset = rng.uniform(0.95, 1.1)
    for depth in (4.2, 2.7, 1.75, 1.2):
        for side, kind in ((-1, attributes["left_side"]), (1, attributes["right_side"])):
            x, foot = view(side * 24.0, ground, depth * offset)
            if kind == "trees":
                _tree(canvas, attributes, x, foot, 1 / (depth * offset), rng)
            elif kind == "lamps":
                _lamp(canvas, attributes, x, foot, 1 / (depth * offset), side)


def _tree(canvas: Canvas, attributes, x: float, foot: float, scale: float, rng) -> None:
    light = tuple(0.2 + 0.8 * k for k in TIMES[attributes["time"]].light)
    trunk = lit((92, 66, 46), light)
    canvas.rectangle(x - 0.9 * scale, foot - 15 * scale, x + 0.9 * scale, foot, trunk)
    leaf = jitter(lit((70, 138, 64), light), rng, 6)
    radius = 8.0 * scale
    canvas.ellipse(x, foot - 20 * scale, radius, radius * 1.15, leaf, canvas.grain(1.3, 0.24))


def _lamp(canvas: Canvas, attributes, x: float, foot: float, scale: float, side: int) -> None:
    time = attributes["time"]
    dark = time in ("dusk", "night")
    post, lean = lit((58, 60, 70), TIMES[time].light), -side * 4.5 * scale
    width = max(0.55, 1.3 * scale)
    points = [(x, foot), (x, foot - 29 * scale), (x + lean, foot - 31 * scale)]
    canvas.line(points, width, post, detail=False)
    lamp = (255, 226, 140) if dark else (238, 236, 224)
    if dark:
        canvas.glow(x + lean, foot - 30 * scale, 9 * scale + 1.5, (255, 214, 120), 0.75)
    size = max(0.7, 2.2 * scale)
    canvas.ellipse(x + lean, foot - 30.4 * scale, size, size * 0.8, lamp)


def _cars(canvas: Canvas, view: _View, attributes, ground: float, rng) -> None:
    """Traffic keeps to the right: the car in the left lane comes towards us."""
    cars = [(attributes.get("lane", "left"), attributes.get("car")), ("right", attributes.get("other_car"))]
    depth = rng.uniform(1.25, 1.6, 2)
    for i in np.argsort(-depth):
        lane, colour = cars[i]
        if colour:
            _car(canvas, view, attributes["time"], lane, colour, ground, depth[i])


def _roof(
    x: float, foot: float, s: float, sill: tuple[float, float], top: tuple[float, float]
) -> list[tuple[float, float]]:
    """A car's, as a trapezoid; `sill` and `top`: half its width there, and the height over the road."""
    corners = ((-1, *sill), (-1, *top), (1, *top), (1, *sill))
    return [(x + side * half * s, foot - height * s) for side, half, height in corners]


def _car(
    canvas: Canvas, view: _View, time: str, lane: str, colour_name: str, ground: float, depth: float
) -> None:
    light = tuple(0.2 + 0.8 * k for k in TIMES[time].light)
    coming = lane == "left"
    x, foot = view(-10.0 if coming else 10.0, ground, depth)
    s = 1.25 / depth
    colour = lit(_CAR[colour_name], light)
    canvas.ellipse(x, foot, 7.4 * s, 1.5 * s, lit((44, 44, 50), light))
    for side in (-1, 1):
        canvas.rectangle(
            x + side * 4.9 * s - 1.1 * s,
            foot - 2.4 * s,
            x + side * 4.9 * s + 1.1 * s,
            foot + 0.5 * s,
            (26, 26, 30),
        )
    canvas.polygon(_roof(x, foot, s, (4.9, 6.0), (3.7, 10.0)), colour)
    canvas.rectangle(x - 6.2 * s, foot - 6.4 * s, x + 6.2 * s, foot - 1.3 * s, colour)
    pane = lit((150, 186, 206), light)
    canvas.polygon(_roof(x, foot, s, (3.9, 6.5), (3.0, 9.2)), pane)
    dark = time in ("dusk", "night")
    if coming:
        lamp, shine = ((255, 246, 190) if dark else (250, 244, 220)), (255, 240, 170)
    else:
        lamp, shine = ((255, 70, 50) if dark else (176, 30, 30)), (255, 60, 40)
    for side in (-1, 1):
        canvas.rectangle(
            x + side * 4.9 * s - 1.0 * s,
            foot - 5.4 * s,
            x + side * 4.9 * s + 1.0 * s,
            foot - 3.8 * s,
            lamp,
            detail=True,
        )
        if dark:
            canvas.glow(x + side * 4.9 * s, foot - 4.6 * s, 3.2 * s, shine, 0.5)
    canvas.rectangle(x - 1.7 * s, foot - 3.4 * s, x + 1.7 * s, foot - 2.1 * s, (240, 240, 236), detail=True)
