"""Sol and Lune together: settings by the experts' names, compiled into a plan. Needs no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .experts import Expert
from .planning import SamplingPlan, plan
from .routers import Boundary, Router

__all__ = ["DEFAULTS", "EXPERTS", "hybrid_experts", "hybrid_plan"]

EXPERTS = ("sol", "lune")
DEFAULTS = {"handoff": 0.7, "num_inference_steps": 30, "sol_guidance": 7.5, "lune_guidance": 7.5}
"""Settings of a model folder whose `model_index.json` has none of its own."""


def hybrid_experts(
    scheduler_configs: Mapping[str, Mapping[str, Any]],
    guidance: Mapping[str, float],
    *,
    shift: float | None = None,
    solver: str | Mapping[str, str] | None = None,
    eta: float | None = None,
) -> tuple[Expert, Expert]:
    """Sol and Lune from their scheduler configs; None leaves a setting to the config.

    Args:
        scheduler_configs: by expert, with `_class_name`.
        guidance: guidance scale by expert.
        shift: k of the shifted sigmas.
        solver: for both, or by expert.
        eta: share of noise of DDIM.
    """
    solvers = dict(solver) if isinstance(solver, Mapping) else dict.fromkeys(EXPERTS, solver)
    unknown = sorted(set(solvers) - set(EXPERTS))
    if unknown:
        raise ValueError(f"solver names {', '.join(unknown)}, but the experts are {', '.join(EXPERTS)}")
    return tuple(
        Expert.from_scheduler_config(
            name,
            scheduler_configs[name],
            guidance_scale=guidance[name],
            solver=solvers.get(name),
            shift=shift,
            eta=eta,
        )
        for name in EXPERTS
    )


def hybrid_plan(
    experts: Sequence[Expert],
    defaults: Mapping[str, Any],
    *,
    expert: str = "hybrid",
    num_inference_steps: int | None = None,
    sol_steps: int | None = None,
    lune_steps: int | None = None,
    handoff: float | None = None,
    router: Router | None = None,
) -> SamplingPlan:
    """Compile what was asked for; `defaults` gives `num_inference_steps` and `handoff` where nothing was.

    Raises:
        ValueError: settings that contradict each other or are out of range.
    """
    own = {"sol": sol_steps, "lune": lune_steps}
    if expert not in ("hybrid", *EXPERTS):
        raise ValueError(f'unknown expert "{expert}": use hybrid, sol or lune')
    if num_inference_steps is not None and any(count is not None for count in own.values()):
        raise ValueError("give either a number of steps in all or each expert's, not both")
    total = defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps
    if expert != "hybrid":
        if handoff is not None or router is not None:
            raise ValueError(f"{expert} alone has no handoff: leave out handoff and router")
        other = next(name for name in EXPERTS if name != expert)
        if own[other] is not None:
            raise ValueError(f"{expert} alone has no use for steps of {other}")
        alone = next(e for e in experts if e.name == expert)
        return plan(alone, steps=total if own[expert] is None else own[expert])
    if router is not None and handoff is not None:
        raise ValueError("give either a handoff or a router, not both")
    if (sol_steps is None) != (lune_steps is None):
        raise ValueError(
            "steps of sol and of lune come together; for a total give the number of steps in all"
        )
    router = router or Boundary("sol", "lune", defaults["handoff"] if handoff is None else handoff)
    return plan(experts, router, steps=total if sol_steps is None else own)
