"""The castle: towers, walls, roofs, horizon and ground; trees beside it or before it."""

from __future__ import annotations

import numpy as np

from .drawing import COUNTS, Canvas, Colour, across, blend, jitter, lit, product
from .sky import TIMES, draw_sky
from .trees import conifer, plant_row

ATTRIBUTES = {
    "time": ("day", "dusk", "night", "dawn"),
    "towers": ("one", "two", "three"),
    "roofs": ("red", "blue", "green", "golden", "battlements"),
    "stone": ("grey", "white", "brown"),
    "rows": ("one", "two", "three"),
    "ground": ("meadow", "lake", "desert", "snow", "forest"),
    "position": ("left", "centre", "right"),
    "sun": ("left", "right"),
    "trees": ("none", "one", "two", "three"),
    "trees_side": ("left", "right", "front"),
}
LAYOUT = {
    "towers": "count",
    "rows": "count",
    "position": "place",
    "sun": "relation",
    "trees": "count",
    "trees_side": "relation",
}
_STONE = {"grey": (152, 150, 156), "white": (226, 220, 208), "brown": (172, 128, 88)}
_ROOF = {"red": (206, 58, 48), "blue": (56, 96, 200), "green": (48, 140, 84), "golden": (236, 178, 52)}
_GROUND = {
    "meadow": (104, 168, 72),
    "lake": (66, 118, 150),
    "desert": (226, 188, 120),
    "snow": (238, 242, 250),
    "forest": (70, 118, 62),
}
_CENTRE = {"left": 20.0, "centre": 32.0, "right": 44.0}
_WALL_HALF = {1: 13.0, 2: 11.5, 3: 12.5}
_REACH = {1: 13.5, 2: 17.5, 3: 18.0}
"""How far a castle with so many towers reaches from its centre."""


def choices(name: str, so_far: dict[str, str]) -> dict[str, float]:
    """An attribute's possible values after those drawn before it, with their shares; none: no such thing."""
    values = ATTRIBUTES[name]
    if name in ("sun", "trees_side"):
        # Between a castle at the edge and that edge there is no room.
        values = [value for value in values if value != so_far["position"]]
    if name == "trees" and so_far["ground"] == "forest":
        values = []
    if name == "trees" and so_far["ground"] == "lake" and so_far["position"] == "centre":
        values = ["none", "one", "two"]
    if name == "trees_side" and so_far.get("trees", "none") == "none":
        values = []
    if name == "trees_side" and so_far["ground"] == "lake":
        values = [value for value in values if value != "front"]
    return dict.fromkeys(values, 1.0)


def draw(canvas: Canvas, attributes: dict[str, str], rng: np.random.Generator) -> None:
    """Draw one castle; `rng` decides the geometry."""
    time, ground = attributes["time"], attributes["ground"]
    light = TIMES[time].light
    centre = _CENTRE[attributes["position"]] + rng.uniform(-1.5, 1.5)
    horizon = rng.uniform(42, 46)
    base = horizon + rng.uniform(4, 6) if ground != "lake" else horizon + rng.uniform(1.5, 2.5)
    reach = _REACH[COUNTS[attributes["towers"]]]
    beside = {"left": (0.5, centre - reach), "right": (centre + reach, 63.5)}
    low, high = beside[attributes["sun"]]
    behind_trees = ground == "forest" or attributes.get("trees_side") == attributes["sun"]
    draw_sky(canvas, time, horizon, rng, (low + 4.5, max(low + 5, high - 4.5)), behind_trees)
    _hills(canvas, attributes, horizon, rng)
    earth = jitter(lit(_GROUND[ground], light), rng, 5)
    bank = earth if ground != "lake" else jitter(lit((88, 132, 70), light), rng, 5)
    rough = 0.4 if ground == "snow" else 1.0
    grain = product(canvas.grain(3.5, 0.10 * rough, 2.5), canvas.grain(1.2, 0.08 * rough, 1.5))
    if ground != "lake":
        canvas.rectangle(0, horizon, 64, 64, earth, grain)
    mound = rng.uniform(19, 24)
    canvas.ellipse(centre, base + 5, mound, 6.5, bank, grain)
    if ground == "forest":
        _conifers(canvas, light, centre, horizon + 2, 6.5, 0.82, rng)
    _castle(canvas, attributes, centre, base, rng)
    if ground != "lake":
        _foreground(canvas, attributes, earth, base, centre, rng)
    count, side = COUNTS[attributes.get("trees", "none")], attributes.get("trees_side")
    if side == "front":
        plant_row(canvas, ground, count, (centre - 14, centre + 14), (61.5, 63.2), light, rng)
    elif side:
        feet = (base + 0.5, base + 0.5) if ground == "lake" else (base + 0.5, 62.5)
        plant_row(canvas, ground, count, beside[side], feet, light, rng)
    if ground == "lake":
        canvas.rectangle(0, base, 64, base + 0.8, lit(bank, (0.6, 0.6, 0.6)))
        canvas.mirror(base + 0.8, lit(_GROUND["lake"], light), 0.42, 0.5)


def _hills(canvas: Canvas, attributes: dict[str, str], horizon: float, rng: np.random.Generator) -> None:
    palette = TIMES[attributes["time"]]
    sharp = attributes["ground"] in ("snow", "forest", "lake")
    far = blend(palette.horizon, lit((96, 108, 140), palette.light), 0.62)
    xs = np.sort(rng.uniform(-4, 68, 5))
    heights = rng.uniform(3, 11, 5) if sharp else rng.uniform(2, 6, 5)
    if sharp:
        points = [(-4, horizon)]
        for x, height in zip(xs, heights, strict=True):
            points += [(x - height * 0.2, horizon - height), (x + 5, horizon - height * 0.3)]
        points.sort()
        canvas.polygon([*points, (70, horizon + 1), (-6, horizon + 1)], far)
    else:
        for x, height in zip(xs, heights, strict=True):
            canvas.ellipse(x, horizon + 2, 14, height + 2, far)


def _castle(canvas: Canvas, attributes: dict[str, str], centre: float, base: float, rng) -> None:
    light = TIMES[attributes["time"]].light
    stone = jitter(lit(_STONE[attributes["stone"]], light), rng, 5)
    window = TIMES[attributes["time"]].window
    count = COUNTS[attributes["towers"]]
    wall_height, wall_half = rng.uniform(11, 14), _WALL_HALF[count]
    masonry = canvas.masonry(2.6, 4.0, 0.10)
    wall = blend(stone, (0, 0, 0), 0.10)
    canvas.rectangle(centre - wall_half, base - wall_height, centre + wall_half, base, wall, masonry)
    _battlements(canvas, centre - wall_half, centre + wall_half, base - wall_height, wall)
    top = base - rng.uniform(22, 25)
    if count == 1:
        places = [(centre, rng.uniform(11, 12.5), top - 5)]
    elif count == 2:
        places = [(centre - wall_half, 8.6, top), (centre + wall_half, 8.6, top)]
    else:
        places = [
            (centre, 8.4, top - 6),
            (centre - wall_half, 7.4, top + 2),
            (centre + wall_half, 7.4, top + 2),
        ]
    for x, width, height in places:
        _tower(canvas, attributes, x, width, height, base, stone, window, masonry)
    gate = blend(stone, (20, 10, 10), 0.78)
    canvas.ellipse(centre, base - 5.2, 2.9, 3.2, gate)
    canvas.rectangle(centre - 2.9, base - 5.2, centre + 2.9, base, gate)


def _tower(canvas, attributes, x, width, top, base, stone: Colour, window: Colour, masonry) -> None:
    half = width / 2
    body = product(across(x - half, x + half, 1.10, 0.78), masonry)
    canvas.rectangle(x - half, top, x + half, base, stone, body)
    if attributes["roofs"] == "battlements":
        crown = half + 0.9
        canvas.rectangle(
            x - crown, top - 1.2, x + crown, top + 2.2, stone, across(x - crown, x + crown, 1.14, 0.82)
        )
        _battlements(canvas, x - crown, x + crown, top - 1.2, stone)
    else:
        light = TIMES[attributes["time"]].light
        colour = lit(_ROOF[attributes["roofs"]], tuple(0.25 + 0.75 * k for k in light))
        eave, tip = half + 1.6, top - width * 1.25
        shade = across(x - eave, x + eave, 1.18, 0.66)
        canvas.polygon([(x - eave, top + 0.6), (x + eave, top + 0.6), (x, tip)], colour, shade)
    for row in range(COUNTS[attributes["rows"]]):
        high = top + 5.0 + 5.9 * row
        canvas.ellipse(x, high, 1.4, 1.4, window)
        canvas.rectangle(x - 1.4, high, x + 1.4, high + 2.4, window)


def _battlements(canvas: Canvas, x0: float, x1: float, y: float, colour: Colour) -> None:
    count = max(3, round((x1 - x0) / 3.6))
    pitch = (x1 - x0) / (count - 0.45)
    for i in range(count):
        canvas.rectangle(x0 + i * pitch, y - 2.0, x0 + (i + 0.55) * pitch, y + 0.3, colour)


def _conifers(canvas, light, centre, foot, size, spread, rng) -> None:
    for _ in range(11):
        x = rng.uniform(0, 64)
        height = size * rng.uniform(0.8, 1.5)
        if abs(x - centre) < 15:
            continue
        colour = jitter(lit((38, 92, 56), light), rng, 6)
        half = height * 0.32 * spread / 0.82
        canvas.polygon([(x - half, foot), (x + half, foot), (x, foot - height * 1.5)], colour)


def _foreground(canvas: Canvas, attributes, earth, base, centre, rng) -> None:
    """What lies in front of the walls: path, trees, dunes, drifts."""
    light, ground = TIMES[attributes["time"]].light, attributes["ground"]
    lean = rng.uniform(-9, 9)
    path = blend(earth, lit((190, 160, 116), light), 0.6)
    if ground in ("meadow", "forest", "snow") and attributes.get("trees_side") != "front":
        if ground == "snow":
            path = blend(earth, lit((120, 140, 180), light), 0.45)
        points = [(centre - 2, base), (centre + 2, base), (centre + lean + 8, 64), (centre + lean - 5, 64)]
        canvas.polygon(points, path, canvas.grain(1.5, 0.08))
    if ground == "forest":
        for x in np.concatenate([rng.uniform(-2, centre - 13, 3), rng.uniform(centre + 13, 66, 3)]):
            height, foot = rng.uniform(13, 19), rng.uniform(56, 63)
            colour = jitter(lit((30, 84, 50), light), rng, 6)
            conifer(canvas, x, foot, height, colour, lit((84, 58, 40), light))
    elif ground == "desert":
        for y in (57.0, 62.0):
            x, dark = rng.uniform(8, 56), blend(earth, lit((170, 120, 70), light), 0.55)
            points = [(x - 30, y + 3), (x, y - 3), (x + 12, y - 1), (x + 36, y + 4)]
            canvas.polygon(points, dark, canvas.grain(3, 0.06, 4), detail=True)
