"""The castle: towers, walls, roofs, horizon and ground."""

from __future__ import annotations

import numpy as np

from .drawing import Canvas, Colour, across, blend, jitter, lit, product
from .sky import TIMES, draw_sky

ATTRIBUTES = {
    "time": ("day", "dusk", "night", "dawn"),
    "towers": ("one", "two", "three"),
    "roofs": ("red", "blue", "green", "golden", "battlements"),
    "stone": ("grey", "white", "brown"),
    "ground": ("meadow", "lake", "desert", "snow", "forest"),
    "position": ("left", "centre", "right"),
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


def draw(canvas: Canvas, attributes: dict[str, str], rng: np.random.Generator) -> None:
    """Draw one castle; `rng` decides the geometry."""
    time, ground = attributes["time"], attributes["ground"]
    light = TIMES[time].light
    centre = _CENTRE[attributes["position"]] + rng.uniform(-1.5, 1.5)
    horizon = rng.uniform(42, 46)
    base = horizon + rng.uniform(4, 6) if ground != "lake" else horizon + rng.uniform(1.5, 2.5)
    draw_sky(canvas, time, horizon, rng, (centre - 17, centre + 17))
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
    if ground == "lake":
        canvas.rectangle(0, base, 64, base + 0.8, lit(bank, (0.6, 0.6, 0.6)))
        canvas.mirror(base + 0.8, lit(_GROUND["lake"], light), 0.42, 0.5)
    else:
        _foreground(canvas, attributes, earth, base, centre, rng)


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
    count = {"one": 1, "two": 2, "three": 3}[attributes["towers"]]
    wall_height, wall_half = rng.uniform(11, 14), {1: 13.0, 2: 11.5, 3: 12.5}[count]
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
    if count == 2:
        for dx in (-5.2, 5.2):
            canvas.rectangle(
                centre + dx - 0.9, base - 9.4, centre + dx + 0.9, base - 6.6, window, detail=True
            )


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
    high = top + 6.2
    canvas.ellipse(x, high - 1.2, 1.15, 1.2, window, detail=True)
    canvas.rectangle(x - 1.15, high - 1.2, x + 1.15, high + 2.0, window, detail=True)


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
    if ground in ("meadow", "forest", "snow"):
        if ground == "snow":
            path = blend(earth, lit((120, 140, 180), light), 0.45)
        points = [(centre - 2, base), (centre + 2, base), (centre + lean + 8, 64), (centre + lean - 5, 64)]
        canvas.polygon(points, path, canvas.grain(1.5, 0.08))
    if ground == "forest":
        for x in np.concatenate([rng.uniform(-2, centre - 13, 3), rng.uniform(centre + 13, 66, 3)]):
            height = rng.uniform(13, 19)
            foot = rng.uniform(56, 63)
            colour = jitter(lit((30, 84, 50), light), rng, 6)
            canvas.rectangle(x - 0.8, foot - 2, x + 0.8, foot + 2, lit((84, 58, 40), light))
            for level in range(3):
                half, low = 4.6 - level * 1.1, foot - level * height * 0.25
                points = [(x - half, low), (x + half, low), (x, low - height * 0.48)]
                canvas.polygon(points, colour, across(x - half, x + half, 1.25, 0.7))
    elif ground == "meadow":
        for x in (rng.uniform(1, 8), rng.uniform(56, 63)):
            if abs(x - centre) < 19:
                continue
            foot, radius = rng.uniform(50, 56), rng.uniform(4, 5.5)
            canvas.rectangle(x - 0.9, foot - 5, x + 0.9, foot, lit((98, 68, 44), light))
            colour = jitter(lit((66, 136, 58), light), rng, 6)
            canvas.ellipse(x, foot - 4 - radius, radius, radius, colour, canvas.grain(1.4, 0.22))
    elif ground == "desert":
        for y in (57.0, 62.0):
            x, dark = rng.uniform(8, 56), blend(earth, lit((170, 120, 70), light), 0.55)
            points = [(x - 30, y + 3), (x, y - 3), (x + 12, y - 1), (x + 36, y + 4)]
            canvas.polygon(points, dark, canvas.grain(3, 0.06, 4), detail=True)
        x = rng.uniform(5, 12) if centre > 32 else rng.uniform(52, 59)
        if abs(x - centre) > 17:
            green = lit((62, 128, 66), light)
            canvas.line([(x, 54), (x, 45)], 2.2, green, detail=False)
            canvas.line([(x - 3, 47), (x - 3, 50), (x + 3, 50), (x + 3, 46)], 1.5, green, detail=False)
    elif ground == "snow":
        for x in (rng.uniform(1, 9), rng.uniform(55, 63)):
            if abs(x - centre) < 18:
                continue
            foot = rng.uniform(52, 58)
            colour = jitter(lit((54, 100, 84), light), rng, 5)
            canvas.polygon(
                [(x - 4, foot), (x + 4, foot), (x, foot - 13)], colour, across(x - 4, x + 4, 1.25, 0.7)
            )
