"""The demo's world: castles, portraits and city streets, described by attributes, drawn and captioned.

A `Scene` is its kind, its attributes and a seed; everything about its picture follows from these. The same
drawing routine makes the full picture and the structure-only one (flat masses, no texture), so both share
their geometry exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from . import castle, portrait, street
from .drawing import Canvas

KINDS = {"castle": castle, "portrait": portrait, "street": street}


@dataclass(frozen=True)
class Scene:
    """One scene. `values` are (attribute, value) pairs in the order of the kind's ATTRIBUTES."""

    kind: str
    values: tuple[tuple[str, str], ...]
    seed: int

    @cached_property
    def attributes(self) -> dict[str, str]:
        return dict(self.values)


def draw_scene(seed: int, kind: str | None = None, **fixed: str) -> Scene:
    """A random scene; the same seed always gives the same one.

    Args:
        seed: any non-negative integer.
        kind: "castle", "portrait" or "street"; random when None.
        fixed: attributes to set instead of drawing them.

    Raises:
        ValueError: for a kind, attribute or value that does not exist.
    """
    rng = np.random.default_rng([seed, 0])
    drawn = str(rng.choice(list(KINDS)))
    kind = kind or drawn
    if kind not in KINDS:
        raise ValueError(f'unknown kind of scene "{kind}": use one of {", ".join(KINDS)}')
    table = KINDS[kind].ATTRIBUTES
    for name, value in fixed.items():
        if value not in table.get(name, ()):
            raise ValueError(f'a {kind} has no attribute {name}="{value}"')
    values = []
    for name, choices in table.items():
        value = str(rng.choice(choices))
        if name == "windows" and "windows" not in fixed:
            # Lit windows belong to the dark hours.
            share = {"day": 0.0, "dawn": 0.25, "dusk": 0.8, "night": 0.9}[dict(values)["time"]]
            value = "lit" if rng.uniform() < share else "dark"
        values.append((name, fixed.get(name, value)))
    return Scene(kind, tuple(values), seed)


def render(scene: Scene, structure: bool = False) -> np.ndarray:
    """Draw a scene.

    Returns:
        uint8 [64, 64, 3]: the full picture, or with `structure` its flat masses.
    """
    canvas = Canvas(flat=structure, rng=np.random.default_rng([scene.seed, 1]))
    KINDS[scene.kind].draw(canvas, scene.attributes, np.random.default_rng([scene.seed, 2]))
    return canvas.image()
