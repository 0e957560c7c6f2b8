"""What some settings may be, by name. Plain data: a command's --help reads it without torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal, TypeVar, get_args

__all__ = ["DTYPES", "OFFLOADS", "OUTPUT_TYPES", "Offload", "any_of", "check_choice"]

T = TypeVar("T")

Offload = Literal["none", "expert", "model"]
OFFLOADS: tuple[Offload, ...] = get_args(Offload)
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DTYPES = ("float32", "float16", "bfloat16")
"""Number formats of models, as torch calls them."""


def any_of(names: Iterable[object]) -> str:
    """'a, b or c'."""
    *others, last = map(str, names)
    return f"{', '.join(others)} or {last}" if others else last


def check_choice(what: str, value: object, choices: Collection[T]) -> T:
    """The value, or a ValueError with the choices, unless it is one of them."""
    for choice in choices:
        if choice == value:
            return choice
    raise ValueError(f'unknown {what} "{value}": use {any_of(choices)}')
