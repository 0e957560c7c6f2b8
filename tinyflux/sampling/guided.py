"""The student guided by Sol and Lune: who counts for how much at which noise level."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from moe_sampler import Expert, SamplingPlan, plan
from moe_sampler._numbers import number
from moe_sampler.pipelines.budget import within_budget
from moe_sampler.pipelines.settings import by_expert
from moe_sampler.sampling.reuse import Reuse
from moe_sampler.sampling.routers import inner_level
from moe_sampler.tinyflux.model.tinyflux import TinyFlux
from moe_sampler.tinyflux.sampling.expert import STUDENT, tinyflux_expert

__all__ = ["GUIDANCE_SCALE", "GuidedRouter", "Weight", "guided_experts", "guided_plan"]

STEPS = 20
"""In all, where none are given."""

GUIDANCE_SCALE = 3.0
"""The student's own, where none is given."""

Weight = float | Sequence[tuple[float, float]]
"""A share of the prediction, 0 to 1; or knots (noise level, share), straight lines between them and constant
beyond the last ones."""

Knots = tuple[tuple[float, float], ...]


def _checked(name: str, weight: Weight) -> float | Knots:
    """A weight, checked; knots in the order of their levels."""
    if isinstance(weight, Real) or getattr(weight, "ndim", None) == 0:
        return _unit(f"{name}'s weight", weight)
    if not isinstance(weight, Sequence) or isinstance(weight, str) or not weight:
        raise ValueError(f"{name}'s weight is a number from 0 to 1, or knots (level, weight), got {weight!r}")
    found = []
    for level, share in weight:
        at = _unit(f"a noise level of {name}'s weight", level)
        found.append((at, _unit(f"{name}'s weight at noise level {at:g}", share)))
    knots = tuple(sorted(found))
    if len(dict(knots)) < len(knots):
        raise ValueError(f"{name} has two weights at one noise level: {knots}")
    return knots


def _unit(what: str, value: Any) -> float:
    found = number(what, value)
    if not 0.0 <= found <= 1.0:
        raise ValueError(f"{what} lies between 0 and 1, got {found:g}")
    return found


@dataclass(frozen=True)
class GuidedRouter:
    """The student's weight is what Sol and Lune leave: at a level one of them may work beside it.

    Args:
        sol: Sol's weight. A number counts above the handoff, knots wherever they say.
        lune: Lune's weight. A number counts from the handoff down.
        handoff: the noise level, strictly between 0 (data) and 1 (noise).
        student: the student's name among the experts.

    Where an expert has more than half, it leads: its own solver takes the step.

    Raises:
        ValueError: weights or levels out of range; Sol and Lune at one level.
    """

    sol: Weight = 0.0
    lune: Weight = 0.0
    handoff: float = 0.7
    student: str = STUDENT
    _shares: Mapping[str, float | Knots] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shares = {"sol": _checked("Sol", self.sol), "lune": _checked("Lune", self.lune)}
        for name, value in (*shares.items(), ("_shares", shares)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "handoff", inner_level("the handoff", self.handoff))
        # Between two knots both weights are straight: if they overlap anywhere there, then in the middle.
        edges = sorted({0.0, 1.0, *self.knots})
        for level in sorted({*edges, *(0.5 * (a + b) for a, b in itertools.pairwise(edges))}, reverse=True):
            weights = self._weights(level)
            if weights["sol"] > 0.0 and weights["lune"] > 0.0:
                raise ValueError(
                    f"Sol ({weights['sol']:g}) and Lune ({weights['lune']:g}) both have weight at noise "
                    f"level {level:.4g}: one at a time works beside the student, so end one's weight with 0 "
                    "where the other's begins"
                )

    @property
    def knots(self) -> tuple[float, ...]:
        levels = {self.handoff, math.nextafter(self.handoff, 1.0)}
        for weight in self._shares.values():
            levels |= {level for level, _ in weight} if isinstance(weight, tuple) else set()
        return tuple(sorted(levels, reverse=True))

    @property
    def guides(self) -> tuple[str, ...]:
        """Which of Sol and Lune have any weight."""
        return tuple(
            name
            for name, weight in self._shares.items()
            if (any(share > 0.0 for _, share in weight) if isinstance(weight, tuple) else weight > 0.0)
        )

    def _weights(self, noise: float) -> dict[str, float]:
        above, shares = noise > self.handoff, self._shares
        return {"sol": _at(shares["sol"], noise, above), "lune": _at(shares["lune"], noise, not above)}

    def __call__(self, noise: float) -> Mapping[str, float]:
        weights = {name: share for name, share in self._weights(noise).items() if share > 0.0}
        return {self.student: 1.0 - sum(weights.values()), **weights}


def _at(weight: float | Knots, noise: float, counts: bool) -> float:
    if isinstance(weight, tuple):
        levels, shares = zip(*weight, strict=True)
        return float(np.interp(noise, levels, shares))
    return weight if counts else 0.0


def guided_experts(
    model: TinyFlux | None,
    names: Iterable[str],
    guides: Callable[..., Sequence[Expert]],
    *,
    guidance_scale: float | Mapping[str, float] | None = None,
    shift: float | Mapping[str, float] | None = None,
    solver: Any = None,
    levels: Any = None,
    upstream_schedule: bool | None = None,
    reuse: Reuse | Mapping[str, Reuse] | None = None,
    reuse_share: float | None = None,
) -> tuple[Expert, ...]:
    """The student and those who can guide it.

    Args:
        model: the student's; None for planning alone.
        names: of the others.
        guides: makes the others of `guidance_scale`, `shift`, `solver`, `levels` and `reuse`, mappings by
            name, with None where an expert's own default is meant.
        guidance_scale, shift, solver, levels, reuse: one for all, or by name; None is each expert's default.
        upstream_schedule: as `tinyflux_expert` takes it.
        reuse_share: of the student's calls that reuse features; by default as its model says.

    Raises:
        ValueError: a setting out of range, or of an expert there isn't.
    """
    names = tuple(names)
    given = {"guidance_scale": guidance_scale, "shift": shift, "solver": solver, "levels": levels}
    given |= {"reuse": reuse}
    named = {key: by_expert(key, value, (STUDENT, *names)) for key, value in given.items()}
    given = {key: values.pop(STUDENT) for key, values in named.items()}
    own: dict[str, Any] = {"guidance_scale": GUIDANCE_SCALE}
    own |= {key: value for key, value in given.items() if value is not None}
    own |= {} if reuse_share is None else {"reuse_share": reuse_share}
    student = tinyflux_expert(model, upstream_schedule=upstream_schedule, **own)
    return (student, *(guides(**named) if names else ()))


def guided_plan(
    student: Expert,
    guides: Sequence[Expert],
    router: GuidedRouter,
    steps: int | Mapping[str, int] | None = None,
    budget: float | None = None,
) -> SamplingPlan:
    """The plan of the student, alone or with those of `guides` that have weight.

    Args:
        student: from `tinyflux_expert`, by the router's name for it.
        guides: Sol, Lune; others may be among them.
        steps: in all, 20 by default, or by name.
        budget: as `moe_sampler.pipelines.budget.within_budget` takes it, with `steps` as the most.

    Raises:
        ValueError: an expert with weight is missing, or what `plan` doesn't take.
    """
    known = {expert.name: expert for expert in guides}
    missing = [name for name in router.guides if name not in known]
    if missing:
        raise ValueError(
            f"{missing[0]} has a weight, but the experts are {', '.join(known) or 'none'}: "
            f"load a pipeline with {' and '.join(router.guides)}"
        )
    # Of two equal weights the first expert's leads: the student's.
    experts = [student, *(known[name] for name in router.guides)]
    if budget is None:
        return plan(experts, router, steps=steps)
    most = STEPS if steps is None else steps
    return within_budget(budget, experts, most, lambda own, count: plan(own, router, steps=count)).plan
