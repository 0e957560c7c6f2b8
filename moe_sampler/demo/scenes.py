"""The demo's world: castles, portraits and city streets, described by attributes, drawn and captioned.

A `Scene` is its kind, its attributes and a seed; everything about its picture follows from these. The same
drawing routine makes the full picture and the structure-only one (flat masses, no texture), so both share
their geometry exactly.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from . import castle, portrait, street
from .drawing import Canvas

KINDS = {"castle": castle, "portrait": portrait, "street": street}
_TRIES = 1000


@dataclass(frozen=True)
class Scene:
    """One scene.

    `values` are (attribute, value) pairs in the order of the kind's ATTRIBUTES; what the scene can't have, as
    a side of trees where there are none, is not among them.
    """

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
        ValueError: for a kind, attribute or value that does not exist, or for values that exclude each other.
    """
    rng = np.random.default_rng([seed, 0])
    drawn = str(rng.choice(list(KINDS)))
    kind = kind or drawn
    if kind not in KINDS:
        raise ValueError(f'unknown kind of scene "{kind}": use one of {", ".join(KINDS)}')
    for name, value in fixed.items():
        if value not in KINDS[kind].ATTRIBUTES.get(name, ()):
            raise ValueError(f'a {kind} has no attribute {name}="{value}"')
    for _ in range(_TRIES):
        values = _draw_values(kind, rng, fixed)
        if fixed.items() <= values.items():
            return Scene(kind, tuple(values.items()), seed)
    together = ", ".join(f'{name}="{value}"' for name, value in fixed.items())
    raise ValueError(f"a {kind} can't have these together: {together}")


def _draw_values(kind: str, rng: np.random.Generator, fixed: Mapping[str, str]) -> dict[str, str]:
    """Values for a kind's attributes in their order; those in `fixed` where the ones before them allow it."""
    values: dict[str, str] = {}
    for name in KINDS[kind].ATTRIBUTES:
        shares = KINDS[kind].choices(name, values)
        if fixed.get(name) in shares:
            values[name] = fixed[name]
        elif shares:
            values[name] = _pick(shares, rng.uniform())
    return values


def _pick(shares: Mapping[str, float], point: float) -> str:
    """The value at `point`, 0..1, of all shares end to end."""
    bounds = list(accumulate(shares.values()))
    return list(shares)[bisect_right(bounds, point * bounds[-1])]


def render(scene: Scene, structure: bool = False) -> np.ndarray:
    """Draw a scene.

    Returns:
        uint8 [64, 64, 3]: the full picture, or with `structure` its flat masses.
    """
    canvas = Canvas(flat=structure, rng=np.random.default_rng([scene.seed, 1]))
    KINDS[scene.kind].draw(canvas, scene.attributes, np.random.default_rng([scene.seed, 2]))
    return canvas.image()
