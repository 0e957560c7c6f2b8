"""From options to settings, as they are written into images, and from settings to a call and its plan.

Settings are flat JSON. Where one value may stand for all experts it is that value or a mapping by name, but
for guidance and steps, which are `<name>_guidance` and `<name>_steps`, as in a `model_index.json`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .options import ExpertOptions, GuidanceOptions, StepOptions

__all__ = [
    "ByExpert",
    "call_of",
    "compile_plan",
    "merge_runs",
    "number",
    "parse_router",
    "planned_experts",
    "record_defaults",
    "split_name",
]

_NAMED = re.compile(r"([a-z][a-z0-9_]*)=(.*)", re.DOTALL)
_CALL_KEYS = (
    *("negative_prompt", "seed", "expert", "num_inference_steps", "handoff", "shift", "solver", "eta"),
    *("guidance_window", "guidance_rescale", "height", "width", "strength"),
)
"""Settings that the pipeline's call takes as they are."""

_ROUTERS = '"crossfade START END", "spans NAME END NAME END ...", "steps NAME COUNT NAME COUNT ..."'


def split_name(option: str, text: str) -> tuple[str, str]:
    """NAME=VALUE, or a ValueError."""
    match = _NAMED.fullmatch(text)
    if match is None:
        raise ValueError(f"{option} {text}: give NAME=..., with an expert's name")
    return match[1], match[2]


@dataclass(frozen=True)
class ByExpert:
    """An option's value for all experts, and for some of them alone."""

    option: str
    shared: Any = None
    own: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        option: str,
        texts: Sequence[str] | None,
        read: Callable[[str], Any] = str,
        known: Sequence[str] | None = None,
        **own: Any,
    ) -> ByExpert:
        """From a repeated option.

        Args:
            option: its name, for messages.
            texts: VALUE or NAME=VALUE.
            read: from text to value; a ValueError says that it can't be.
            known: names that count as such, any by default; other texts with = are values.
            own: from further options, None where they weren't given.
        """
        shared, found = None, {name: value for name, value in own.items() if value is not None}
        for text in texts or ():
            match = _NAMED.fullmatch(text)
            named = match is not None and (known is None or match[1] in known)
            name, rest = (match[1], match[2]) if named else (None, text)
            try:
                value = read(rest)
            except ValueError as error:
                raise ValueError(f"{option} {text}: {error}") from None
            if (shared is not None) if name is None else (name in found):
                raise ValueError(f"{option} {'of ' + name if name else 'for all experts'} is given twice")
            shared, found = (value, found) if name is None else (shared, {**found, name: value})
        return cls(option, shared, found)

    def __bool__(self) -> bool:
        return self.shared is not None or bool(self.own)

    def over(self, previous: Any, names: Sequence[str]) -> Any:
        """This in place of `previous`, which remains for experts that nothing was said of."""
        unknown = [name for name in self.own if name not in names]
        if unknown:
            raise ValueError(f"{self.option} names {unknown[0]}, but the experts are {', '.join(names)}")
        if not self.own:
            return previous if self.shared is None else self.shared
        rest = previous if self.shared is None else self.shared
        values = {name: rest.get(name) if isinstance(rest, Mapping) else rest for name in names}
        values |= self.own
        return {name: value for name, value in values.items() if value is not None}


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("give a number") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("give a whole number") from None


def _window(text: str) -> list[float]:
    levels = text.split(":")
    if len(levels) != 2:
        raise ValueError("give HIGH:LOW, as in 0.9:0.3")
    return [number(level) for level in levels]


def parse_router(text: str, names: Sequence[str]) -> Any:
    """A router from its description in words.

    Args:
        text: "crossfade START END", between the first two experts; "spans NAME END ...", from noise to data;
            or "steps NAME COUNT ...", where NAME may be two names joined by + that share a step equally.
        names: of the experts.

    Raises:
        ValueError: anything else.
    """
    from ..sampling.routers import Crossfade, PerStep, Spans, active_experts

    kind, *words = text.split() or [""]
    try:
        if kind == "crossfade" and len(words) == 2 and len(names) > 1:
            return Crossfade(names[0], names[1], *map(number, words))
        if kind == "spans" and words and len(words) % 2 == 0:
            spans = Spans(tuple(zip(words[::2], map(number, words[1::2]), strict=True)))
            for name in words[::2]:
                active_experts(lambda _noise, name=name: {name: 1.0}, 0.0, names)
            return spans
        if kind == "steps" and words and len(words) % 2 == 0:
            steps: list[dict[str, float]] = []
            for who, count in zip(words[::2], words[1::2], strict=True):
                together = who.split("+")
                steps += [{name: 1.0 / len(together) for name in together}] * _whole(count)
            router = PerStep(steps)
            router.weights(names)
            return router
    except ValueError as error:
        raise ValueError(f'--router "{text}": {error}') from None
    raise ValueError(f'--router "{text}": use one of {_ROUTERS}')


def _steps(previous: Mapping[str, Any], options: StepOptions, names: Sequence[str]) -> dict[str, int]:
    given = ByExpert.read("--steps", options.steps, _whole, sol=options.sol_steps, lune=options.lune_steps)
    if given.shared is not None and given.own:
        raise ValueError("give either a number of steps in all or each expert's, not both")
    if options.router is not None and options.router.startswith("steps"):
        if given:
            raise ValueError("--router steps brings its own count: leave out --steps")
        return {}
    if not given:
        kept = {key: value for key, value in previous.items() if key.removesuffix("_steps") in names}
        total = {key: previous[key] for key in ("num_inference_steps",) if key in previous}
        return kept if any(key.endswith("_steps") for key in kept) else total
    given.over(None, names)
    if given.own:
        return {f"{name}_steps": count for name, count in given.own.items()}
    return {"num_inference_steps": given.shared}


def _route(previous: Mapping[str, Any], run: StepOptions, handoff: Sequence[float] | None) -> dict[str, Any]:
    """expert, handoff and router: what was given, and of the previous what doesn't contradict it."""
    if run.router is not None and handoff:
        raise ValueError("give either --handoff or --router, not both")
    expert = previous.get("expert") if run.expert is None else run.expert
    settings = {} if expert is None else {"expert": expert}
    if run.router is not None:
        return settings | {"router": run.router}
    if handoff:
        return settings | {"handoff": handoff[0] if len(handoff) == 1 else list(handoff)}
    if run.expert in (None, "hybrid"):
        settings |= {key: previous[key] for key in ("handoff", "router") if key in previous}
    return settings


def merge_runs(
    previous: Mapping[str, Any],
    run: StepOptions,
    experts: ExpertOptions,
    guidance: GuidanceOptions,
    names: Sequence[str],
) -> dict[str, Any]:
    """The settings of a run: what the options say, and `previous` where they say nothing.

    Args:
        previous: an image's settings, or {}.
        run, experts, guidance: the options.
        names: of the experts.
    """
    settings = _route(previous, run, experts.handoff) | _steps(previous, run, names)
    scales = ByExpert.read(
        "--guidance",
        guidance.guidance,
        number,
        sol=guidance.sol_guidance,
        lune=guidance.lune_guidance,
    )
    before = {name: previous[f"{name}_guidance"] for name in names if f"{name}_guidance" in previous}
    scales = scales.over(before, names)
    scales = scales if isinstance(scales, Mapping) else dict.fromkeys(names, scales)
    settings |= {f"{name}_guidance": scale for name, scale in scales.items()}
    others = {
        "solver": ByExpert.read("--solver", experts.solver),
        "shift": ByExpert.read("--shift", experts.shift, number),
        "eta": ByExpert.read("--eta", experts.eta, number),
        "guidance_window": ByExpert.read("--guidance-window", guidance.guidance_window, _window),
        "guidance_rescale": ByExpert.read("--guidance-rescale", guidance.guidance_rescale, number),
    }
    settings |= {key: given.over(previous.get(key), names) for key, given in others.items()}
    return {key: value for key, value in settings.items() if value is not None}


def call_of(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What the pipeline's call is given for these settings, but for prompt and image."""
    call = {key: settings[key] for key in _CALL_KEYS if settings.get(key) is not None}
    guidance = {name: settings[f"{name}_guidance"] for name in names if f"{name}_guidance" in settings}
    steps = {name: settings[f"{name}_steps"] for name in names if f"{name}_steps" in settings}
    if guidance:
        call["guidance_scale"] = guidance
    if steps:
        call["num_inference_steps"] = steps
    if settings.get("router") is not None:
        call["router"] = parse_router(settings["router"], names)
    return call


def planned_experts(
    configs: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any], call: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The experts as the pipeline will plan them for `call`, from their scheduler configs alone."""
    from ..pipelines.settings import guidance_scales, hybrid_experts

    guidance = guidance_scales(call.get("guidance_scale"), defaults, list(configs))
    own = ("shift", "solver", "eta", "guidance_rescale", "guidance_window")
    return hybrid_experts(configs, guidance, **{key: call.get(key) for key in own})


def compile_plan(
    configs: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any], call: Mapping[str, Any]
) -> Any:
    """The plan the pipeline will run for `call`.

    Args:
        configs: scheduler configs by expert, from noise to data.
        defaults: the model's.
        call: from `call_of`.
    """
    from ..pipelines.settings import enter_plan, hybrid_plan

    experts = planned_experts(configs, defaults, call)
    route = ("expert", "num_inference_steps", "handoff", "router")
    whole = hybrid_plan(experts, defaults, **{key: call[key] for key in route if key in call})
    return whole if call.get("strength") is None else enter_plan(experts, whole, call["strength"])


def record_defaults(
    settings: Mapping[str, Any], defaults: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """The settings with the model's defaults spelled out, so that they mean the same when those change."""
    wanted = [f"{name}_guidance" for name in names]
    router = settings.get("router")
    own_steps = any(f"{name}_steps" in settings for name in names)
    if not own_steps and not (router or "").startswith("steps"):
        wanted.append("num_inference_steps")
    if router is None and len(names) > 1 and settings.get("expert", "hybrid") == "hybrid":
        wanted.append("handoff")
    return {**{key: defaults[key] for key in wanted}, **settings}
