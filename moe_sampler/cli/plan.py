"""`moe-sampler plan`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .commands import takes
from .imports import import_pipelines
from .models import Model
from .options import ModelOptions, RunOptions
from .settings import borrowing, call_of, compile_plan, merge_runs, planned_experts, reusing

if TYPE_CHECKING:
    from ..sampling.plan import SamplingPlan

__all__ = ["plan"]


@takes(run=RunOptions, where=ModelOptions)
def plan(
    strength: Annotated[
        float | None,
        typer.Option(help="As when starting from an image: the share of the steps that are run."),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Also draw the plan into this PNG.", metavar="PATH.png")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole plan as JSON, which `generate --plan` runs.")
    ] = False,
    *,
    run: RunOptions,
    where: ModelOptions,
) -> None:
    """Print the table a run would follow: who works at which noise level, and how. No weights are read.

    `moe-sampler plan --handoff 0.7 --steps 20 --image plan.png`

    `moe-sampler plan --handoff 0.7 --steps 20 --json > plan.json`
    """
    model = Model.read(where, {})
    if image is not None:
        from ..viewing.images import check_writable

        check_writable(image)
    if strength is not None:
        from ..pipelines.checks import check_strength

        check_strength(strength, "an image", None)
    configs, defaults = model.training()
    settings = merge_runs({}, run, list(configs))
    call = call_of(settings, list(configs)) | {"strength": strength}
    experts = planned_experts(configs, defaults, call)
    if reusing(experts, call):  # what that costs is asked of diffusers' models
        import_pipelines(borrows=borrowing(experts))
    compiled = compile_plan(configs, defaults, call, model.reuse_shares)
    if as_json:
        typer.echo(compiled.to_json(indent=2))
    elif not (sys.stdout.isatty() and _print_table(compiled)):
        typer.echo(str(compiled))
    if image is not None:
        from ..viewing.plan_figure import draw_plan

        draw_plan(compiled, image)
        typer.echo(str(image), err=as_json)


def _print_table(compiled: SamplingPlan) -> bool:
    """The table in colour, if the terminal is wide enough for it."""
    from rich.console import Console

    from ..viewing.plan_table import plan_table

    console, table = Console(), plan_table(compiled)
    # Asked as if there were room: in too narrow a terminal cells would be cut.
    if console.measure(table, options=console.options.update(width=1000)).maximum > console.width:
        return False
    console.print(table)
    return True
