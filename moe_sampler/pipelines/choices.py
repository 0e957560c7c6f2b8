"""What some settings may be, by name. Plain data: a command's --help reads it without torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal, TypeVar, get_args

__all__ = [
    "CONVENTIONS",
    "DTYPES",
    "MAX_IMAGES",
    "MAX_PROMPT",
    "MAX_SIDE",
    "OFFLOADS",
    "OUTPUT_TYPES",
    "PICTURE_FORMATS",
    "SPEEDS",
    "Convention",
    "Offload",
    "Speed",
    "any_of",
    "check_choice",
    "conventions_help",
]

T = TypeVar("T")

Offload = Literal["none", "expert", "model"]
OFFLOADS: tuple[Offload, ...] = get_args(Offload)
Speed = Literal["none", "fast", "max"]
SPEEDS: tuple[Speed, ...] = get_args(Speed)
"""How far models are made faster: not at all; in what costs nothing beforehand; and compiled."""
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PICTURE_FORMATS = ("png", "jpg", "webp")
"""Of files that pictures of many prompts are written to."""
MAX_IMAGES = 10_000
"""Of one call, which holds the latents of them all."""
MAX_SIDE = 16_384
"""Of an image that is made, in pixels: attention's work grows with the fourth power of it."""
MAX_PROMPT = 100_000
"""Characters: a text encoder takes some hundred."""
DTYPES = ("float32", "float16", "bfloat16")
"""Number formats of models, as torch calls them."""

Convention = Literal["sample", "tiny-flux-v4"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
"""How the student's features are extracted from the experts."""
_MEANINGS: Mapping[Convention, str] = {
    "sample": "from the sample's own latent",
    "tiny-flux-v4": "from pure noise and reversed time, to continue upstream's checkpoints",
}


def conventions_help() -> str:
    """Each by name, with what it means."""
    return "; ".join(f"{name}: {_MEANINGS[name]}" for name in CONVENTIONS)


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
