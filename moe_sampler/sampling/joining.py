"""Two plans, one after the other."""

from __future__ import annotations

import dataclasses
import math

from moe_sampler.kernels.rows import COLUMNS

from .plan import PlanStep, SamplingPlan
from .trails import retargeted

__all__ = ["joined", "with_row"]


def joined(first: SamplingPlan, then: SamplingPlan) -> SamplingPlan:
    """See `SamplingPlan.then`."""
    last, following = first.steps[-1], then.steps[0]
    if not math.isclose(last.target.noise, following.level.noise, rel_tol=1e-6, abs_tol=1e-9):
        raise ValueError(
            f"the first plan ends at noise level {last.target.noise:.6f}, and the second one begins at "
            f"{following.level.noise:.6f}: plans are joined at one level, so end the one where the other does"
        )
    update = retargeted(last.update, last.level, last.target, following.level)
    scales = {f"scale_{slot}": call.input_scale for slot, call in enumerate(following.calls)}
    joint = with_row(last, **update._asdict(), **scales)
    joint = dataclasses.replace(joint, target=following.level)
    return SamplingPlan((*first.steps[:-1], joint, *then.steps), first.initial_scale, first.from_image)


def with_row(step: PlanStep, **columns: float) -> PlanStep:
    """A step with other numbers in some of its row's columns."""
    row = step.coefficients | columns
    return dataclasses.replace(step, row=tuple(row[name] for name in COLUMNS))
