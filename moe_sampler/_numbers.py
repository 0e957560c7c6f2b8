"""Numbers as callers give them: Python's, NumPy's and single-element tensors; anything else is refused."""

from __future__ import annotations

import math
import numbers
from typing import Any

__all__ = ["number", "whole"]


def _plain(value: Any) -> Any:
    """A NumPy scalar or a 0-d array or tensor as the Python number it holds."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def number(what: str, value: Any) -> float:
    """A finite number as a float.

    Raises:
        ValueError: something else, a string that looks like a number too.
    """
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, numbers.Real):
        raise ValueError(f"{what} must be a finite number, got {value!r}")
    try:
        found = float(plain)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"{what} must be a finite number, got {value!r}")
    return found


def whole(what: str, value: Any, most: int, least: int = 1) -> int:
    """An integer from `least` to `most`.

    Raises:
        ValueError: something else, a float that is whole too.
    """
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, numbers.Integral) or not least <= int(plain) <= most:
        raise ValueError(f"{what} must be a whole number from {least} to {most}, got {value!r}")
    return int(plain)
