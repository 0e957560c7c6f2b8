"""The error of everything that is read or written, and how errors name things."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["CheckpointError", "NonFiniteError", "first_line", "listed"]


class CheckpointError(ValueError):
    """A model, file or checkpoint that can't be found, read, written, used or continued; the message names it
    and the reason."""


class NonFiniteError(ValueError):
    """NaN or an infinity where a number belongs; the message names what made it.

    Args:
        message: what is said.
        experts: one of which made it, if that is known.
    """

    def __init__(self, message: str, experts: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.experts = tuple(experts)


def listed(names: Collection[object]) -> str:
    """The first five of some names, and how many more there are."""
    shown = ", ".join(str(name) for name in list(names)[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def first_line(error: BaseException) -> str:
    """What an error says first: the messages of large libraries go on for pages."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
