"""Plans whose steps are listed, as diffusers' `timesteps` and `sigmas` list them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from moe_sampler.kernels.shift import shift_sigma

from ..sampling.experts import Expert
from ..sampling.plan import SamplingPlan
from ..sampling.planner import plan
from ..sampling.routers import PerStep

__all__ = ["Schedule", "scheduled_plan"]

Schedule = Sequence[float] | Mapping[str, Sequence[float]]


def scheduled_plan(
    experts: Sequence[Expert],
    timesteps: Schedule | None,
    sigmas: Schedule | None,
    *,
    expert: str = "hybrid",
    **route: Any,
) -> SamplingPlan:
    """The plan of these steps, from noise to data. It begins with noise, wherever its first step is, as in
    diffusers.

    Args:
        experts: from noise to data.
        timesteps: of a discrete-time expert, whole numbers, descending; a list of the one expert, or by name.
        sigmas: of a flow expert, in (0, 1], descending, shifted by the expert's shift as diffusers'
            FlowMatchEulerDiscreteScheduler shifts them; a list of the one expert, or by name.
        expert: "hybrid", or the one that works alone.
        route: what a schedule decides, None where it wasn't given.

    Raises:
        ValueError: other settings of the steps beside them, an expert without steps or with steps of the
            other kind, or steps that don't descend.
    """
    decided = [name for name, value in route.items() if value is not None]
    if decided:
        raise ValueError(f"timesteps and sigmas list the steps: leave out {', '.join(decided)}")
    names = [e.name for e in experts]
    if expert not in ("hybrid", *names):
        raise ValueError(f'unknown expert "{expert}": use hybrid, {" or ".join(names)}')
    working = [e for e in experts if expert in ("hybrid", e.name)]
    levels: dict[str, list[float]] = {}
    for what, given in (("timesteps", timesteps), ("sigmas", sigmas)):
        for name, own in _named(what, given, working).items():
            if name in levels:
                raise ValueError(f"give either timesteps or sigmas of {name}, not both")
            levels[name] = _levels(what, own, next(e for e in working if e.name == name))
    absent = [e.name for e in working if e.name not in levels]
    if absent:
        raise ValueError(
            f"nothing lists the steps of {' and '.join(absent)}: give each expert's, or expert= for one alone"
        )
    order = [(level, e.name) for e in working for level in levels[e.name]]
    for (level, name), (following, after) in pairwise(order):
        if not following < level:
            raise ValueError(
                f"{name}'s noise level {level:.4f} is followed by {after}'s {following:.4f}: steps go from "
                "noise to data"
            )
    listed = plan(working, PerStep([name for _, name in order]), noise_levels=[level for level, _ in order])
    return replace(listed, from_image=False)


def _named(what: str, given: Any, experts: Sequence[Expert]) -> dict[str, Any]:
    names = [e.name for e in experts]
    if given is None:
        return {}
    if isinstance(given, Mapping):
        unknown = [str(name) for name in given if name not in names]
        if unknown:
            raise ValueError(f"{what} names {', '.join(unknown)}, but {' and '.join(names)} work")
        return dict(given)
    if len(names) > 1:
        raise ValueError(
            f"{what} of {' and '.join(names)} are given by name, {{{names[0]!r}: [...]}}, or of one alone "
            f"with expert={names[0]!r}"
        )
    return {names[0]: given}


def _levels(what: str, given: Any, expert: Expert) -> list[float]:
    """Shares of noise."""
    kind = "timesteps" if expert.path.discrete else "sigmas"
    if what != kind:
        clock = "integer timesteps" if expert.path.discrete else "sigmas from 1 to 0"
        raise ValueError(f"{expert.name} was trained on {clock}: give {kind}, not {what}")
    values = _numbers(what, given, expert.name)
    if what == "timesteps":
        if any(v != int(v) for v in values):
            raise ValueError(f"{expert.name}: timesteps are whole numbers, got {given!r}")
        levels = [expert.path.level(int(v)).noise for v in values]
    else:
        if not all(0 < v <= 1 for v in values):
            raise ValueError(f"{expert.name}: sigmas lie above 0 and at most at 1, got {given!r}")
        levels = [shift_sigma(v, expert.shift) for v in values]
    if any(not b < a for a, b in pairwise(levels)):
        raise ValueError(f"{expert.name}: {what} must descend, got {given!r}")
    return levels


def _numbers(what: str, given: Any, expert: str) -> list[float]:
    values = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"{expert}: {what} must be a list of numbers, got {given!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{expert}: {what} must be a list of finite numbers, got {given!r}")
    return [float(value) for value in values]
