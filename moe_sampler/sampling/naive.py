"""The handoff as it is often built, as a plan: to see what the right one is good for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .experts import Expert
from .joining import with_row
from .plan import PlanStep, SamplingPlan
from .planner import plan

__all__ = ["check_comparable", "naive_plan"]


def check_comparable(experts: Sequence[Expert]) -> None:
    """Raise ValueError unless these are one expert with integer timesteps and one with continuous time, the
    pair between which a handoff can be got wrong."""
    if len(experts) != 2 or not experts[0].path.discrete or experts[1].path.discrete:
        raise ValueError(
            "a comparison needs two experts, first one on a DDPM path and then one on a flow path, like Sol "
            f"and Lune; these are {', '.join(e.name for e in experts)}"
        )


def naive_plan(experts: Sequence[Expert], right: SamplingPlan) -> SamplingPlan:
    """A hybrid plan with the handoff as it is often built: wrong in this and in nothing else.

    The first expert's steps stay as they are, but the last one ends on its own path, at the integer timestep
    t nearest to the handoff, and the latent goes on as it is: not divided by alpha + sigma. The second expert
    takes t / 1000 for its noise level, and has as many steps from there to the data as it has in `right`.

    Args:
        experts: the two of `right`, in order.
        right: a plan with one hard handoff between them.

    Raises:
        ValueError: experts or a plan of another kind.
    """
    check_comparable(experts)
    first, second = experts
    names = [tuple(call.name for call in step.calls) for step in right.steps]
    before = names.count((first.name,))
    if not 0 < before < len(names) or names != [(first.name,)] * before + [(second.name,)] * (
        len(names) - before
    ):
        raise ValueError(f"the plan must hand over once from {first.name} to {second.name}")
    nodes = [
        [s.level.noise for s in right.steps if s.calls[0].name == e.name and not s.corrects] for e in experts
    ]
    timestep = round(first.path.timestep(first.path.at(nodes[1][0])))
    early = plan(first, noise_levels=nodes[0], end=first.path.level(timestep).noise)
    if isinstance(second.levels, tuple):  # listed for another start
        second = replace(second, levels=None)
    late = plan(second, steps=len(nodes[1]), start=timestep / 1000)
    joint = _passing_on(early.steps[-1])
    return SamplingPlan((*early.steps[:-1], joint, *late.steps), early.initial_scale)


def _passing_on(step: PlanStep) -> PlanStep:
    """A run's last step as one that also writes the next model's input: the state, unscaled."""
    return with_row(step, scale_0=1.0)
