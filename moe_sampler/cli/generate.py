"""`moe-sampler generate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .by_name import ByExpert, over_previous
from .commands import takes
from .demo_words import warn_of_strange_words
from .like import check_places, read_like
from .loras import read_loras
from .machine import Machine
from .models import Model
from .options import OutputOptions, PipelineOptions, RunOptions, SizeOptions
from .outputs import Pictures
from .plans import find_plan, plan_settings, without_plan
from .settings import call_of, compile_plan, merge_runs, merged, planned_experts, record_defaults

__all__ = ["generate"]


@dataclass(frozen=True)
class StartOptions:
    """An image to start from."""

    image: Annotated[
        Path | None,
        typer.Option(
            help="Start from this image instead of from noise. What is made has its proportions. "
            "MOE_SAMPLER_MAX_PIXELS raises the limit on its pixels.",
            metavar="PATH",
        ),
    ] = None
    strength: Annotated[
        float | None,
        typer.Option(
            help="With --image: how much is changed: the share of the steps that are run. Default: 0.8.",
        ),
    ] = None


@takes(out=OutputOptions, size=SizeOptions, begin=StartOptions, run=RunOptions, where=PipelineOptions)
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="One or several prompts.", show_default=False)
    ] = None,
    *,
    out: OutputOptions,
    size: SizeOptions,
    begin: StartOptions,
    run: RunOptions,
    where: PipelineOptions,
) -> None:
    """Make images.

    `moe-sampler generate "a castle with two towers, at dusk" -o castle.png`

    `moe-sampler generate "a portrait" "a city street at night" -n 3 --seed 7 -o pictures.png`

    The settings are in each image's metadata, so `moe-sampler generate --like castle.png -o again.png` makes
    it again. VALUE|NAME=VALUE options may be repeated: `--guidance 5 --guidance lune=3`.
    """
    # What is wrong with the settings, the folder or the machine shows before any weights are read.
    previous = read_like(out)
    if "student" in previous:
        raise ValueError(f"{out.like} was made by a student: use `moe-sampler tinyflux sample --like`")
    check_places(out, previous, where, begin)
    pictures = Pictures(prompts, out, previous)
    plan = find_plan(out.plan, previous, run)
    if plan is not None:
        if begin.strength is not None:
            raise ValueError("a plan decides which steps are run: leave out --strength")
        previous = without_plan(previous)
    model = Model.read(where, previous)
    configs, defaults = model.training()
    names = list(configs)
    settings = {} if plan is not None else merge_runs(previous, run, names)
    plain = {"height": size.height, "width": size.width, "strength": begin.strength}
    settings |= pictures.settings | merged(previous, plain)
    negative = ByExpert.read("--negative", size.negative, known=names)
    settings |= over_previous(previous, names, negative_prompt=negative)
    start = _start_image(settings, previous, begin.image)
    loras, text_encoder = read_loras(previous, where, names)
    if loras:
        settings |= {"loras": [[each.expert, each.path, each.scale] for each in loras]}
        settings |= {} if text_encoder is None else {"lora_text_encoder": text_encoder}
    if plan is not None:
        from ..pipelines.settings import given_plan

        settings.pop("strength", None)
        given_plan(plan, planned_experts(configs, defaults, {}), image=start is not None)
        record, call = settings | plan_settings(plan), call_of(settings, names) | {"plan": plan}
    else:
        record, call = record_defaults(settings, defaults, names), call_of(settings, names)
        plan = compile_plan(configs, defaults, call, model.reuse_shares)
    computer = Machine.read(where, previous)
    sizes = model.size(settings, start)
    if not out.quiet:
        warn_of_strange_words(model, pictures.prompts, settings.get("negative_prompt"))

    pipe = model.load(computer, loras, text_encoder)
    record |= sizes | dict(model.settings) | computer.settings
    pictures.make(pipe, plan, call | sizes | {"image": start}, where.batch_size, record)


def _start_image(settings: dict[str, Any], previous: Mapping[str, Any], image: Path | None) -> Any:
    """The PIL image to start from, its place noted in `settings`."""
    from ..data.digests import content
    from ..data.pictures import read_picture
    from ..pipelines.checks import check_strength

    kept = image is None and previous.get("image") is not None
    path = Path(previous["image"]) if kept else image
    if path is None:
        check_strength(settings.get("strength"), None, None)
        return None
    opened, digest = read_picture(path), content(path)
    if kept and digest != previous["image_sha256"]:
        raise ValueError(f"{path} is no longer the image that was started from: give --image")
    settings |= {"image": str(path.resolve()), "image_sha256": digest}
    settings["strength"] = check_strength(settings.get("strength"), opened, None)
    return opened
