"""Routers: which expert is at work, decided by noise level so that it stays right under any shift or count.

A router is any callable from a share of noise (`Level.noise`: 1 at pure noise, 0 at data) to a mapping from
expert name to weight; the weights at a level add up to 1 and at most four are non-zero. It is consulted while
planning, so it costs nothing in the sampling loop. `PerStep` is the exception for who wants to decide step by
step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moe_sampler.kernels.rows import MOST_EXPERTS

from .._numbers import number
from .paths import FlowPath

__all__ = [
    "Boundary",
    "Crossfade",
    "PerStep",
    "Router",
    "Spans",
    "active_experts",
    "inner_level",
    "lead_spans",
]

_SCAN = 4096  # spans narrower than 1 / _SCAN of the noise axis are not resolved


class Router(Protocol):
    """Implement this, or pass a function, to bring your own.

    It must always give the same answer at the same level: the planner asks at many levels to find where the
    leading expert changes, and asks again at every node. A router that knows its levels may say so: with an
    attribute `knots`, levels between which the leading expert changes at most once, it is asked there alone.
    """

    def __call__(self, noise: float) -> Mapping[str, float]:
        """Weights of the experts at a share of noise in [0, 1]."""
        ...


def inner_level(name: str, value: Any) -> float:
    """A noise level between data and noise.

    Raises:
        ValueError: something else.
    """
    level = number(name, value)
    if not 0.0 < level < 1.0:
        raise ValueError(f"{name} is a noise level strictly between 0 (data) and 1 (noise), got {value}")
    return level


@dataclass(frozen=True)
class Boundary:
    """`first` above the noise level `at`, `then` from it on: Wan 2.2's `boundary_ratio`, in noise level."""

    first: str
    then: str
    at: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", inner_level("the handoff", self.at))

    @property
    def knots(self) -> tuple[float, ...]:
        return (self.at,)

    def __call__(self, noise: float) -> Mapping[str, float]:
        return {self.first if noise > self.at else self.then: 1.0}


@dataclass(frozen=True)
class Crossfade:
    """Both experts between the noise levels `start` and `end`, with a smoothstep over ln(alpha / sigma)."""

    first: str
    then: str
    start: float
    end: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", inner_level("a crossfade's start", self.start))
        object.__setattr__(self, "end", inner_level("a crossfade's end", self.end))
        if self.end >= self.start:
            raise ValueError(
                f"a crossfade runs from noise to data: its end {self.end} must be below {self.start}"
            )

    @property
    def knots(self) -> tuple[float, ...]:
        return (self.start, self.end)

    def __call__(self, noise: float) -> Mapping[str, float]:
        if noise >= self.start:
            return {self.first: 1.0}
        if noise <= self.end:
            return {self.then: 1.0}
        here, start, end = (FlowPath().at(s).half_log_snr for s in (noise, self.start, self.end))
        u = (here - start) / (end - start)
        weight = u * u * (3.0 - 2.0 * u)
        return {self.first: 1.0 - weight, self.then: weight}


@dataclass(frozen=True)
class Spans:
    """Explicit spans from noise to data: `Spans((("sol", 0.7), ("sd15", 0.4), ("lune", 0.0)))` gives each
    expert's name and the noise level its span ends at."""

    spans: Sequence[tuple[str, float]]

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "spans", tuple((name, number("a span's end", end)) for name, end in self.spans)
        )
        ends = [end for _, end in self.spans]
        if not ends or ends[-1] != 0.0:
            raise ValueError("the last span must end at noise level 0 (data)")
        if any(later >= earlier for earlier, later in zip([1.0, *ends[:-1]], ends, strict=True)):
            raise ValueError(f"spans run from noise (1) to data (0), each ending below the last: got {ends}")

    @property
    def knots(self) -> tuple[float, ...]:
        return tuple(end for _, end in self.spans)

    def __call__(self, noise: float) -> Mapping[str, float]:
        for name, end in self.spans:
            if noise > end:
                return {name: 1.0}
        return {self.spans[-1][0]: 1.0}


@dataclass(frozen=True)
class PerStep:
    """Who works at each step, listed: `PerStep(["sol", "sol", {"sol": 0.5, "lune": 0.5}, "lune"])`.

    The list is as long as the run: `plan` takes its step count from it, and accepts `steps` only if it is
    that number. Where the steps lie: on the grid that the flow expert with the largest shift (without one,
    the first expert) would have alone with that many steps, except that every stretch led by one expert is
    spaced by that expert, on its integer timesteps if it has such. So `PerStep(["sol"] * 4 + ["lune"] * 8)`
    is a `Boundary` at the fifth of twelve nodes with `steps={"sol": 4, "lune": 8}`. A fixed list moves the
    boundaries' noise levels with the shift and the count, which a router by noise level does not.

    It isn't called with noise levels and so is no `Router`; `plan` takes either.
    """

    steps: Sequence[str | Mapping[str, float]]

    def __post_init__(self) -> None:
        if isinstance(self.steps, str) or not self.steps:
            raise ValueError(f"a router per step lists at least one step, got {self.steps!r}")
        steps = []
        for index, step in enumerate(self.steps):
            if not isinstance(step, str | Mapping):
                raise ValueError(
                    f"a router per step lists an expert's name or a mapping from names to weights, "
                    f"got {step!r} at step {index}"
                )
            steps.append({step: 1.0} if isinstance(step, str) else dict(step))
        object.__setattr__(self, "steps", tuple(steps))

    def weights(self, known: Sequence[str]) -> list[dict[str, float]]:
        """The non-zero weights of every step, checked, in `known`'s order."""
        return [_active(weights, f"step {index}", known) for index, weights in enumerate(self.steps)]


def _active(weights: str | Mapping[str, float], where: str, known: Sequence[str]) -> dict[str, float]:
    if not isinstance(weights, Mapping):
        raise ValueError(f"a router gives a mapping from expert names to weights, got {weights!r} at {where}")
    weights = {name: number(f"{name}'s weight at {where}", weight) for name, weight in weights.items()}
    unknown = [name for name in weights if name not in known]
    if unknown:
        raise ValueError(
            f"the router names {unknown[0]!r}, but the experts are {', '.join(map(repr, known))}"
        )
    if any(not weight >= 0 for weight in weights.values()) or not abs(sum(weights.values()) - 1.0) <= 1e-6:
        raise ValueError(
            f"a router's weights are non-negative and add up to 1, got {dict(weights)} at {where}"
        )
    active = {name: float(weights[name]) for name in known if weights.get(name, 0.0) > 0.0}
    if len(active) > MOST_EXPERTS:
        raise ValueError(
            f"at most {MOST_EXPERTS} experts can be at work at once, got {', '.join(active)} at {where}"
        )
    return active


def active_experts(router: Router, noise: float, known: Sequence[str]) -> dict[str, float]:
    """The non-zero weights at a noise level, checked, in `known`'s order.

    Raises:
        ValueError: no mapping, unknown names, negative weights, a sum other than 1, more than four experts
            at once.
    """
    return _active(router(noise), f"noise level {noise:.4f}", known)


def lead_expert(weights: Mapping[str, float]) -> str:
    return max(weights, key=weights.__getitem__)


def lead_spans(
    router: Router, known: Sequence[str], start: float = 1.0, end: float = 0.0
) -> list[tuple[str, float, float]]:
    """Cut [end, start] where the leading expert changes: (name, from, to) from noise to data.

    A cut is the largest noise level at which the new expert leads, found by bisection to the last bit, so
    that a `Boundary` is met exactly whatever the router is made of.
    """

    def lead(noise: float) -> str:
        return lead_expert(active_experts(router, noise, known))

    # Where the range ends nobody predicts any more: a change exactly there is no span.
    knots = getattr(router, "knots", None)
    if knots is not None:
        levels = [*knots, math.nextafter(end, start)]
    else:
        levels = [start + (end - start) * i / _SCAN for i in range(1, _SCAN)]
    spans, above, opened = [], start, start
    current = lead(start)
    for below in sorted((level for level in levels if end < level < start), reverse=True):
        following = lead(below)
        if following != current:
            high, low = above, below
            while low < (middle := 0.5 * (high + low)) < high:
                high, low = (middle, low) if lead(middle) == current else (high, middle)
            spans.append((current, opened, low))
            current, opened = lead(low), low
        above = below
    return [*spans, (current, opened, end)]
