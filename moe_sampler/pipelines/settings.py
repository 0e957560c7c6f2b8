"""Several experts together: settings by the experts' names, compiled into a plan. Needs no weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypedDict, Unpack

from .._numbers import number
from ..sampling.calls import check_fits
from ..sampling.experts import Expert
from ..sampling.guiders import Guider
from ..sampling.plan import PlanStep, SamplingPlan
from ..sampling.planner import plan
from ..sampling.routers import Boundary, PerStep, Router, Spans, inner_level
from ..sampling.scheduler_names import check_solver_name, is_borrowed
from ..sampling.spacing_names import read_levels
from ..sampling.step_counts import read_steps

__all__ = [
    "DEFAULTS",
    "EXPERTS",
    "ExpertSettings",
    "by_expert",
    "check_defaults",
    "default_keys",
    "default_settings",
    "default_solvers",
    "enter_plan",
    "given_plan",
    "guidance_scales",
    "hybrid_experts",
    "hybrid_plan",
    "is_default",
    "own_steps",
    "with_own",
]

EXPERTS = ("sol", "lune")
DEFAULTS = {"handoff": 0.7, "num_inference_steps": 30, "sol_guidance": 7.5, "lune_guidance": 7.5}
"""Settings of a model folder whose `model_index.json` has none of its own."""

_GUIDANCE = 7.5
"""The guidance scale of an expert that has no default of its own."""


_OWN = ("guidance", "solver", "levels")
"""What an expert has a default of, as `<name>_guidance`."""


def is_default(key: str) -> bool:
    """Whether a default setting may have this name, of some expert."""
    return key in DEFAULTS or key.endswith(tuple(f"_{own}" for own in _OWN))


def default_keys(experts: Sequence[str]) -> list[str]:
    """The names of these experts' default settings."""
    return ["handoff", "num_inference_steps", *(f"{name}_{own}" for name in experts for own in _OWN)]


def default_settings(experts: Sequence[str], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The default settings of a pipeline of these experts: `given`'s, and where it has none those that every
    pipeline has.

    Raises:
        ValueError: a solver or levels that there aren't.
    """
    given = {} if given is None else given
    own = {f"{name}_guidance": DEFAULTS.get(f"{name}_guidance", _GUIDANCE) for name in experts}
    defaults = {key: DEFAULTS[key] for key in ("handoff", "num_inference_steps")} | own
    found = defaults | {key: given[key] for key in default_keys(experts) if given.get(key) is not None}
    for name in experts:
        if (solver := found.get(f"{name}_solver")) is not None:
            check_solver_name(solver)
        read_levels(f"{name}_levels", found.get(f"{name}_levels"))
    return found


def check_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Default settings, checked by name."""
    unknown = [key for key in given if key != "experts" and not is_default(key)]
    if unknown:
        raise TypeError(f"a pipeline has no default {', '.join(unknown)}")
    return dict(given)


def default_solvers(
    settings: Mapping[str, Any], defaults: Mapping[str, Any], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Solvers and levels by expert, under these names: what was given, else the model's own. The model's
    levels go with its solver and shift: they don't count where one of these is given.

    Args:
        settings: "solver", "levels" and "shift", each one for all or by expert.
        defaults: the model's.
        names: of the experts.
    """
    keys = ("solver", "levels", "shift")
    given = {key: by_expert(key, settings.get(key), names) for key in keys}
    solvers, levels = dict(given["solver"]), dict(given["levels"])
    for name in names:
        if all(given[key][name] is None for key in keys):
            levels[name] = defaults.get(f"{name}_levels")
        if solvers[name] is None:
            solvers[name] = defaults.get(f"{name}_solver")
    return {"solver": solvers, "levels": levels}


def by_expert(what: str, value: Any, names: Sequence[str]) -> dict[str, Any]:
    """A setting for every expert: one value stands for all, a mapping names them, None leaves it to each."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    unknown = sorted(str(name) for name in value if name not in names)
    if unknown:
        raise ValueError(f"{what} names {', '.join(unknown)}, but the experts are {', '.join(names)}")
    return {name: value.get(name) for name in names}


def with_own(what: str, value: Any, names: Sequence[str], **own: Any) -> Any:
    """`value`, which is one for all experts or a mapping, with those of single experts in its place.

    Where `sol_guidance` and the like end: past this there are only values by name.

    Args:
        what: the setting, for messages.
        value: what was given for all, or by name.
        names: of the experts.
        own: by expert, None where nothing was given.
    """
    own = {name: one for name, one in own.items() if one is not None}
    return {**by_expert(what, value, names), **_only(by_expert(what, own, names))} if own else value


def own_steps(
    steps: int | Mapping[str, int] | None, names: Sequence[str], **own: int | None
) -> int | Mapping[str, int] | None:
    """A number of steps in all or by name, from `num_inference_steps` or `sol_steps` and the like."""
    if any(count is not None for count in own.values()) and steps is not None:
        raise ValueError("give either a number of steps in all or each expert's, not both")
    return with_own("steps", steps, names, **own)


def _only(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


class ExpertSettings(TypedDict, total=False):
    """Settings that are one for all experts, or by expert; None leaves them to each expert's training."""

    shift: float | Mapping[str, float] | None
    solver: Any
    eta: float | Mapping[str, float] | None
    levels: Any
    guidance_rescale: float | Mapping[str, float] | None
    guidance_window: Sequence[float] | Mapping[str, Sequence[float]] | None
    guider: Guider | str | Mapping[str, Guider | str] | None
    reuse: Any
    reuse_share: Mapping[str, float] | None


def guidance_scales(
    guidance: float | Mapping[str, float] | None, defaults: Mapping[str, Any], names: Sequence[str]
) -> dict[str, float]:
    """Each expert's guidance scale: what was given for all or by name, else the model's `<name>_guidance`."""
    given = by_expert("guidance_scale", guidance, names)
    return {name: defaults[f"{name}_guidance"] if given[name] is None else given[name] for name in names}


def hybrid_experts(
    scheduler_configs: Mapping[str, Mapping[str, Any]],
    guidance: Mapping[str, float],
    **settings: Unpack[ExpertSettings],
) -> tuple[Expert, ...]:
    """Experts from their scheduler configs; None leaves a setting to the config.

    Args:
        scheduler_configs: by expert, with `_class_name`.
        guidance: guidance scale by expert.
        settings: as `Expert` takes them, one for all experts, or by expert.

    Raises:
        ValueError: a setting that is out of range or names an expert there isn't.
    """
    names = list(scheduler_configs)
    guidance = {name: number(f"{name}: the guidance scale", scale) for name, scale in guidance.items()}
    given = {"guidance_scale": guidance, **settings}
    named = {key: by_expert(key, value, names) for key, value in given.items()}
    return tuple(
        Expert.from_scheduler_config(
            name, scheduler_configs[name], **{key: values[name] for key, values in named.items()}
        )
        for name in names
    )


def _alone(
    experts: Sequence[Expert],
    name: str,
    own: Mapping[str, int],
    total: int | None,
    handoff: Any,
    router: Any,
) -> SamplingPlan:
    if handoff is not None or router is not None:
        raise ValueError(f"{name} alone has no handoff: leave out handoff and router")
    useless = [other for other in own if other != name]
    if useless:
        raise ValueError(f"{name} alone has no use for steps of {useless[0]}")
    return _planned([next(e for e in experts if e.name == name)], None, own.get(name, total))


def _planned(
    experts: Sequence[Expert], router: Router | None, steps: int | Mapping[str, int] | None
) -> SamplingPlan:
    """`plan`, but what was asked for before, as by a pipeline that makes one image after another, is at hand.
    Not for a user's own routers, which may change."""
    steps = None if steps is None else read_steps(steps)
    if not all(isinstance(expert.solver, str) for expert in experts):  # a scheduler may be changed
        return plan(experts, router, steps=steps)
    # Without their models, which what is kept would keep in memory.
    known = tuple(replace(expert, model=None) for expert in experts)
    return _plan(known, router, tuple(steps.items()) if isinstance(steps, Mapping) else steps)


@lru_cache(maxsize=16)
def _plan(
    experts: tuple[Expert, ...], router: Router | None, steps: int | tuple[tuple[str, int], ...] | None
) -> SamplingPlan:
    return plan(experts, router, steps=dict(steps) if isinstance(steps, tuple) else steps)


def _default_router(names: Sequence[str], handoff: float | Sequence[float]) -> Router:
    """Each expert in its turn, from noise to data, between the handoffs."""
    given: list[Any] = [handoff]
    if isinstance(handoff, Iterable) and not isinstance(handoff, str) and getattr(handoff, "ndim", 1):
        given = list(handoff)
    levels = [inner_level("the handoff", level) for level in given]
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
    handoff: float | Sequence[float] | None = None,
    router: Router | PerStep | None = None,
) -> SamplingPlan:
    """Compile what was asked for; `defaults` gives `num_inference_steps` and `handoff` where nothing was.

    Args:
        experts: from noise to data.
        defaults: settings of the model.
        expert: "hybrid", or the name of one that works alone.
        num_inference_steps: in all, or by expert.
        handoff: the noise level where the first expert hands over to the second; of more experts, one level
            fewer than there are experts, descending.
        router: instead of handoffs.

    Raises:
        ValueError: settings that contradict each other or are out of range.
    """
    names = [e.name for e in experts]
    if expert not in ("hybrid", *names):
        raise ValueError(f'unknown expert "{expert}": use hybrid, {" or ".join(names)}')
    own: dict[str, int] = {}
    if isinstance(num_inference_steps, Mapping):
        own = _only(by_expert("steps", num_inference_steps, names))
        if not own:
            raise ValueError("steps by expert must name at least one")
    listed = [e.name for e in experts if isinstance(e.levels, tuple)]
    total: int | None = defaults["num_inference_steps"]
    if num_inference_steps is not None and not isinstance(num_inference_steps, Mapping):
        total = num_inference_steps
    elif set(names if expert == "hybrid" else [expert]) <= set(listed):
        total = None  # as many as the listed levels
    if expert != "hybrid" or len(names) == 1:
        return _alone(experts, names[0] if expert == "hybrid" else expert, own, total, handoff, router)
    if router is not None and handoff is not None:
        raise ValueError("give either a handoff or a router, not both")
    if own and router is None and set(own) | set(listed) != set(names):
        raise ValueError(
            f"steps of {' and of '.join(names)} come together; for a total give the number of steps in all"
        )
    if isinstance(router, PerStep):
        return plan(experts, router, steps=own or num_inference_steps)
    if router is not None:
        return plan(experts, router, steps=own or total)
    router = _default_router(names, defaults["handoff"] if handoff is None else handoff)
    return _planned(experts, router, own or total)


def _steps_run(steps: int, strength: float) -> int:
    """As diffusers' image-to-image pipelines count them."""
    return min(int(steps * strength), steps)


def _least_strength(steps: int) -> str:
    """The smallest strength of so many digits that leaves a step to run."""
    digits = max(3, len(str(steps)))
    units = -(-(10**digits) // steps)
    while not _steps_run(steps, units / 10**digits):  # where the product is rounded down
        units += 1
    return f"{units / 10**digits:.{digits}f}"


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
    count = _steps_run(len(nodes), strength)
    if count < 1:
        raise ValueError(
            f"strength {strength} leaves none of {len(nodes)} steps to run: give at least "
            f"{_least_strength(len(nodes))}"
        )
    # Planned anew rather than cut: a multistep solver has no history where the run begins.
    late = nodes[len(nodes) - count :]
    used = [e for e in experts if e.name in {call.name for step in late for call in step.calls}]
    if any(is_borrowed(e.solver) for e in used):
        return replace(_entered_by_spans(used, late), from_image=True)
    router = PerStep([{call.name: call.weight for call in step.calls} for step in late])
    entered = plan(used, router, noise_levels=[step.level.noise for step in late])
    return replace(entered, from_image=True)


def _entered_by_spans(experts: Sequence[Expert], late: Sequence[PlanStep]) -> SamplingPlan:
    """The last steps of a plan whose experts' schedulers bring their own levels: as many steps of each, from
    the first of their levels on."""
    if any(len(step.calls) > 1 for step in late):
        raise ValueError(
            "a start from an image cannot mix experts where a scheduler is a solver: hand over at one level, "
            "or use a solver that is built in"
        )
    counts = {e.name: sum(step.calls[0].name == e.name for step in late) for e in experts}
    starts = {step.calls[0].name: step.level.noise for step in reversed(late)}
    names = sorted(starts, key=starts.__getitem__, reverse=True)
    ends = [*(starts[name] for name in names[1:]), 0.0]
    router = Spans(tuple(zip(names, ends, strict=True)))
    return plan(experts, router, steps=counts, start=late[0].level.noise)


def given_plan(
    plan: SamplingPlan, experts: Sequence[Expert], *, image: bool, latents: bool = False, **settings: Any
) -> SamplingPlan:
    """A plan that a call brings along, checked against what else it was given.

    Args:
        plan: as given.
        experts: those that would run it.
        image, latents: whether the call gives one to start from.
        settings: what a plan decides, None where it wasn't given.

    Raises:
        TypeError: no plan.
        ValueError: settings beside it, experts it was not made for, or a start it cannot have.
    """
    if not isinstance(plan, SamplingPlan):
        raise TypeError(f"plan must be a SamplingPlan (SamplingPlan.from_json reads one), got {plan!r}")
    decided = list(_only(settings))
    if decided:
        raise ValueError(f"the plan decides {', '.join(decided)}: give either the plan or these")
    plan.check()
    check_fits(plan, experts)
    if plan.from_image and not image and not latents:
        raise ValueError(
            f"the plan begins at noise level {plan.start_level.noise:.4f}, with an image: give image"
        )
    if image and not plan.from_image:
        raise ValueError(
            "the plan begins with noise alone, in which no image would be left: for a start from an image "
            "make the plan with strength"
        )
    return plan
