"""`moe-sampler generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..sampling.reuse import AUTO
from .asked import Asked, read_previous, start_image
from .commands import takes
from .demo_limits import warn_of_limits
from .generate_rows import RowOptions, generate_rows
from .options import OutputOptions, PipelineOptions, RunOptions, SizeOptions
from .outputs import Pictures

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


@takes(
    out=OutputOptions,
    size=SizeOptions,
    begin=StartOptions,
    rows=RowOptions,
    run=RunOptions,
    where=PipelineOptions,
)
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="One or several prompts.", show_default=False)
    ] = None,
    *,
    out: OutputOptions,
    size: SizeOptions,
    begin: StartOptions,
    rows: RowOptions,
    run: RunOptions,
    where: PipelineOptions,
) -> None:
    """Make images.

    `moe-sampler generate "a castle with two towers, at dusk" --seed 10 -o castle.png`

    `moe-sampler generate "a portrait" "a city street at night" -n 3 --seed 7 -o pictures.png`

    `moe-sampler generate --prompts prompts.csv --output-dir pictures`

    The settings are in each image's metadata, so `moe-sampler generate --like castle.png -o again.png` makes
    it again. VALUE|NAME=VALUE options may be repeated: `--guidance 5 --guidance lune=3`.
    """
    # What is wrong with the settings, the folder or the machine shows before any weights are read.
    rows.check(prompts, out)
    previous = read_previous(out, where, begin)
    if rows.prompts_file is not None:
        asked = Asked.read(previous, out.plan, begin.strength, run, where)
        settings = asked.settings(asked.previous, run, size, begin.strength)
        generate_rows(asked, settings, rows, out, begin.image, where.batch_size)
        return
    pictures = Pictures(prompts, out, previous)
    asked = Asked.read(previous, out.plan, begin.strength, run, where)
    settings = asked.settings(asked.previous, run, size, begin.strength) | pictures.settings
    start = start_image(settings, asked.previous, begin.image)
    asked.import_for_plan(settings)
    compiled = asked.compiled(settings, image=start is not None)
    sizes = asked.model.size(settings, start)
    if not out.quiet:
        if asked.model.is_demo:
            warn_of_limits(pictures.prompts, [settings.get("negative_prompt")], [sizes])
        if settings.get("reuse") == AUTO and compiled.plan.reuses:
            told = compiled.plan.steps_and_cost()
            typer.echo(f"{told}: two of three reuse features; --reuse 1 lets none", err=True)

    asked.import_pipelines()
    pipe = asked.load()
    record = compiled.record | sizes | asked.of_all
    call = compiled.call | sizes | {"image": start}
    pictures.make(pipe, compiled.plan, call, where.batch_size, record)
