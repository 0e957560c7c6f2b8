"""Routers in words, as --router takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .by_name import number, whole

if TYPE_CHECKING:
    from ..sampling.routers import PerStep, Router

__all__ = ["EXAMPLES", "parse_router"]


def _crossfade(words: Sequence[str], names: Sequence[str]) -> Router | None:
    from ..sampling.routers import Crossfade

    fits = len(words) == 2 and len(names) > 1
    return Crossfade(names[0], names[1], *map(number, words)) if fits else None


def _spans(words: Sequence[str], names: Sequence[str]) -> Router | None:
    from ..sampling.routers import PerStep, Spans

    if not words or len(words) % 2:
        return None
    PerStep(words[::2]).weights(names)  # are these its experts?
    return Spans(tuple(zip(words[::2], map(number, words[1::2]), strict=True)))


def _steps(words: Sequence[str], names: Sequence[str]) -> PerStep | None:
    from ..sampling.routers import PerStep

    if not words or len(words) % 2:
        return None
    steps: list[dict[str, float]] = []
    for who, count in zip(words[::2], words[1::2], strict=True):
        together = who.split("+")
        steps += [{name: 1.0 / len(together) for name in together}] * whole(count)
    router = PerStep(steps)
    router.weights(names)
    return router


_KINDS = {
    "crossfade": (_crossfade, "START END", "0.95 0.8"),
    "spans": (_spans, "NAME END NAME END ...", "sol 0.9 lune 0"),
    "steps": (_steps, "NAME COUNT NAME COUNT ...", "sol 4 lune 8"),
}
"""By its first word: what reads the others, what they are, and an example."""

EXAMPLES = tuple(f'"{kind} {example}"' for kind, (_, _, example) in _KINDS.items())


def parse_router(text: str, names: Sequence[str]) -> Router | PerStep:
    """A router from its description in words.

    Args:
        text: "crossfade START END", between the first two experts; "spans NAME END ...", from noise to data;
            or "steps NAME COUNT ...", where NAME may be two names joined by + that share a step equally.
        names: of the experts.

    Raises:
        ValueError: anything else.
    """
    kind, *words = text.split() or [""]
    try:
        router = _KINDS[kind][0](words, names) if kind in _KINDS else None
    except ValueError as error:
        raise ValueError(f'--router "{text}": {error}') from None
    if router is None:
        forms = (f'"{kind} {words}"' for kind, (_, words, _) in _KINDS.items())
        raise ValueError(f'--router "{text}": use one of {", ".join(forms)}')
    return router
