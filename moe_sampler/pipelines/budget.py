"""Steps and reuse for a cost: what a plan may cost decides how many steps it has and how many are full."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .._numbers import number
from ..sampling.experts import Expert
from ..sampling.plan import SamplingPlan
from ..sampling.reuse import AUTO, Reuse

__all__ = ["Budgeted", "within_budget"]

EVERY = (1, 2, 3)
"""How sparse full calls may become before steps become fewer."""
_OPEN = (None, AUTO)
"""What a budget decides in place of."""


@dataclass(frozen=True)
class Budgeted:
    """A plan for a budget, and the settings that make it.

    Args:
        plan: the plan.
        steps: in all; None where they were given one by one.
        reuse: by expert, as `Expert` takes it.
    """

    plan: SamplingPlan
    steps: int | None
    reuse: Mapping[str, Reuse | None]


def within_budget(
    budget: float,
    experts: Sequence[Expert],
    steps: int | Mapping[str, int] | None,
    compiled: Callable[[Sequence[Expert], int | None], SamplingPlan],
) -> Budgeted:
    """The plan with the most steps that costs no more; of those with as many, the one with the most full
    calls. Experts whose reuse was given keep it, unless it is AUTO.

    Args:
        budget: of `SamplingPlan.cost`, full passes a sample.
        experts: the plan's.
        steps: at most so many in all; None where they are given one by one.
        compiled: the plan of experts and a number of steps.

    Raises:
        ValueError: no such plan, with the cost of the cheapest one; steps by expert.
    """
    budget = number("the budget", budget)
    if isinstance(steps, Mapping):
        raise ValueError("a budget chooses the number of steps: give at most how many in all, not by expert")
    settled = not any(expert.reuse in _OPEN for expert in experts)
    least = compiled(_reusing(experts, EVERY[-1]), steps).cost
    found: Budgeted | None = None
    for every in EVERY[:1] if settled else EVERY:
        own = _reusing(experts, every)

        def attempt(count: int | None, own: Sequence[Expert] = own) -> SamplingPlan | None:
            nonlocal least
            try:
                made = compiled(own, count)
            except ValueError:  # too few for so many experts: with `steps` there is a plan
                return None
            least = min(least, made.cost)
            return made

        fewest = 0 if found is None or found.steps is None else found.steps
        best = _most(attempt, budget, fewest, steps)
        if best is not None:
            plan, count = best
            found = Budgeted(plan, count, {expert.name: expert.reuse for expert in own})
        if found is not None and found.steps == steps:
            break
    if found is None:
        raise ValueError(
            f"no plan of at most {steps} steps costs {budget:g} full passes: the cheapest costs {least:.1f}"
            if steps is not None
            else f"these steps cost at least {least:.1f} full passes, more than {budget:g}"
        )
    return found


def _reusing(experts: Sequence[Expert], every: int) -> list[Expert]:
    return [dataclasses.replace(e, reuse=every) if e.reuse in _OPEN else e for e in experts]


def _most(
    attempt: Callable[[int | None], SamplingPlan | None], budget: float, fewest: int, most: int | None
) -> tuple[SamplingPlan, int | None] | None:
    """The attempt with the most steps within the budget, of more than `fewest`.

    From the most down, as a step more may cost less: where steps lie otherwise in a guidance window, calls
    that had to be full may reuse features.
    """
    if most is None:
        made = attempt(None)
        return None if made is None or made.cost > budget else (made, None)
    count = most
    while count > fewest:
        made = attempt(count)
        if made is not None and made.cost <= budget:
            return made, count
        count -= 1 if made is None else _too_many(made, budget)
    return None


def _too_many(plan: SamplingPlan, budget: float) -> int:
    """How many steps to leave out of a plan beyond the budget, at least one: half as many as if they were all
    its dearest, as those that stay may come to cost more."""
    calls = 2 if any(step.corrects for step in plan.steps) else 1
    dearest = calls * max(step.cost for step in plan.steps)
    return max(1, int((plan.cost - budget) / (2 * dearest)))
