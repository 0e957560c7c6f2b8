"""`moe-sampler tinyflux sample`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .models import Machine, Model, merge_models, quiet
from .options import MachineOptions, ModelOptions, takes
from .outputs import Files, Watch
from .settings import ByExpert, number, planned_experts

__all__ = ["sample"]

STUDENT, GUIDANCE, STEPS = "Student", "Guidance", "Steps and solvers"


def _option(text: str, panel: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar)


@dataclass(frozen=True)
class StudentOptions:
    """What the student was trained with."""

    encoders: Annotated[
        str | None,
        _option(
            "A pipeline with its VAE and text encoders. Default: the experts' own.",
            STUDENT,
            metavar="FOLDER|ID",
        ),
    ] = None
    vae: Annotated[str | None, _option("Another VAE.", STUDENT, metavar="FOLDER|ID")] = None
    clip: Annotated[str | None, _option("Another CLIP text encoder.", STUDENT, metavar="FOLDER|ID")] = None
    t5: Annotated[
        str | None, _option("T5 encoder. Default: --encoders' own, or none.", STUDENT, metavar="FOLDER|ID")
    ] = None
    t5_length: Annotated[int | None, _option("Tokens of T5. Default: 128.", STUDENT)] = None
    ema: Annotated[
        bool | None, _option("The averaged weights of a trainer's checkpoint.", STUDENT, "--ema/--no-ema")
    ] = None


@dataclass(frozen=True)
class RunOptions:
    """How the run goes."""

    sol_weight: Annotated[
        str | None,
        _option(
            "Sol's share beside the student: a number, which counts above the handoff, or knots over the "
            "noise level, as 1:0.6,0.8:0.",
            GUIDANCE,
            metavar="W|LEVEL:W,...",
        ),
    ] = None
    lune_weight: Annotated[
        str | None,
        _option("Lune's share; a number counts from the handoff down.", GUIDANCE, metavar="W|LEVEL:W,..."),
    ] = None
    handoff: Annotated[
        float | None,
        _option("Noise level between Sol and Lune. Default: the experts' own.", GUIDANCE, metavar="LEVEL"),
    ] = None
    guidance: Annotated[
        list[str] | None,
        _option(
            "Guidance scale; 1 turns guidance off. Default: 3 for the student, the experts' own.",
            GUIDANCE,
            metavar="SCALE|NAME=SCALE",
        ),
    ] = None
    steps: Annotated[
        list[str] | None, _option("Steps in all, or each one's. Default: 20.", STEPS, metavar="N|NAME=N")
    ] = None
    solver: Annotated[
        list[str] | None,
        _option("As in generate. Default: euler for the student.", STEPS, metavar="SOLVER|NAME=SOLVER"),
    ] = None
    shift: Annotated[
        list[str] | None,
        _option("k of shifted sigmas. Default: 3 for the student.", STEPS, metavar="K|NAME=K"),
    ] = None
    upstream_schedule: Annotated[
        bool | None,
        _option(
            "The student's steps crowd near the data, as checkpoints trained upstream need.",
            STEPS,
            "--upstream-schedule/--no-upstream-schedule",
        ),
    ] = None


@takes(of=StudentOptions, run=RunOptions, where=ModelOptions, machine=MachineOptions)
def sample(
    student: Annotated[
        str,
        typer.Argument(help="Folder, hub id, .safetensors or .pt file of a TinyFlux.", show_default=False),
    ],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="One or several prompts.", show_default=False)
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="PNG to write; several images are numbered. A name that ends in .safetensors gets latents.",
            metavar="PATH",
        ),
    ] = Path("image.png"),
    images: Annotated[int, typer.Option("--images", "-n", help="Images per prompt.", metavar="N")] = 1,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the first image; the next ones count up. Default: 0.", metavar="N"),
    ] = None,
    negative: Annotated[
        list[str] | None,
        typer.Option(
            help="Negative prompt, of all or of one: tinyflux, sol, lune.", metavar="TEXT|NAME=TEXT"
        ),
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="In pixels. Default: the experts' own.", metavar="N")
    ] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.", metavar="N")] = None,
    zoom: Annotated[
        int | None,
        typer.Option(
            help="Enlarge the written image. Default: small images to about 512 pixels.", metavar="N"
        ),
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Also write a contact sheet of every step, NAME.trace.png.")
    ] = False,
    animate: Annotated[
        bool, typer.Option("--animate", help="Also write the steps as an animation, NAME.webp.")
    ] = False,
    like: Annotated[
        Path | None,
        typer.Option(
            help="Take the settings of an image that `sample` made; options given here override them.",
            metavar="PATH",
        ),
    ] = None,
    *,
    of: StudentOptions,
    run: RunOptions,
    where: ModelOptions,
    machine: MachineOptions,
) -> None:
    """Make images with a student, alone or guided by Sol and Lune.

    `moe-sampler tinyflux sample runs/student "a castle at dusk" -o castle.png`

    `moe-sampler tinyflux sample runs/student "a castle at dusk" --sol-weight 0.5 --lune-weight 0.3`

    A weight is the expert's share of the prediction, the student has the rest. The settings are in each PNG's
    metadata, for --like.
    """
    from ..viewing.images import read_settings

    # What is wrong with the settings, the folder or the machine shows before any weights are read.
    previous = {} if like is None else read_settings(like)
    if like is not None and "student" not in previous:
        raise ValueError(f"{like} was not made by a student: use `moe-sampler generate --like`")
    prompts = prompts or ([previous["prompt"]] if "prompt" in previous else [])
    if not prompts:
        raise ValueError("give a prompt, or --like IMAGE")
    if images < 1:
        raise ValueError(f"images per prompt must be at least 1, got {images}")
    if machine.offload != "none":
        raise ValueError("experts that guide a student work beside it: leave out --offload")
    model = Model(merge_models(previous, where), where.local_files_only)
    plain = dict(seed=seed, height=height, width=width, zoom=zoom, handoff=run.handoff)
    plain |= dict(upstream_schedule=run.upstream_schedule, **vars(of))
    settings = {"seed": 0} | _merged(previous, plain)
    settings |= _weights(previous, run)
    guided = any(f"{name}_weight" in settings for name in ("sol", "lune"))
    configs, defaults = model.training() if guided else ({}, {})
    settings |= _spelled_out(previous | settings, defaults, list(configs))
    settings |= _by_name(previous | settings, run, negative, ("tinyflux", *configs))
    if settings.get("zoom", 1) < 1:
        raise ValueError(f"zoom must be at least 1, got {settings['zoom']}")
    call = {key: settings[key] for key in _CALL if key in settings}
    latents = output.suffix == ".safetensors"
    if latents and (trace or animate):
        raise ValueError("--trace and --animate go with images: give a name that ends in .png")
    files = Files(output, len(prompts) * images, trace, animate)
    computer = Machine.read(machine, previous)
    _check_plan(call, configs, defaults)

    pipe = _load(student, model, settings, computer, guided)
    watch = Watch(len(prompts) * images, machine.batch_size) if trace or animate else None
    if watch is not None:
        call |= {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": watch.tensor_inputs}
    result = pipe(
        prompts,
        num_images_per_prompt=images,
        batch_size=machine.batch_size,
        output_type="latent" if latents else "pil",
        **call,
    )
    place = str(Path(student).resolve()) if Path(student).exists() else student
    record = {"student": place} | settings | model.settings | {"dtype": computer.dtype}
    for index in range(len(result.images)):
        own = {"prompt": prompts[index // images], "seed": result.seeds[index]}
        files.write(pipe, result, index, record | own, watch)


_NAMED = ("guidance_scale", "shift", "solver", "negative_prompt")
_CALL = (
    *("seed", "height", "width", "handoff", "sol_weight", "lune_weight", "upstream_schedule"),
    *("num_inference_steps", *_NAMED),
)
"""Settings that the pipeline's call takes as they are."""


def _merged(previous: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, else what the image before was made with."""
    values = {key: previous.get(key) if value is None else value for key, value in given.items()}
    return {key: value for key, value in values.items() if value is not None}


def _weights(previous: Mapping[str, Any], run: RunOptions) -> dict[str, Any]:
    """sol_weight and lune_weight, where they aren't 0."""
    texts = {"sol_weight": run.sol_weight, "lune_weight": run.lune_weight}
    given = {
        key: None if text is None else _weight(f"--{key.replace('_', '-')}", text)
        for key, text in texts.items()
    }
    return {key: value for key, value in _merged(previous, given).items() if value != 0.0}


def _weight(option: str, text: str) -> float | list[list[float]]:
    """W, or LEVEL:W,LEVEL:W ..."""
    try:
        if ":" not in text:
            return number(text)
        return [[number(level), number(share)] for level, share in (k.split(":") for k in text.split(","))]
    except ValueError:
        raise ValueError(f"{option} {text}: give a number, or knots LEVEL:WEIGHT as in 1:0.6,0.8:0") from None


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("give a whole number")
    return int(text)


def _by_name(
    previous: Mapping[str, Any], run: RunOptions, negative: list[str] | None, names: Sequence[str]
) -> dict[str, Any]:
    """Settings that are one for all, or by name."""
    given = (
        ByExpert.read("--guidance", run.guidance, number),
        ByExpert.read("--shift", run.shift, number),
        ByExpert.read("--solver", run.solver),
        ByExpert.read("--negative", negative, known=names),
    )
    steps = ByExpert.read("--steps", run.steps, _whole)
    if steps.shared is not None and steps.own:
        raise ValueError("give either a number of steps in all or each expert's, not both")
    merged = {key: value.over(previous.get(key), names) for key, value in zip(_NAMED, given, strict=True)}
    merged["num_inference_steps"] = steps.shared or steps.own or previous.get("num_inference_steps")
    return {key: value for key, value in merged.items() if value is not None}


def _spelled_out(
    settings: Mapping[str, Any], defaults: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """The defaults of what isn't set, so that the record means the same when those change."""
    from moe_sampler.tinyflux.sampling.guided import GUIDANCE_SCALE

    from ..pipelines.settings import by_expert

    found = {"num_inference_steps": 20} | ({"handoff": defaults["handoff"]} if names else {})
    found = {key: value for key, value in found.items() if key not in settings}
    scales = {"tinyflux": GUIDANCE_SCALE} | {name: defaults[f"{name}_guidance"] for name in names}
    before = by_expert("guidance_scale", settings.get("guidance_scale"), scales)
    given = {name: value for name, value in before.items() if value is not None}
    return found | {"guidance_scale": scales | given}


def _check_plan(
    call: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any]
) -> None:
    """Plan the run without any weights."""
    from moe_sampler.tinyflux.sampling.guided import GuidedRouter, guided_experts, guided_plan

    keys = ("guidance_scale", "shift", "solver", "upstream_schedule")
    student, *guides = guided_experts(
        None,
        configs,
        lambda **settings: planned_experts(configs, defaults, settings),
        **{key: call[key] for key in keys if key in call},
    )
    keys = ("sol_weight", "lune_weight")
    weights = {key.removesuffix("_weight"): call[key] for key in keys if key in call}
    handoff = call.get("handoff", defaults.get("handoff"))
    router = GuidedRouter(**weights) if handoff is None else GuidedRouter(**weights, handoff=handoff)
    guided_plan(student, guides, router, call.get("num_inference_steps"))


def _load(student: str, model: Model, settings: Mapping[str, Any], machine: Machine, guided: bool) -> Any:
    """The pipeline."""
    import torch

    from moe_sampler.tinyflux.sampling.pipeline import StudentPipeline

    quiet()
    experts = model.load(machine) if guided else None
    own = {key: settings[key] for key in ("vae", "clip", "t5", "t5_length", "ema") if key in settings}
    return StudentPipeline.from_pretrained(
        student,
        experts,
        encoders=settings.get("encoders", None if guided else model.shared),
        dtype=getattr(torch, machine.dtype),
        device=machine.device,
        **own,
    )
