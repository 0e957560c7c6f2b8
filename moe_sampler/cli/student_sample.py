"""`moe-sampler tinyflux sample`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .by_name import ByExpert, full_calls, levels, number, over_previous, steps_over, whole
from .commands import takes
from .demo_limits import warn_of_limits
from .like import check_places, read_like
from .loras import Lora
from .machine import Machine, quiet
from .models import DEMO, Model, recorded_student, student_place
from .options import (
    GUIDANCE,
    STEPS,
    STUDENT,
    EncoderOptions,
    MachineOptions,
    ModelOptions,
    OutputOptions,
    ReuseOptions,
    ScaleOptions,
    SizeOptions,
    SolverOptions,
    option,
)
from .outputs import Pictures
from .plans import find_plan
from .settings import Shares, merged, planned_experts

if TYPE_CHECKING:
    from moe_sampler.tinyflux.model.config import TinyFluxConfig

    from ..sampling.plan import SamplingPlan

__all__ = ["STUDENT_CALL", "checked_plan", "sample"]


@dataclass(frozen=True)
class StudentOptions(EncoderOptions):
    """The student, and what it was trained with."""

    student: Annotated[
        str | None,
        option(
            "Folder, hub id, .safetensors or .pt file of a TinyFlux. Default: demo, the small one in the "
            "package.",
            STUDENT,
            metavar="FOLDER|ID|FILE",
        ),
    ] = None
    ema: Annotated[
        bool | None, option("The averaged weights of a trainer's checkpoint.", STUDENT, "--ema/--no-ema")
    ] = None
    lora: Annotated[
        list[str] | None,
        option("A LoRA of the student, with a scale if wanted.", STUDENT, metavar="PATH[@SCALE]"),
    ] = None


@dataclass(frozen=True)
class StudentRunOptions(ReuseOptions, ScaleOptions, SolverOptions):
    """How the run goes."""

    sol_weight: Annotated[
        str | None,
        option(
            "Sol's share beside the student: a number, which counts above the handoff, or knots over the "
            "noise level, as 1:0.6,0.8:0.",
            GUIDANCE,
            metavar="W|LEVEL:W,...",
        ),
    ] = None
    lune_weight: Annotated[
        str | None,
        option("Lune's share; a number counts from the handoff down.", GUIDANCE, metavar="W|LEVEL:W,..."),
    ] = None
    handoff: Annotated[
        float | None,
        option("Noise level between Sol and Lune. Default: the experts' own.", GUIDANCE, metavar="LEVEL"),
    ] = None
    steps: Annotated[
        list[str] | None, option("Steps in all, or each one's. Default: 20.", STEPS, metavar="N|NAME=N")
    ] = None
    upstream_schedule: Annotated[
        bool | None,
        option(
            "The student's steps crowd near the data, as checkpoints trained upstream need. Default: as its "
            "config says.",
            STEPS,
            "--upstream-schedule/--no-upstream-schedule",
        ),
    ] = None


@dataclass(frozen=True)
class GuideOptions(MachineOptions, ModelOptions):
    """Who guides the student, and what computes."""


@takes(out=OutputOptions, size=SizeOptions, of=StudentOptions, run=StudentRunOptions, where=GuideOptions)
def sample(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="One or several prompts.", show_default=False)
    ] = None,
    *,
    out: OutputOptions,
    size: SizeOptions,
    of: StudentOptions,
    run: StudentRunOptions,
    where: GuideOptions,
) -> None:
    """Make images with a student, alone or guided by Sol and Lune.

    `moe-sampler tinyflux sample "a castle at dusk"`

    `moe-sampler tinyflux sample "a castle at dusk" --student runs/student --sol-weight 0.5`

    A weight is the expert's share of the prediction, the student has the rest. The settings are in each PNG's
    metadata, for --like.
    """
    from moe_sampler.tinyflux.model.loading import holds_pipeline, load_config
    from moe_sampler.tinyflux.sampling.expert import STUDENT as NAME

    from ..loading.hub import Hub
    from ..pipelines.recorded import plan_settings, without_plan

    # What is wrong with the settings, the folder or the machine shows before any weights are read.
    previous = read_like(out)
    if out.like is not None and "student" not in previous:
        raise ValueError(f"{out.like} was not made by a student: use `moe-sampler generate --like`")
    check_places(out, previous, where, of)
    pictures = Pictures(prompts, out, previous)
    if where.offload != "none":
        raise ValueError("experts that guide a student work beside it: leave out --offload")
    plan = find_plan(out.plan, previous, run)
    previous = previous if plan is None else without_plan(previous)
    model = Model.read(where, previous)
    plain = {"height": size.height, "width": size.width, **vars(of)}
    del plain["lora"], plain["student"]
    settings = pictures.settings | merged(previous, plain)
    loras = [Lora.read(text, NAME) for text in of.lora or ()]
    loras = loras or [Lora(*each) for each in previous.get("loras", ())]
    settings |= {"loras": [[NAME, each.path, each.scale] for each in loras]} if loras else {}
    weights = _weights(previous, run)
    guided = bool(weights) if plan is None else set(plan.experts) != {NAME}
    configs, defaults = model.training() if guided else ({}, {})
    names = (NAME, *configs)
    if plan is None:
        settings |= weights | _run_settings(previous, run, defaults, names)
    negative = ByExpert.read("--negative", size.negative, known=names)
    settings |= over_previous(previous, names, negative_prompt=negative)
    call = {key: settings[key] for key in STUDENT_CALL if key in settings}
    if plan is not None:
        settings |= plan_settings(plan)
    ema = bool(settings.get("ema"))
    named = of.student or previous.get("student") or DEMO
    student = student_place(named)

    def config() -> TinyFluxConfig:
        return load_config(student, ema=ema, local_files_only=where.local_files_only)

    prices = Prices(config, model.reuse_shares)
    compiled = checked_plan(plan, call, configs, defaults, prices)
    call |= {} if plan is None else {"plan": plan}
    computer = Machine.read(where, previous)
    known = config()
    if plan is None and "upstream_schedule" not in settings:
        own = {"upstream_schedule": known.schedule == "data"}
        settings, call = settings | own, call | own
        compiled = checked_plan(plan, call, configs, defaults, prices)

    if named == DEMO and not out.quiet:
        warn_of_limits(pictures.prompts, [settings.get("negative_prompt")], [settings])

    beside = holds_pipeline(Hub(local_files_only=where.local_files_only).look(student))
    told = (beside or known.encoders is not None) and not model.settings.get("model") and model.preset is None
    encoders = None if guided or told else model.shared
    pipe = _load(student, model, settings, computer, guided, encoders, where.local_files_only)
    _merge(pipe.student, loras)
    record = (
        {"student": recorded_student(named)} | settings | dict(model.settings) | {"dtype": computer.dtype}
    )
    pictures.make(pipe, compiled, call, where.batch_size, record)


STUDENT_CALL = (
    *("seed", "height", "width", "handoff", "sol_weight", "lune_weight", "upstream_schedule"),
    *("num_inference_steps", "guidance_scale", "shift", "solver", "levels", "negative_prompt"),
    *("reuse", "budget"),
)
"""Settings that the pipeline's call takes as they are."""


def _run_settings(
    previous: Mapping[str, Any],
    run: StudentRunOptions,
    defaults: Mapping[str, Any],
    names: Sequence[str],
) -> dict[str, Any]:
    """Steps, guidance, solvers and handoff, with the defaults spelled out, so that the record means the same
    when those change."""
    from moe_sampler.tinyflux.sampling.guided import GUIDANCE_SCALE

    from ..pipelines.recorded import scales_in_full, stepping_in_full

    student, *guides = names
    steps = ByExpert.read("--steps", run.steps, whole)
    settings = over_previous(
        previous,
        names,
        guidance_scale=ByExpert.read("--guidance", run.guidance, number),
        shift=ByExpert.read("--shift", run.shift, number),
        solver=ByExpert.read("--solver", run.solver),
        levels=ByExpert.read("--levels", run.levels, levels),
        reuse=ByExpert.read("--reuse", run.reuse, full_calls),
        budget=ByExpert("--budget", run.budget),
    )
    own = {student: GUIDANCE_SCALE} | {name: defaults[f"{name}_guidance"] for name in guides}
    settings["guidance_scale"] = scales_in_full(settings.get("guidance_scale"), own)
    settings |= stepping_in_full(settings, defaults, names)
    plain = {"handoff": run.handoff, "upstream_schedule": run.upstream_schedule}
    found = {"num_inference_steps": 20} | ({"handoff": defaults["handoff"]} if guides else {})
    return found | merged(previous, plain) | settings | steps_over(previous, steps, names)


def _weights(previous: Mapping[str, Any], run: StudentRunOptions) -> dict[str, Any]:
    """sol_weight and lune_weight, where they aren't 0."""
    texts = {"sol_weight": run.sol_weight, "lune_weight": run.lune_weight}
    given = {
        key: None if text is None else _weight(f"--{key.replace('_', '-')}", text)
        for key, text in texts.items()
    }
    return {key: value for key, value in merged(previous, given).items() if value != 0.0}


def _weight(option: str, text: str) -> float | list[list[float]]:
    """W, or LEVEL:W,LEVEL:W ..."""
    try:
        if ":" not in text:
            return number(text)
        return [[number(level), number(share)] for level, share in (k.split(":") for k in text.split(","))]
    except ValueError:
        raise ValueError(f"{option} {text}: give a number, or knots LEVEL:WEIGHT as in 1:0.6,0.8:0") from None


@dataclass(frozen=True)
class Prices:
    """What is asked for what a call that reuses features costs.

    Args:
        student: gives the student's config.
        guides: gives the shares of experts by name.
    """

    student: Callable[[], TinyFluxConfig]
    guides: Shares


def checked_plan(
    plan: SamplingPlan | None,
    call: Mapping[str, Any],
    configs: Mapping[str, Mapping[str, Any]],
    defaults: Mapping[str, Any],
    prices: Prices | None = None,
) -> SamplingPlan:
    """The run's plan, made without any weights; one that was given, if it fits.

    prices: asked where calls may reuse features.
    """
    from moe_sampler.tinyflux.sampling.expert import STUDENT
    from moe_sampler.tinyflux.sampling.guided import GuidedRouter, guided_experts, guided_plan
    from moe_sampler.tinyflux.sampling.reuse import reuse_share

    from ..pipelines.settings import by_expert, given_plan

    keys = ("guidance_scale", "shift", "solver", "levels", "upstream_schedule", "reuse")
    budget = call.get("budget")
    own = {key: call[key] for key in keys if key in call}
    reused = by_expert("reuse", call.get("reuse"), (STUDENT, *configs))
    if prices is not None and (budget is not None or reused[STUDENT] is not None):
        own["reuse_share"] = reuse_share(prices.student())

    def others(**settings: Any) -> Any:
        named = settings | {"budget": budget}
        return planned_experts(configs, defaults, named, None if prices is None else prices.guides)

    student, *guides = guided_experts(None, configs, others, **own)
    if plan is not None:
        given_plan(plan, [student, *guides], image=False)
        return plan
    keys = ("sol_weight", "lune_weight")
    weights = {key.removesuffix("_weight"): call[key] for key in keys if key in call}
    handoff = call.get("handoff", defaults.get("handoff"))
    router = GuidedRouter(**weights) if handoff is None else GuidedRouter(**weights, handoff=handoff)
    return guided_plan(student, guides, router, call.get("num_inference_steps"), budget)


def _load(
    student: str,
    model: Model,
    settings: Mapping[str, Any],
    machine: Machine,
    guided: bool,
    encoders: str | None,
    local_files_only: bool,
) -> Any:
    """The pipeline. encoders: where the settings name none."""
    from moe_sampler.tinyflux.sampling.pipeline import StudentPipeline

    quiet()
    experts = model.load(machine) if guided else None
    own = {key: settings[key] for key in ("vae", "clip", "t5", "t5_length", "ema") if key in settings}
    return StudentPipeline.from_pretrained(
        student,
        experts,
        encoders=settings.get("encoders", encoders),
        dtype=machine.torch_dtype,
        device=machine.device,
        local_files_only=local_files_only,
        **own,
    )


def _merge(student: Any, loras: Sequence[Lora]) -> None:
    """Into the weights, as a run has one scale."""
    from moe_sampler.tinyflux.model.lora import merge_lora, read_lora

    for each in loras:
        merge_lora(student, read_lora(each.path, student), each.scale)
