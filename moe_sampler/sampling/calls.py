"""An expert's part in a step: what the model is told, and how the row reads its output."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from moe_sampler.kernels.rows import COLUMNS

from .experts import Expert
from .paths import Level
from .plan import ExpertCall, PlanStep, SamplingPlan
from .predictions import x0_coefficients
from .recipe import ExpertRecipe
from .reuse import repaired
from .scheduler_names import is_borrowed
from .trails import means

__all__ = ["check_fits", "expert_call", "with_guidance"]


def expert_call(
    expert: Expert, weight: float, state: Level, told: float | None = None
) -> tuple[ExpertCall, float, tuple[float, float]]:
    """An expert's call at the state's level, with its share of p and its (q_cond, q_uncond).

    told: the timestep that its scheduler tells it, which may be the nearest whole one to the level.
    """
    own = expert.path.at(state.noise)
    timestep = expert.path.timestep(own) if told is None else told
    if told is not None:
        own = state
    elif expert.path.discrete and abs(timestep - round(timestep)) < 1e-6:
        timestep = round(timestep)
        own = expert.path.level(timestep)
    scale = 1.0 if own == state else own.sigma / state.sigma
    p, q = x0_coefficients(expert.prediction, own)
    g = expert.guidance_at(state.noise)
    rescale, guider = (expert.guidance_rescale, expert.own_guider) if g != 1.0 else (0.0, None)
    call = ExpertCall(expert.name, weight, timestep, g, scale, rescale, guider=guider)
    if guider is not None and guider.kind == "apg":
        call = dataclasses.replace(call, to_x0=(p * scale, q))
    # What depends on the sample comes to the row with its guidance already in it.
    folded = 1.0 if rescale or guider else g
    return call, weight * p * scale, (weight * folded * q, weight * (1.0 - folded) * q)


def check_fits(plan: SamplingPlan, experts: Iterable[Expert]) -> None:
    """Raise ValueError unless these are experts a plan can be run with: its names, and experts that mean by a
    timestep the level the plan means, and by their output what its rows read in it: at its own nodes, and,
    where it carries what it was compiled from, everywhere on their paths.

    Args:
        plan: made for these experts, or for others.
        experts: with or without their models. Guidance, solver and shift don't count: the plan has its own.
    """
    known = {expert.name: expert for expert in experts}
    missing = [name for name in plan.experts if name not in known]
    if missing:
        raise ValueError(f"the plan calls {' and '.join(missing)}, but the experts are {', '.join(known)}")
    for planned in () if plan.made_from is None else plan.made_from.experts:
        if planned.name in plan.experts:
            _check_same(planned, ExpertRecipe.of(known[planned.name]))
    for index, step in enumerate(plan.steps):
        wrong = _misread(step, known)
        if wrong is not None:
            raise ValueError(
                f"the plan was made for another {wrong}: at step {index}, noise level "
                f"{step.level.noise:.4f}, this {wrong}'s timestep or prediction type is not the plan's"
            )


def _check_same(planned: ExpertRecipe, own: ExpertRecipe) -> None:
    """Raise ValueError unless they mean the same by a timestep and by what is predicted."""
    name = planned.name
    if planned.prediction != own.prediction:
        raise ValueError(
            f"the plan was made for another {name}: it predicts {planned.prediction} there, and this {name} "
            f"predicts {own.prediction}"
        )
    # How a run's nodes are spaced is the plan's own affair.
    there, here = ({**each.path, "steps_offset": 0} for each in (planned, own))
    if there != here:
        raise ValueError(
            f"the plan was made for another {name}: its noise path is {_shown(there, here)} there, and this "
            f"{name}'s is {_shown(here, there)}"
        )


def _shown(path: dict[str, Any], other: dict[str, Any]) -> str:
    """What of a path isn't the other's."""
    said = [(key, value) for key, value in path.items() if key not in other or other[key] != value]
    return ", ".join(
        f"of {len(value)} trained betas" if isinstance(value, list | tuple) else f"{key} = {value}"
        for key, value in said
    )


def _misread(step: PlanStep, experts: dict[str, Expert]) -> str | None:
    """Whose call or whose place in the row isn't what it would be with these experts."""
    found, p = step.coefficients, 0.0
    for slot, planned in enumerate(step.calls):
        guidance = {
            "guidance_scale": planned.guidance_scale,
            "guidance_rescale": planned.guidance_rescale,
            "guidance_window": None,
            "guider": planned.guider,
        }
        expert = dataclasses.replace(experts[planned.name], **guidance)
        call, share, q = expert_call(expert, planned.weight, step.level, _told(step, planned, expert))
        p += share
        pairs = [
            (planned.timestep, call.timestep),
            (planned.input_scale, call.input_scale),
            *zip(planned.to_x0, call.to_x0, strict=True),
            *zip((found[f"q_cond_{slot}"], found[f"q_uncond_{slot}"]), q, strict=True),
        ]
        if not all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in pairs):
            return planned.name
    return None if math.isclose(found["p"], p, rel_tol=1e-6, abs_tol=1e-9) else step.calls[0].name


def _told(step: PlanStep, planned: ExpertCall, expert: Expert) -> float | None:
    """The timestep that a scheduler tells the leading expert, if one does and it is the level's, to a whole
    number."""
    leads = planned.weight == max(call.weight for call in step.calls)
    if not leads or not is_borrowed(step.solver.removesuffix("_corrector")):
        return None
    return planned.timestep if means(expert.path, planned.timestep, step.level) else None


def with_guidance(
    plan: SamplingPlan, experts: Iterable[Expert], scale: float, *, since: int = 0
) -> SamplingPlan:
    """The same plan with another guidance scale of all experts, from step `since` on. Windows don't count any
    more; 1 or less is no guidance.

    Args:
        plan: for these experts.
        experts: with or without their models.
    """
    known = {expert.name: expert for expert in experts}
    scale = max(float(scale), 1.0)
    steps = [_guided(step, known, scale) for step in plan.steps[since:]]
    # No setting of the experts says "from a step on".
    changed = repaired((*plan.steps[:since], *steps))  # a call that is guided now may find no features
    return dataclasses.replace(plan, steps=changed, made_from=None)


def _guided(step: PlanStep, experts: dict[str, Expert], scale: float) -> PlanStep:
    row, calls = step.coefficients, []
    for slot, planned in enumerate(step.calls):
        own = experts[planned.name]
        guider = own.guider if scale > 1.0 else None
        expert = dataclasses.replace(own, guidance_scale=scale, guidance_window=None, guider=guider)
        told = _told(step, planned, expert)
        call, _, (row[f"q_cond_{slot}"], row[f"q_uncond_{slot}"]) = expert_call(
            expert, planned.weight, step.level, told
        )
        calls.append(dataclasses.replace(call, share=planned.share))
    return dataclasses.replace(step, calls=tuple(calls), row=tuple(row[name] for name in COLUMNS))
