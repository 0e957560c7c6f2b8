"""From options to settings, as they are written into images, and from settings to a call and its plan.

Settings are flat JSON, under the names that the pipeline's call has for them; where one value may stand for
all experts it is that value or a mapping by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from ..sampling.reuse import AUTO
from ..sampling.scheduler_names import is_borrowed
from .by_name import ByExpert, full_calls, levels, number, over_previous, steps_over, whole, window
from .options import RunOptions
from .routers import parse_router

__all__ = [
    "Shares",
    "borrowing",
    "call_of",
    "compile_plan",
    "merge_runs",
    "merged",
    "planned_experts",
    "reusing",
]


class Shares(Protocol):
    """What calls of these experts that reuse features cost of a full one. optional: who is left out if that
    can't be, which is an error of others."""

    def __call__(self, names: Sequence[str], optional: Collection[str] = ()) -> Mapping[str, float]: ...


def merged(previous: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, else what the image before was made with."""
    values = {key: previous.get(key) if value is None else value for key, value in given.items()}
    return {key: value for key, value in values.items() if value is not None}


def _route(previous: Mapping[str, Any], run: RunOptions) -> dict[str, Any]:
    """expert, handoff and router: what was given, and of the previous what doesn't contradict it."""
    handoff = run.handoff
    if run.router is not None and handoff:
        raise ValueError("give either --handoff or --router, not both")
    expert = previous.get("expert") if run.expert is None else run.expert
    settings: dict[str, Any] = {} if expert is None else {"expert": expert}
    if run.router is not None:
        return settings | {"router": run.router}
    if handoff:
        return settings | {"handoff": handoff[0] if len(handoff) == 1 else list(handoff)}
    if run.expert in (None, "hybrid"):
        settings |= {key: previous[key] for key in ("handoff", "router") if key in previous}
    return settings


def merge_runs(previous: Mapping[str, Any], run: RunOptions, names: Sequence[str]) -> dict[str, Any]:
    """The settings of a run: what the options say, and `previous` where they say nothing.

    Args:
        previous: an image's settings, or {}.
        run: the options.
        names: of the experts.
    """
    steps = ByExpert.read("--steps", run.steps, whole, own={"sol": run.sol_steps, "lune": run.lune_steps})
    listed = run.router is not None and run.router.startswith("steps")
    if listed and steps:
        raise ValueError("--router steps brings its own count: leave out --steps")
    settings = _route(previous, run) | ({} if listed else steps_over(previous, steps, names))
    own = {"sol": run.sol_guidance, "lune": run.lune_guidance}
    solver = ByExpert.read("--solver", run.solver)
    shift = ByExpert.read("--shift", run.shift, number)
    return settings | over_previous(
        _without_levels(_without_levels(previous, solver, names), shift, names),
        names,
        guidance_scale=ByExpert.read("--guidance", run.guidance, number, own=own),
        solver=solver,
        levels=ByExpert.read("--levels", run.levels, levels),
        shift=shift,
        eta=ByExpert.read("--eta", run.eta, number),
        guidance_window=ByExpert.read("--guidance-window", run.guidance_window, window),
        guidance_rescale=ByExpert.read("--guidance-rescale", run.guidance_rescale, number),
        guider=ByExpert.read("--guider", run.guider),
        reuse=ByExpert.read("--reuse", run.reuse, full_calls),
        budget=ByExpert("--budget", run.budget),
    )


def _without_levels(previous: Mapping[str, Any], given: ByExpert, names: Sequence[str]) -> Mapping[str, Any]:
    """An image's settings, but for the levels of experts that get another solver or shift."""
    if not given or previous.get("levels") is None:
        return previous
    from ..pipelines.settings import by_expert

    kept = by_expert("levels", previous["levels"], names)
    said = names if given.shared is not None else given.own
    left = {name: own for name, own in kept.items() if own is not None and name not in said}
    return {**previous, "levels": left or None}


def call_of(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What the pipeline's call is given for these settings, but for prompt, image and plan."""
    from ..pipelines.recorded import CALL_KEYS

    call = {key: settings[key] for key in CALL_KEYS if settings.get(key) is not None}
    if settings.get("router") is not None:
        call["router"] = parse_router(settings["router"], names)
    return call


def planned_experts(
    configs: Mapping[str, Mapping[str, Any]],
    defaults: Mapping[str, Any],
    call: Mapping[str, Any],
    reuse_shares: Shares | None = None,
) -> tuple[Any, ...]:
    """The experts as the pipeline will plan them for `call`, from their scheduler configs alone.

    reuse_shares: of `Model`, asked where calls may reuse features, when all else is checked.
    """
    from ..pipelines.settings import default_solvers, guidance_scales, hybrid_experts

    names = list(configs)
    guidance = guidance_scales(call.get("guidance_scale"), defaults, names)
    own = ("shift", "eta", "guidance_rescale", "guidance_window", "guider", "reuse")
    settings = {key: call.get(key) for key in own} | default_solvers(call, defaults, names)
    experts = hybrid_experts(configs, guidance, **settings)
    asked = reusing(experts, call)
    if not asked or reuse_shares is None:
        return experts
    may = {e.name for e in experts if e.reuse == AUTO and call.get("budget") is None}
    shares = reuse_shares(asked, may)
    able = (replace(e, reuse=None) if e.name in may - shares.keys() else e for e in experts)
    return tuple(replace(e, reuse_share=shares.get(e.name, e.reuse_share)) for e in able)


def reusing(experts: Sequence[Any], call: Mapping[str, Any]) -> list[str]:
    """The experts whose calls may reuse features, so that a plan says what these cost."""
    return [e.name for e in experts if e.reuse is not None or call.get("budget") is not None]


def borrowing(experts: Sequence[Any]) -> bool:
    """Whether a plan of these is made with diffusers' schedulers."""
    return any(is_borrowed(expert.solver) for expert in experts)


def compile_plan(
    configs: Mapping[str, Mapping[str, Any]],
    defaults: Mapping[str, Any],
    call: Mapping[str, Any],
    reuse_shares: Shares | None = None,
) -> Any:
    """The plan the pipeline will run for `call`.

    Args:
        configs: scheduler configs by expert, from noise to data.
        defaults: the model's.
        call: from `call_of`.
        reuse_shares: as `planned_experts` takes it.
    """
    from ..pipelines.budget import within_budget
    from ..pipelines.settings import enter_plan, hybrid_plan
    from ..sampling.routers import PerStep

    route = {key: call[key] for key in ("expert", "num_inference_steps", "handoff", "router") if key in call}

    def compiled(experts: Sequence[Any], count: int | None = None) -> Any:
        own: dict[str, Any] = route if count is None else route | {"num_inference_steps": count}
        whole = hybrid_plan(experts, defaults, **own)
        return whole if call.get("strength") is None else enter_plan(experts, whole, call["strength"])

    experts = planned_experts(configs, defaults, call, reuse_shares)
    if call.get("budget") is None:
        return compiled(experts)
    most = call.get("num_inference_steps", defaults["num_inference_steps"])
    most = None if isinstance(route.get("router"), PerStep) else most
    return within_budget(call["budget"], experts, most, compiled).plan
