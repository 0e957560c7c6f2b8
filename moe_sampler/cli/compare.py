"""`moe-sampler compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .._numbers import whole
from .by_name import ByExpert, over_previous
from .commands import takes
from .demo_limits import warn_of_limits
from .loras import read_loras
from .machine import Machine
from .models import Model
from .options import PipelineOptions, RunOptions, SizeOptions, SteppingOptions
from .settings import call_of, compile_plan, merge_runs, merged, planned_experts

if TYPE_CHECKING:
    from ..pipelines.compare import Comparison

__all__ = ["compare"]


@takes(size=SizeOptions, stepping=SteppingOptions, where=PipelineOptions)
def compare(
    prompts: Annotated[list[str], typer.Argument(help="One or several prompts.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Image to write.", metavar="PATH")] = Path(
        "compare.png"
    ),
    seed: Annotated[
        list[int] | None,
        typer.Option(
            help="Seed, 0 by default. Given several times, every prompt has a row for each.", metavar="N"
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Steps in all, of every column; with --solvers, model calls.", metavar="N"),
    ] = None,
    solvers: Annotated[
        list[str] | None,
        typer.Option(
            help="A column of the hybrid with these solvers instead: one for all experts or one each, joined "
            "by +, each with a spacing of --levels after an @ if wanted. Give it several times.",
            metavar="SOLVER[@SPACING][+...]",
        ),
    ] = None,
    tile: Annotated[int, typer.Option(help="Width of each image in the sheet.", metavar="N")] = 256,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    *,
    size: SizeOptions,
    stepping: SteppingOptions,
    where: PipelineOptions,
) -> None:
    """Show what the handoff does: Sol alone, Lune alone, a naive handoff and the hybrid, side by side.

    All start from the same noise and take as many steps. The naive handoff is the one that is often built:
    the latent goes on unconverted, and t / 1000 is taken for the noise level.

    `moe-sampler compare "a castle by a lake" "a portrait" --handoff 0.7 -o compare.png`

    `moe-sampler compare "a castle by a lake" --steps 10 --solvers ddpm+euler --solvers dpmpp_2m@karras`
    """
    from ..pipelines.recorded import record_defaults
    from ..viewing.images import check_image_name, check_room

    check_image_name(output)
    whole("--tile", tile, 4096, least=64)
    model = Model.read(where, {})
    configs, defaults = model.training()
    names = list(configs)
    run = RunOptions(steps=None if steps is None else [str(steps)], **vars(stepping))
    settings = merge_runs({}, run, names) | merged({}, {"height": size.height, "width": size.width})
    negative = ByExpert.read("--negative", size.negative, known=names)
    settings |= over_previous({}, names, negative_prompt=negative)
    call = call_of(settings, names)
    if solvers:
        _check_solvers(configs, defaults, call, solvers)
    else:
        _check(configs, defaults, call)
    loras, text_encoder = read_loras({}, where, names)
    computer = Machine.read(where, {})
    model.size(settings)
    seeds = seed or [0]
    record = record_defaults(settings, defaults, names) | dict(model.settings) | computer.settings
    record |= {"prompts": prompts, "seeds": seeds} | ({"solvers": solvers} if solvers else {})
    check_room(output, record)
    if not quiet and model.is_demo:
        warn_of_limits(prompts, [settings.get("negative_prompt")], [settings])

    pipe = model.load(computer, loras, text_encoder)
    from ..pipelines.compare import compare as run_comparison
    from ..viewing.images import save_image

    if quiet:
        pipe.set_progress_bar_config(disable=True)

    def keep(so_far: Comparison) -> None:
        # After every batch, so that whoever stops the command has what was finished.
        save_image(so_far.sheet(tile), output, record)

    own = {"batch_size": where.batch_size, "solvers": solvers}
    run_comparison(pipe, prompts, seeds, on_batch_end=keep, **own, **call)
    if not quiet:
        typer.echo(str(output))


def _check(configs: dict, defaults: dict, call: dict) -> None:
    """Whether all four runs can be planned."""
    from ..sampling.naive import naive_plan

    hybrid = compile_plan(configs, defaults, call)
    naive_plan(planned_experts(configs, defaults, call), hybrid)
    for name in configs:
        compile_plan(
            configs, defaults, {key: call[key] for key in call if key != "handoff"} | {"expert": name}
        )


def _check_solvers(configs: dict, defaults: dict, call: dict, solvers: list[str]) -> None:
    """Whether every column can be planned."""
    from ..pipelines.solver_columns import Stepping, plan_of_calls

    if "solver" in call or "levels" in call:
        raise ValueError("--solvers says how every column steps: leave out --solver and --levels")
    most = call.get("num_inference_steps", defaults["num_inference_steps"])
    for stepping in [Stepping.read(text, list(configs)) for text in solvers]:
        own = call | stepping.settings
        plan_of_calls(
            lambda steps, own=own: compile_plan(configs, defaults, own | {"num_inference_steps": steps}),
            whole("--steps", most, 1000),
        )
