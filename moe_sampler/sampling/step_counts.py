"""How many steps a run has, and how they are shared out among its experts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_sampler.kernels.shift import shift_sigma

from .._numbers import whole
from .experts import Expert
from .routers import PerStep, Router
from .spacing_names import listed_between

__all__ = ["MAX_STEPS", "read_steps", "span_counts", "steps_of"]

_DEFAULT_STEPS = 20
MAX_STEPS = 10_000
"""Ten times the timesteps that models are trained on: more steps than that are a slip of the hand."""


def read_steps(steps: Any) -> int | dict[str, int]:
    """Step counts, in all or by name, as ints.

    Raises:
        ValueError: one that isn't a whole number from 1 to `MAX_STEPS`.
    """
    if isinstance(steps, Mapping):
        return {name: whole(f"steps of {name}", count, MAX_STEPS) for name, count in steps.items()}
    return whole("steps", steps, MAX_STEPS)


def steps_of(
    steps: int | Mapping[str, int] | None, router: Router | PerStep, experts: Iterable[Expert]
) -> int | Mapping[str, int] | None:
    steps = None if steps is None else read_steps(steps)
    if isinstance(router, PerStep):
        whole("steps of the router", len(router.steps), MAX_STEPS)
        if steps is not None and steps != len(router.steps):
            raise ValueError(
                f"the router decides {len(router.steps)} steps one by one, but steps is {steps!r}: "
                "leave it out"
            )
        return len(router.steps)
    listed = any(isinstance(expert.levels, tuple) for expert in experts)
    return _DEFAULT_STEPS if steps is None and not listed else steps


def _allocate(spans: Sequence[tuple[str, float, float]], steps: int, shift: float) -> list[int]:
    """Share `steps` out to spans in proportion to their length on the shifted grid, at least one each."""
    if steps < len(spans):
        raise ValueError(
            f"{steps} steps cannot serve {len(spans)} spans of experts: use at least {len(spans)}"
        )
    u = [shift_sigma(high, 1.0 / shift) - shift_sigma(low, 1.0 / shift) for _, high, low in spans]
    exact = [steps * length / sum(u) for length in u]
    counts = [max(1, math.floor(share)) for share in exact]
    while sum(counts) < steps:
        counts[max(range(len(u)), key=lambda i: exact[i] - counts[i])] += 1
    while sum(counts) > steps:
        counts[max((i for i in range(len(u)) if counts[i] > 1), key=lambda i: counts[i] - exact[i])] -= 1
    return counts


def _counts_by_name(
    spans: Sequence[tuple[str, float, float]],
    steps: Mapping[str, int],
    known: Sequence[str],
    listed: Mapping[int, int],
) -> list[int]:
    for name in steps:
        if name not in known:
            raise ValueError(f"steps names {name!r}, but the experts are {', '.join(map(repr, known))}")
    counts = [listed.get(i, 0) for i in range(len(spans))]
    for name in {span[0] for span in spans}:
        own = [i for i, span in enumerate(spans) if span[0] == name]
        if own[0] in listed:
            _check_listed(sum(listed[i] for i in own), steps.get(name), f"steps of {name}")
            continue
        if name not in steps:
            raise ValueError(f"expert {name!r} leads a part of the run: say how many steps it gets")
        for i, count in zip(own, _allocate([spans[i] for i in own], steps[name], 1.0), strict=True):
            counts[i] = count
    return counts


def _check_listed(listed: int, given: int | None, what: str) -> None:
    if given not in (None, listed):
        raise ValueError(
            f"the listed levels make {listed} steps, but {what} is {given}: leave the number out, or list as "
            "many"
        )


def _listed_counts(
    experts: Mapping[str, Expert], spans: Sequence[tuple[str, float, float]]
) -> dict[int, int]:
    """How many steps the spans have whose expert lists its levels, by their number."""
    found = {}
    for i, (name, high, low) in enumerate(spans):
        levels = experts[name].levels
        if isinstance(levels, tuple):
            found[i] = len(listed_between(levels, high, low))
            if not found[i]:
                raise ValueError(
                    f"none of {name}'s levels lie between noise levels {high:g} and {low:g}, where it leads: "
                    "list one there, or hand over elsewhere"
                )
    return found


def span_counts(
    experts: Mapping[str, Expert],
    spans: Sequence[tuple[str, float, float]],
    steps: int | Mapping[str, int] | None,
) -> list[int]:
    """How many steps every span has."""
    listed = _listed_counts(experts, spans)
    if isinstance(steps, Mapping):
        return _counts_by_name(spans, steps, list(experts), listed)
    open_spans, taken = [i for i in range(len(spans)) if i not in listed], sum(listed.values())
    if not open_spans:
        _check_listed(taken, steps, "the number of steps")
        return [listed[i] for i in range(len(spans))]
    total = _DEFAULT_STEPS if steps is None else steps
    if listed and total - taken < len(open_spans):
        raise ValueError(
            f"the listed levels make {taken} of {total} steps, which leaves too few for the other experts: "
            f"use at least {taken + len(open_spans)}"
        )
    shifts = [e.shift for e in experts.values() if not e.path.discrete]
    shares = _allocate([spans[i] for i in open_spans], total - taken, max(shifts, default=1.0))
    found = listed | dict(zip(open_spans, shares, strict=True))
    return [found[i] for i in range(len(spans))]
