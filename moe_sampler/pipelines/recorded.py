"""What a picture remembers of the call that made it: settings that mean the same when defaults change.

Flat JSON, under the names that the pipeline's call has for them; where one value may stand for all experts it
is that value or a mapping by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..sampling.reuse import AUTO, AUTO_EVERY
from .settings import by_expert, default_solvers, own_steps, with_own

if TYPE_CHECKING:
    from ..sampling.plan import SamplingPlan

__all__ = [
    "CALL_KEYS",
    "plan_settings",
    "record_defaults",
    "recorded_call",
    "reuse_in_full",
    "scales_in_full",
    "stepping_in_full",
    "without_plan",
]

CALL_KEYS = (
    *("negative_prompt", "seed", "expert", "num_inference_steps", "handoff", "shift", "solver", "eta"),
    "levels",
    *("guidance_scale", "guidance_window", "guidance_rescale", "guider", "height", "width", "strength"),
    *("reuse", "budget"),
)
"""Settings that the pipeline's call takes as they are."""
_DECIDED = (
    *("expert", "num_inference_steps", "handoff", "router", "solver", "levels", "shift", "eta", "strength"),
    *("guidance_scale", "guidance_window", "guidance_rescale", "guider", "reuse", "budget"),
    *("sol_weight", "lune_weight", "upstream_schedule"),
)
"""Settings that a plan takes the place of."""
_OTHERWISE_SAID = ("sol_steps", "lune_steps", "sol_guidance", "lune_guidance", "image")
"""Arguments that are in other settings, or that no setting keeps and no plan either."""


def without_plan(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings but for what a plan decides, and the plan."""
    return {key: value for key, value in settings.items() if key not in (*_DECIDED, "plan")}


def plan_settings(plan: SamplingPlan) -> dict[str, Any]:
    """The plan as an image remembers it, to the bit."""
    return {"plan": json.loads(plan.to_json())}


def recorded_call(
    call: Mapping[str, Any], plan: SamplingPlan, defaults: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """What a picture remembers of a pipeline's call, but for prompt and seed: its settings in full; of a call
    whose steps they don't say, because it was given a plan, a router, levels or objects, the plan.

    Args:
        call: the arguments.
        plan: that was run.
        defaults: the pipeline's.
        names: of the experts.
    """
    call = {name: value for name, value in call.items() if value is not None}
    own = {name: call.get(f"{name}_guidance") for name in ("sol", "lune")}
    steps = own_steps(
        call.get("num_inference_steps"), names, sol=call.get("sol_steps"), lune=call.get("lune_steps")
    )
    kept = (*CALL_KEYS, "clip_skip")
    settings = {key: call[key] for key in kept if key in call}
    settings |= {} if steps is None else {"num_inference_steps": steps}
    scales = with_own("guidance_scale", call.get("guidance_scale"), names, **own)
    settings |= {} if scales is None else {"guidance_scale": scales}
    try:
        plain = json.loads(json.dumps(settings))
    except TypeError:  # a scheduler, a guider ...
        plain = None
    if plain is None or call.keys() - {*kept, *_OTHERWISE_SAID}:
        return without_plan(settings) | plan_settings(plan)
    return record_defaults(reuse_in_full(plain, plan, names), defaults, names)


def reuse_in_full(settings: Mapping[str, Any], plan: SamplingPlan, names: Sequence[str]) -> dict[str, Any]:
    """The settings with what AUTO, or a speed's default, came to in the plan; beside a budget, which decides
    it, without AUTO."""
    given = by_expert("reuse", settings.get("reuse", AUTO), names)
    if AUTO not in given.values():
        return dict(settings)
    others = {key: value for key, value in settings.items() if key != "reuse"}
    budgeted = settings.get("budget") is not None
    calls = () if budgeted else (call for step in plan.steps for call in step.calls)
    reused = {call.name for call in calls if call.reuses}
    meant = {name: AUTO_EVERY if own == AUTO and name in reused else own for name, own in given.items()}
    kept = {name: own for name, own in meant.items() if own not in (None, AUTO)}
    if kept:
        return others | {"reuse": kept}
    return others if budgeted or "reuse" not in settings else others | {"reuse": 1}


def scales_in_full(given: Any, defaults: Mapping[str, float]) -> dict[str, float]:
    """Everyone's guidance scale, by name: what was given for all or by name, else the default."""
    named = by_expert("guidance_scale", given, list(defaults))
    return {name: default if named[name] is None else named[name] for name, default in defaults.items()}


def record_defaults(
    settings: Mapping[str, Any], defaults: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """The settings with the model's defaults spelled out, so that they mean the same when those change."""
    router = settings.get("router")
    wanted: list[str] = []
    if not (router or "").startswith("steps") and not _lists_all_levels(settings, names):
        wanted.append("num_inference_steps")
    if router is None and len(names) > 1 and settings.get("expert", "hybrid") == "hybrid":
        wanted.append("handoff")
    own = {name: defaults[f"{name}_guidance"] for name in names}
    scales = scales_in_full(settings.get("guidance_scale"), own)
    found = {key: defaults[key] for key in wanted} | dict(settings) | {"guidance_scale": scales}
    return found | stepping_in_full(settings, defaults, names)


def stepping_in_full(
    settings: Mapping[str, Any], defaults: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """Solvers and levels that are given by name or left to the model, by name."""
    whole = {
        key: {name: value for name, value in values.items() if value is not None}
        for key, values in default_solvers(settings, defaults, names).items()
        if not isinstance(settings.get(key), (str, list))  # one for all says so itself
    }
    return {key: values for key, values in whole.items() if values}


def _lists_all_levels(settings: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether the levels of all that work are listed, which says how many steps there are."""
    alone = settings.get("expert", "hybrid")
    levels = by_expert("levels", settings.get("levels"), names)
    return all(isinstance(levels.get(name), list) for name in (names if alone == "hybrid" else [alone]))
