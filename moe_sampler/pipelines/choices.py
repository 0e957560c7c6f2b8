"""What some settings may be, by name. Plain data: a command's --help reads it without torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal, TypeVar, get_args

__all__ = [
    "DTYPES",
    "MAX_IMAGES",
    "MAX_SIDE",
    "OFFLOADS",
    "OUTPUT_TYPES",
    "Offload",
    "any_of",
    "check_choice",
]

T = TypeVar("T")

Offload = Literal["none", "expert", "model"]
OFFLOADS: tuple[Offload, ...] = get_args(Offload)
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_IMAGES = 10_000
"""Of one call, which holds the latents of them all."""
MAX_SIDE = 16_384
"""Of an image that is made, in pixels: attention's work grows with the fourth power of it."""
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
