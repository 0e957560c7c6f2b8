"""What an expert's levels may be: a spacing by name, or noise levels. Plain Python, for --help."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from .._numbers import number

__all__ = ["SPACING_NAMES", "Levels", "listed_between", "read_levels"]

SPACING_NAMES = ("timestep", "uniform", "karras", "exponential", "beta", "cosine", "align_your_steps")

Levels = str | tuple[float, ...] | None
"""A spacing by name, the noise levels themselves from noise to data, or the path's own."""


def read_levels(what: str, given: Any) -> Levels:
    """An expert's levels, checked.

    Raises:
        ValueError: an unknown name, or noise levels that don't go down from 1 to above 0.
    """
    if given is None:
        return None
    if isinstance(given, str):
        if given not in SPACING_NAMES:
            raise ValueError(
                f'{what}: unknown spacing "{given}": use one of {", ".join(SPACING_NAMES)}, or a list of '
                "noise levels"
            )
        return given
    if not isinstance(given, Iterable):
        raise ValueError(f"{what} is a spacing's name or a list of noise levels, got {given!r}")
    levels = tuple(number(f"{what}: a noise level", level) for level in given)
    if (
        not levels
        or not all(0.0 < b < a for a, b in itertools.pairwise([math.inf, *levels]))
        or levels[0] > 1
    ):
        raise ValueError(
            f"{what} lists noise levels from noise to data, descending, at most 1 and above 0, got {given!r}"
        )
    return levels


def listed_between(levels: Sequence[float], high: float, low: float) -> list[float]:
    """Those of an expert's listed levels that lie in its part of a run."""
    return [level for level in levels if low < level <= high]
