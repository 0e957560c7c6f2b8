"""Several experts together: settings by the experts' names, compiled into a plan. Needs no weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from ..sampling.experts import Expert
from ..sampling.plan import SamplingPlan
from ..sampling.planner import check_steps, plan
from ..sampling.routers import Boundary, PerStep, Router, Spans

__all__ = [
    "DEFAULTS",
    "EXPERTS",
    "by_expert",
    "enter_plan",
    "hybrid_experts",
    "hybrid_plan",
]

EXPERTS = ("sol", "lune")
DEFAULTS = {"handoff": 0.7, "num_inference_steps": 30, "sol_guidance": 7.5, "lune_guidance": 7.5}
"""Settings of a model folder whose `model_index.json` has none of its own."""

_GUIDANCE = 7.5
"""The guidance scale of an expert that has no default of its own."""


def default_settings(experts: Sequence[str], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The default settings of a pipeline of these experts, where `given` has none."""
    own = {f"{name}_guidance": DEFAULTS.get(f"{name}_guidance", _GUIDANCE) for name in experts}
    defaults = {key: DEFAULTS[key] for key in ("handoff", "num_inference_steps")} | own
    return {key: (given or {}).get(key, value) for key, value in defaults.items()}


def by_expert(what: str, value: Any, names: Sequence[str]) -> dict[str, Any]:
    """A setting for every expert: one value stands for all, a mapping names them, None leaves it to each."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    unknown = sorted(str(name) for name in value if name not in names)
    if unknown:
        raise ValueError(f"{what} names {', '.join(unknown)}, but the experts are {', '.join(names)}")
    return {name: value.get(name) for name in names}


def hybrid_experts(
    scheduler_configs: Mapping[str, Mapping[str, Any]],
    guidance: Mapping[str, float],
    *,
    shift: float | Mapping[str, float] | None = None,
    solver: str | Mapping[str, str] | None = None,
    eta: float | Mapping[str, float] | None = None,
    guidance_rescale: float | Mapping[str, float] | None = None,
    guidance_window: tuple[float, float] | Mapping[str, tuple[float, float]] | None = None,
) -> tuple[Expert, ...]:
    """Experts from their scheduler configs; None leaves a setting to the config.

    Args:
        scheduler_configs: by expert, with `_class_name`.
        guidance: guidance scale by expert.
        shift: k of the shifted sigmas.
        solver, eta, guidance_rescale, guidance_window: as `Expert` takes them.

    All settings are one for all experts, or by expert.

    Raises:
        ValueError: a setting that is out of range or names an expert there isn't.
    """
    names = list(scheduler_configs)
    settings = {
        "shift": by_expert("shift", shift, names),
        "solver": by_expert("solver", solver, names),
        "eta": by_expert("eta", eta, names),
        "guidance_rescale": by_expert("guidance_rescale", guidance_rescale, names),
        "guidance_window": by_expert("guidance_window", guidance_window, names),
        "guidance_scale": by_expert("guidance_scale", guidance, names),
    }
    for name, scale in settings["guidance_scale"].items():
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ValueError(f"{name}: the guidance scale must be a finite number, got {scale!r}")
    return tuple(
        Expert.from_scheduler_config(
            name, scheduler_configs[name], **{key: values[name] for key, values in settings.items()}
        )
        for name in names
    )


def _own_steps(
    names: Sequence[str], steps: int | Mapping[str, int] | None, sol: int | None, lune: int | None
) -> dict[str, int]:
    """The experts' own step counts, where they were given."""
    own = {name: count for name, count in (("sol", sol), ("lune", lune)) if count is not None}
    if own and steps is not None:
        raise ValueError("give either a number of steps in all or each expert's, not both")
    if isinstance(steps, Mapping):
        own = {name: count for name, count in by_expert("steps", steps, names).items() if count is not None}
        if not own:
            raise ValueError("steps by expert must name at least one")
    by_expert("steps", own, names)
    return own


def _alone(
    experts: Sequence[Expert], name: str, own: Mapping[str, int], total: int, handoff: Any, router: Any
) -> SamplingPlan:
    if handoff is not None or router is not None:
        raise ValueError(f"{name} alone has no handoff: leave out handoff and router")
    useless = [other for other in own if other != name]
    if useless:
        raise ValueError(f"{name} alone has no use for steps of {useless[0]}")
    return _planned([next(e for e in experts if e.name == name)], None, own.get(name, total))


def _planned(
    experts: Sequence[Expert], router: Router | None, steps: int | Mapping[str, int]
) -> SamplingPlan:
    """`plan`, but what was asked for before, as by a pipeline that makes one image after another, is at hand.
    Not for a user's own routers, which may change."""
    check_steps(steps)
    # Without their models, which what is kept would keep in memory.
    known = tuple(replace(expert, model=None) for expert in experts)
    return _plan(known, router, tuple(steps.items()) if isinstance(steps, Mapping) else steps)


@lru_cache(maxsize=16)
def _plan(
    experts: tuple[Expert, ...], router: Router | None, steps: int | tuple[tuple[str, int], ...]
) -> SamplingPlan:
    return plan(experts, router, steps=dict(steps) if isinstance(steps, tuple) else steps)


def _default_router(names: Sequence[str], handoff: float | Sequence[float]) -> Router:
    """Each expert in its turn, from noise to data, between the handoffs."""
    levels = list(handoff) if isinstance(handoff, Sequence) else [handoff]
    for level in levels:
        if isinstance(level, bool) or not isinstance(level, int | float):
            raise ValueError(f"a handoff is a noise level between 0 and 1, got {level!r}")
    if len(levels) != len(names) - 1:
        raise ValueError(
            f"{len(names)} experts need {len(names) - 1} handoffs, from noise to data, or a router; "
            f"got {len(levels)}"
        )
    # A boundary checks its level; spans check their order.
    boundaries = [Boundary(a, b, at) for a, b, at in zip(names, names[1:], levels, strict=False)]
    return boundaries[0] if len(boundaries) == 1 else Spans(tuple(zip(names, [*levels, 0.0], strict=True)))


def hybrid_plan(
    experts: Sequence[Expert],
    defaults: Mapping[str, Any],
    *,
    expert: str = "hybrid",
    num_inference_steps: int | Mapping[str, int] | None = None,
    sol_steps: int | None = None,
    lune_steps: int | None = None,
    handoff: float | Sequence[float] | None = None,
    router: Router | PerStep | None = None,
) -> SamplingPlan:
    """Compile what was asked for; `defaults` gives `num_inference_steps` and `handoff` where nothing was.

    Args:
        experts: from noise to data.
        defaults: settings of the model.
        expert: "hybrid", or the name of one that works alone.
        num_inference_steps: in all, or by expert.
        sol_steps, lune_steps: the same for these two.
        handoff: the noise level where the first expert hands over to the second; of more experts, one level
            fewer than there are experts, descending.
        router: instead of handoffs.

    Raises:
        ValueError: settings that contradict each other or are out of range.
    """
    names = [e.name for e in experts]
    if expert not in ("hybrid", *names):
        raise ValueError(f'unknown expert "{expert}": use hybrid, {" or ".join(names)}')
    own = _own_steps(names, num_inference_steps, sol_steps, lune_steps)
    total = defaults["num_inference_steps"] if num_inference_steps is None or own else num_inference_steps
    if expert != "hybrid" or len(names) == 1:
        return _alone(experts, names[0] if expert == "hybrid" else expert, own, total, handoff, router)
    if router is not None and handoff is not None:
        raise ValueError("give either a handoff or a router, not both")
    if own and router is None and set(own) != set(names):
        raise ValueError(
            f"steps of {' and of '.join(names)} come together; for a total give the number of steps in all"
        )
    if isinstance(router, PerStep):
        return plan(experts, router, steps=own or num_inference_steps)
    if router is not None:
        return plan(experts, router, steps=own or total)
    router = _default_router(names, defaults["handoff"] if handoff is None else handoff)
    return _planned(experts, router, own or total)


def enter_plan(experts: Sequence[Expert], whole: SamplingPlan, strength: float) -> SamplingPlan:
    """The last part of a plan, for a start from an image: whichever expert works there works.

    Args:
        experts: the plan's.
        whole: the plan of a start from noise.
        strength: in (0, 1], the share of the steps that are run, as in diffusers.

    Raises:
        ValueError: no step would be run.
    """
    nodes = [step for step in whole.steps if not step.corrects]
    count = min(int(len(nodes) * strength), len(nodes))
    if count < 1:
        raise ValueError(
            f"strength {strength} leaves none of {len(nodes)} steps to run: "
            f"give at least {1 / len(nodes):.3f}"
        )
    # Planned anew rather than cut: a multistep solver has no history where the run begins.
    late = nodes[len(nodes) - count :]
    used = [e for e in experts if e.name in {call.name for step in late for call in step.calls}]
    router = PerStep([{call.name: call.weight for call in step.calls} for step in late])
    return plan(used, router, noise_levels=[step.level.noise for step in late])
