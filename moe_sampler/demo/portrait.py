"""The portrait: head, hair, shoulders and coat against a wall, balloons and a lamp beside the head."""

from __future__ import annotations

import numpy as np

from .drawing import COUNTS, Canvas, across, blend, jitter, product

ATTRIBUTES = {
    "hair": ("black", "brown", "blond", "red", "white"),
    "length": ("short", "long"),
    "skin": ("light", "brown", "dark"),
    "coat": ("red", "blue", "green", "yellow", "black", "white"),
    "extra": ("glasses", "hat", "scarf", "plain"),
    "background": ("blue", "green", "red", "grey", "golden"),
    "position": ("left", "centre", "right"),
    "balloons": ("none", "one", "two", "three"),
    "balloons_side": ("left", "right"),
    "lamp": ("none", "left", "right"),
}
LAYOUT = {"position": "place", "balloons": "count", "balloons_side": "relation", "lamp": "relation"}
_HAIR = {
    "black": (34, 28, 32),
    "brown": (112, 70, 42),
    "blond": (232, 192, 104),
    "red": (190, 78, 34),
    "white": (226, 224, 222),
}
_SKIN = {"light": (246, 208, 182), "brown": (198, 142, 102), "dark": (122, 80, 58)}
_COAT = {
    "red": (190, 44, 48),
    "blue": (48, 84, 172),
    "green": (46, 122, 76),
    "yellow": (232, 186, 54),
    "black": (48, 46, 54),
    "white": (232, 230, 224),
}
_WALL = {
    "blue": (112, 156, 204),
    "green": (124, 168, 132),
    "red": (176, 84, 82),
    "grey": (164, 164, 170),
    "golden": (220, 180, 104),
}
_BALLOON = {"red": (216, 48, 60), "blue": (52, 88, 214), "yellow": (250, 208, 56), "white": (246, 244, 240)}
_TOO_CLOSE = {"red": "red", "blue": "blue", "golden": "yellow", "grey": "white"}
"""Balloons that would be lost against the wall."""
_CENTRE = {"left": 21.0, "centre": 32.0, "right": 43.0}
_REACH = 15.8
"""How far head, hair and hat reach from the middle."""


def choices(name: str, so_far: dict[str, str]) -> dict[str, float]:
    """An attribute's possible values after those drawn before it, with their shares; none: no such thing."""
    values = ATTRIBUTES[name]
    if name == "balloons_side" and so_far["balloons"] == "none":
        values = []
    if name in ("balloons_side", "lamp"):
        # One thing on a side, and no room between a person at the edge and that edge.
        values = [value for value in values if value not in (so_far["position"], so_far.get("balloons_side"))]
    return dict.fromkeys(values, 1.0)


def draw(canvas: Canvas, attributes: dict[str, str], rng: np.random.Generator) -> None:
    """Draw one portrait; `rng` decides the geometry and where the light comes from."""
    x = _CENTRE[attributes["position"]] + rng.uniform(-1.5, 1.5)
    y = rng.uniform(26, 29)
    wide, tall = rng.uniform(9.0, 10.2), rng.uniform(11.6, 12.8)
    side = rng.choice((-1.0, 1.0))
    wall = jitter(_WALL[attributes["background"]], rng, 6)
    hair = jitter(_HAIR[attributes["hair"]], rng, 5)
    skin = jitter(_SKIN[attributes["skin"]], rng, 5)
    coat = jitter(_COAT[attributes["coat"]], rng, 5)

    vignette = product(across(32 - 40 * side, 32 + 40 * side, 0.80, 1.14), canvas.grain(7, 0.05))
    canvas.rectangle(0, 0, 64, 64, wall, vignette)
    beside = {"left": (0.5, x - _REACH), "right": (x + _REACH, 63.5)}
    if attributes["lamp"] != "none":
        _lamp(canvas, beside[attributes["lamp"]], rng)
    if "balloons_side" in attributes:
        _balloons(canvas, attributes, beside[attributes["balloons_side"]], x, rng)
    light = _light(x, wide, side)
    strands = product(_light(x, wide + 3, side), canvas.grain(6, 0.16, 0.18), canvas.grain(5, 0.10, 0.4))
    if attributes["length"] == "long":
        back = blend(hair, (0, 0, 0), 0.12)
        canvas.ellipse(x, y - 1, wide + 3.4, tall + 1.8, back, strands)
        hem = y + tall + rng.uniform(6, 9)
        points = [
            (x - wide - 3.4, y - 2),
            (x + wide + 3.4, y - 2),
            (x + wide + 4.6, hem),
            (x - wide - 4.6, hem),
        ]
        canvas.polygon(points, back, strands)
    _body(canvas, attributes, x, y + tall, coat, skin, side, rng)
    _head(canvas, attributes, x, y, wide, tall, skin, hair, light, strands)
    _face(canvas, attributes, x, y, wide, tall, skin, hair, side)


def _lamp(canvas: Canvas, span: tuple[float, float], rng) -> None:
    """Hangs from the ceiling somewhere in `span`."""
    x, y = rng.uniform(span[0] + 6.2, span[1] - 6.2), rng.uniform(8, 15)
    canvas.line([(x, 0), (x, y)], 0.9, (44, 38, 40), detail=False)
    canvas.glow(x, y + 8, 11, (255, 240, 180), 0.7)
    canvas.ellipse(x, y + 7.6, 2.7, 2.5, (255, 250, 222))
    shade = across(x - 6, x + 6, 1.25, 0.8)
    canvas.polygon([(x - 1.9, y), (x + 1.9, y), (x + 6.0, y + 7.4), (x - 6.0, y + 7.4)], (34, 84, 80), shade)


def _balloons(canvas: Canvas, attributes, span: tuple[float, float], person: float, rng) -> None:
    """All of one colour, in `span`; their strings meet behind the person's shoulder."""
    lost = _TOO_CLOSE.get(attributes["background"])
    colour = jitter(_BALLOON[str(rng.choice([name for name in _BALLOON if name != lost]))], rng, 5)
    count = COUNTS[attributes["balloons"]]
    left, right = span[0] + 3.6, span[1] - 3.6
    middle = rng.uniform(left + 3.6, right - 3.6) if right - left > 7.2 else (left + right) / 2
    sides = np.array([-1, 1, -1])[:count] * rng.choice((-1.0, 1.0))
    y = rng.uniform(8, 11) + np.arange(count) * (11.0 if count == 2 else 9.4)
    if count == 1:
        y, sides = rng.uniform(10, 24, 1), np.zeros(1)
    dark = blend(colour, (20, 10, 20), 0.45)
    places = [(middle + side * 3.4, height) for side, height in zip(sides, y, strict=True)]
    hand = person + (14 if middle > person else -14)
    for x, height in places:
        canvas.line([(x, height + 4), (0.4 * middle + 0.6 * hand, 44), (hand, 54)], 0.5, (70, 62, 66))
    for x, height in places:
        canvas.polygon([(x - 1.1, height + 5.4), (x + 1.1, height + 5.4), (x, height + 4)], dark)
        canvas.ellipse(x, height, 3.5, 4.3, colour, across(x - 3.5, x + 3.5, 1.1, 0.82))
        canvas.ellipse(x - 1.2, height - 1.7, 0.8, 1.1, blend(colour, (255, 255, 255), 0.65), detail=True)


def _light(x: float, half: float, side: float):
    return across(x + side * half, x - side * half, 1.10, 0.80)


def _body(canvas, attributes, x, chin, coat, skin, side, rng) -> None:
    """Neck, shoulders, coat with lapels, and the scarf when there is one. `chin`: y of the chin."""
    width = rng.uniform(19, 22)
    top = chin + 3.2
    folds = product(across(x + side * width, x - side * width, 1.14, 0.74), canvas.grain(5, 0.09, 0.45))
    canvas.ellipse(x, top + 9, width, 9.5, coat, folds)
    canvas.polygon(
        [(x - width, top + 9), (x + width, top + 9), (x + width + 2, 66), (x - width - 2, 66)], coat, folds
    )
    neck = blend(skin, (60, 20, 10), 0.22)
    canvas.rectangle(x - 4, chin - 4, x + 4, top + 1.5, neck)
    canvas.polygon([(x - 5, top - 0.5), (x + 5, top - 0.5), (x, top + 7.5)], neck)
    shirt = (244, 242, 236) if attributes["coat"] != "white" else (104, 122, 150)
    canvas.polygon([(x - 3.4, top + 2.8), (x + 3.4, top + 2.8), (x, top + 9.5)], shirt)
    lapel = blend(coat, (0, 0, 0), 0.30)
    for s in (-1, 1):
        points = [(x + s * 4.6, top - 1), (x + s * 7.8, top + 1.6), (x + s * 5.2, top + 7.4), (x, top + 11)]
        canvas.polygon(points, lapel, detail=True)
    canvas.line([(x, top + 10.5), (x, 66)], 0.9, lapel)
    for y in (top + 14.5, top + 19.5):
        canvas.ellipse(x + 2.0, y, 0.8, 0.8, blend(lapel, (255, 240, 200), 0.55), detail=True)
    if attributes["extra"] == "scarf":
        colour = (206, 60, 84) if attributes["coat"] not in ("red",) else (64, 110, 186)
        stripes = lambda px, py: 1 - 0.32 * (((px + 0.6 * py) / 3.0) % 1 < 0.4)  # noqa: E731
        canvas.ellipse(x, top + 0.6, 8.4, 3.7, colour, stripes)
        canvas.polygon(
            [(x + 2, top + 1), (x + 6.4, top + 1), (x + 7.6, top + 14), (x + 3.2, top + 14)], colour, stripes
        )


def _head(canvas, attributes, x, y, wide, tall, skin, hair, light, strands) -> None:
    """Ears, head oval, and hair or hat on top of it."""
    for s in (-1, 1):
        canvas.ellipse(x + s * wide, y + 1.2, 1.7, 2.8, blend(skin, (120, 40, 20), 0.15))
    if attributes["length"] == "short":
        canvas.ellipse(x, y - 3.6, wide + 1.7, tall - 1.6, hair, strands)
    canvas.ellipse(x, y, wide, tall, skin, light)
    # The hair line: a cap over the forehead, cut out by the oval of the face.
    cap = [
        (x + (wide + 1.6) * np.cos(a), y - 2.2 + (tall - 0.4) * np.sin(a))
        for a in np.linspace(np.pi, 2 * np.pi, 24)
    ]
    if attributes["length"] == "long":
        inner = [
            (x + 8.0, y - 1.5),
            (x + 5.5, y - 6.6),
            (x - 1.5, y - 8.4),
            (x - 6.8, y - 4.8),
            (x - 8.0, y - 1.5),
        ]
    else:
        inner = [
            (x + 8.6, y - 3.4),
            (x + 6.8, y - 7.2),
            (x + 1.0, y - 6.4),
            (x - 4.0, y - 8.4),
            (x - 8.6, y - 3.4),
        ]
    canvas.polygon([*cap, *inner], hair, strands)
    if attributes["extra"] == "hat":
        felt = (62, 54, 70) if attributes["hair"] not in ("black",) else (150, 112, 76)
        band = (206, 70, 62)
        shade = across(x - wide, x + wide, 1.15, 0.78)
        points = [(x - 8.2, y - 7), (x - 7.2, y - 16.5), (x + 7.2, y - 16.5), (x + 8.2, y - 7)]
        canvas.polygon(points, felt, shade)
        canvas.rectangle(x - 8.2, y - 9.8, x + 8.2, y - 7.4, band)
        canvas.ellipse(x, y - 7, wide + 5.4, 2.1, felt, shade)


def _face(canvas, attributes, x, y, wide, tall, skin, hair, side) -> None:
    """Eyes, brows, nose, mouth, cheeks: the full picture only."""
    dark = blend(skin, (50, 14, 10), 0.62)
    for s in (-1, 1):
        ex = x + s * 4.0
        canvas.ellipse(ex, y - 0.4, 2.1, 1.35, (248, 246, 242), detail=True)
        canvas.ellipse(ex, y - 0.3, 1.15, 1.3, (44, 34, 36), detail=True)
        canvas.line([(ex - 2.2, y - 1.3), (ex, y - 2.0), (ex + 2.2, y - 1.3)], 0.6, dark)
        brow = blend(hair, (40, 20, 16), 0.35)
        canvas.line([(ex - 2.3, y - 3.7), (ex + s * 0.4, y - 4.5), (ex + 2.3, y - 3.7)], 1.0, brow)
        canvas.glow(x + s * 5.6, y + 4.0, 3.2, (226, 96, 84), 0.34)
    canvas.line([(x - side * 0.5, y - 0.2), (x - side * 1.5, y + 3.6), (x + side * 0.6, y + 4.0)], 0.75, dark)
    lips = blend((196, 72, 78), skin, 0.25)
    canvas.ellipse(x, y + 7.2, 3.1, 1.15, lips, detail=True)
    canvas.line([(x - 3.1, y + 7.0), (x, y + 7.4), (x + 3.1, y + 7.0)], 0.5, blend(lips, (40, 0, 0), 0.6))
    if attributes["extra"] == "glasses":
        frame = (34, 30, 40)
        for s in (-1, 1):
            ring = [
                (x + s * 4.1 + 3.3 * np.cos(a), y - 0.3 + 2.9 * np.sin(a))
                for a in np.linspace(0, 2 * np.pi, 20)
            ]
            canvas.line(ring, 0.75, frame)
            canvas.line([(x + s * 7.3, y - 0.8), (x + s * wide, y - 1.2)], 0.8, frame)
        canvas.line([(x - 1, y - 0.8), (x + 1, y - 0.8)], 0.9, frame)
