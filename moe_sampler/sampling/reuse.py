"""Which calls reuse deep features: they compute a model's outermost layers alone and take everything deeper
from the last full call of the same expert (DeepCache, arXiv:2312.00858). Decided while planning."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from .._numbers import number, whole

if TYPE_CHECKING:
    import torch

    from .experts import Expert
    from .plan import ExpertCall, PlanStep

__all__ = [
    "AUTO",
    "AUTO_EVERY",
    "MOST_CALLS",
    "FullCalls",
    "ReusableModel",
    "Reuse",
    "check_reuse",
    "marked",
    "read_reuse",
    "repaired",
    "settled",
]

MOST_CALLS = 1000
"""Between two full calls: beyond it there is one full call in a run."""

AUTO: Literal["auto"] = "auto"
"""Every AUTO_EVERY-th call is full in plans of AUTO_FROM steps or more, and every call in shorter ones."""
AUTO_EVERY = 3
AUTO_FROM = 10
"""By docs/PERFORMANCE.md's table of the demo experts: ten steps of which every third is full are better than
full runs of their cost. Models that are made for a few steps have none to spare."""

Reuse: TypeAlias = int | tuple[int, ...] | tuple[tuple[float, int], ...] | Literal["auto"]
"""Which of an expert's calls are full: every k-th; those of these numbers, counted from 0 over its calls in
the run; every k-th down to a noise level, `((0.5, 2), (0.0, 4))`; or AUTO."""


class ReusableModel(Protocol):
    """What a model must be for calls that reuse its features, beside a callable as `Expert` has it.

    `moe_sampler.architectures.expert_model.ExpertModel` makes one of a model.
    """

    def check_reusable(self) -> None:
        """Raise ValueError, with what to do, if it can't after all."""
        ...

    def recording(
        self, sample: torch.Tensor, timestep: torch.Tensor, **conditioning: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A full call: (the prediction, its deep features, with the batch first)."""
        ...

    def reusing(
        self, sample: torch.Tensor, timestep: torch.Tensor, features: torch.Tensor, **conditioning: Any
    ) -> torch.Tensor:
        """The prediction, computed in the outermost layers alone."""
        ...


def read_reuse(what: str, value: Any) -> Reuse | None:
    """A setting of reuse as given, checked; None where every call is full.

    Raises:
        ValueError: none.
    """
    if value == AUTO:
        return AUTO
    if value is None or isinstance(value, str) or not isinstance(value, Iterable):
        return None if value is None else _every(what, value)
    given = list(value)
    if given and all(isinstance(one, Iterable) and not isinstance(one, str) for one in given):
        return _spans(what, [tuple(one) for one in given])
    calls = tuple(whole(f"{what}: a full call's number", one, 10**6, least=0) for one in given)
    if not calls or calls[0] != 0 or any(b <= a for a, b in itertools.pairwise(calls)):
        raise ValueError(
            f"{what}: full calls are listed by their numbers, ascending from 0, as the first one has nothing "
            f"to reuse; got {value!r}"
        )
    return calls


def _every(what: str, value: Any) -> int | None:
    every = whole(f"{what}: how many calls make one full one", value, MOST_CALLS)
    return None if every == 1 else every


def _spans(what: str, given: Sequence[tuple[Any, ...]]) -> Reuse:
    if any(len(span) != 2 for span in given):
        raise ValueError(f"{what}: spans are pairs of a noise level and a number of calls, got {given!r}")
    spans = tuple(
        (number(f"{what}: a noise level", level), whole(f"{what}: calls", every, MOST_CALLS))
        for level, every in given
    )
    levels = [level for level, _ in spans]
    if levels[-1] != 0.0 or any(not 1.0 > a > b for a, b in itertools.pairwise(levels)):
        raise ValueError(
            f"{what}: spans end at descending noise levels below 1, the last one at 0, got {given!r}"
        )
    return spans


def _is_full(reuse: Reuse | None, number_in_run: int, since_full: int, noise: float) -> bool:
    if reuse is None:
        return True
    if isinstance(reuse, int):
        return since_full >= reuse
    assert reuse != AUTO  # settled by now
    if all(isinstance(one, int) for one in reuse):
        return number_in_run in reuse
    every = next(k for level, k in reuse if noise >= level)  # pyright: ignore[reportGeneralTypeIssues]
    return since_full >= every


class FullCalls:
    """Whose features a run holds, call by call. An expert that paused in between has none any more, and those
    of an unguided call serve no guided one.

    Args:
        have: experts whose features there are already, and whether with the unconditional half.
    """

    def __init__(self, have: Mapping[str, bool] | None = None) -> None:
        self._have = dict(have or {})

    def step(self, calls: Sequence[ExpertCall], full: Callable[[ExpertCall, bool], bool]) -> None:
        """Go one step on. full: of a call and whether there are features for it, whether it is full."""
        kept = {}
        for call in calls:
            serves = call.name in self._have and (self._have[call.name] or not call.guided)
            made = full(call, serves)
            kept[call.name] = call.guided if made else self._have[call.name]
        self._have = kept


def settled(experts: Mapping[str, Expert], steps: int) -> dict[str, Expert]:
    """The experts with what AUTO means in a plan of so many steps."""
    meant = AUTO_EVERY if steps >= AUTO_FROM else None
    return {
        name: dataclasses.replace(expert, reuse=meant) if expert.reuse == AUTO else expert
        for name, expert in experts.items()
    }


def marked(steps: Sequence[PlanStep], experts: Mapping[str, Expert]) -> tuple[PlanStep, ...]:
    """The steps with every call that its expert's `reuse` lets reuse features, and that can, priced so."""
    if all(expert.reuse is None for expert in experts.values()):
        return tuple(steps)
    state, result = FullCalls(), []
    count, since = dict.fromkeys(experts, 0), dict.fromkeys(experts, 0)
    for step in steps:
        priced: list[ExpertCall] = []

        def full(call: ExpertCall, serves: bool, step=step, priced=priced) -> bool:
            expert = experts[call.name]
            made = not serves or _is_full(expert.reuse, count[call.name], since[call.name], step.level.noise)
            count[call.name] += 1
            since[call.name] = 1 if made else since[call.name] + 1
            priced.append(dataclasses.replace(call, share=1.0 if made else expert.reuse_share))
            return made

        state.step(step.calls, full)
        result.append(dataclasses.replace(step, calls=tuple(priced)))
    return tuple(result)


def repaired(steps: Iterable[PlanStep]) -> tuple[PlanStep, ...]:
    """The steps with every call full that would find no features to reuse."""
    state, result = FullCalls(), []
    for step in steps:
        own: list[ExpertCall] = []

        def full(call: ExpertCall, serves: bool, own=own) -> bool:
            own.append(call if serves else dataclasses.replace(call, share=1.0))
            return not own[-1].reuses

        state.step(step.calls, full)
        result.append(dataclasses.replace(step, calls=tuple(own)))
    return tuple(result)


def check_reuse(steps: Iterable[PlanStep], have: Mapping[str, bool] | None = None, first: int = 0) -> None:
    """Raise ValueError unless every call that reuses features finds them.

    Args:
        steps: to be run, in order.
        have: as `FullCalls` takes it.
        first: the first step's number, for messages.
    """
    state = FullCalls(have)
    for index, step in enumerate(steps, first):

        def full(call: ExpertCall, serves: bool, index=index) -> bool:
            if call.reuses and not serves:
                raise ValueError(
                    f"step {index} of the plan lets {call.name} reuse features, but no full call in the "
                    "steps just before it made them, with the guidance that it has: make that call full"
                )
            return not call.reuses

        state.step(step.calls, full)
