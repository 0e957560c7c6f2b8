"""`moe-sampler compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .models import Lora, Machine, Model, merge_models
from .options import (
    ExpertOptions,
    GuidanceOptions,
    LoraOptions,
    MachineOptions,
    ModelOptions,
    StepOptions,
    takes,
)
from .settings import ByExpert, call_of, compile_plan, merge_runs, planned_experts, record_defaults

__all__ = ["compare"]


@takes(
    experts=ExpertOptions,
    guidance=GuidanceOptions,
    where=ModelOptions,
    lora=LoraOptions,
    machine=MachineOptions,
)
def compare(
    prompts: Annotated[list[str], typer.Argument(help="One or several prompts.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write.", metavar="PATH.png")] = Path(
        "compare.png"
    ),
    seed: Annotated[
        list[int] | None,
        typer.Option(
            help="Seed, 0 by default. Given several times, every prompt has a row for each.", metavar="N"
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps in all, of every column.", metavar="N")] = None,
    negative: Annotated[
        list[str] | None,
        typer.Option(help="Negative prompt, of both experts or of one.", metavar="TEXT|NAME=TEXT"),
    ] = None,
    height: Annotated[int | None, typer.Option(help="In pixels. Default: the model's.", metavar="N")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels. Default: the model's.", metavar="N")] = None,
    tile: Annotated[int, typer.Option(help="Width of each image in the sheet.", metavar="N")] = 256,
    *,
    experts: ExpertOptions,
    guidance: GuidanceOptions,
    where: ModelOptions,
    lora: LoraOptions,
    machine: MachineOptions,
) -> None:
    """Show what the handoff does: Sol alone, Lune alone, a naive handoff and the hybrid, side by side.

    All start from the same noise and take as many steps. The naive handoff is the one that is often built:
    the latent goes on unconverted, and t / 1000 is taken for the noise level.

    `moe-sampler compare "a castle by a lake" "a portrait" --handoff 0.7 -o compare.png`
    """
    from ..viewing.images import check_writable

    check_writable(output)
    if tile < 64:
        raise ValueError(f"--tile must be at least 64, got {tile}")
    model = Model(merge_models({}, where), where.local_files_only)
    configs, defaults = model.training()
    names = list(configs)
    run = StepOptions(steps=None if steps is None else [str(steps)])
    settings = merge_runs({}, run, experts, guidance, names)
    sizes = {"height": height, "width": width}
    settings |= {key: value for key, value in sizes.items() if value is not None}
    negatives = ByExpert.read("--negative", negative, known=names).over(None, names)
    settings |= {"negative_prompt": negatives} if negatives is not None else {}
    call = call_of(settings, names)
    _check(configs, defaults, call)
    loras = [Lora.read(text) for text in lora.lora or ()]
    for each in loras:
        each.check(names, lora.lora_text_encoder)
    computer = Machine.read(machine, {})
    if sizes.keys() & call.keys():
        from ..pipelines.checks import check_size

        _, multiple = model.sizes()
        check_size(call.get("height", multiple), call.get("width", multiple), multiple)

    pipe = model.load(computer, loras, lora.lora_text_encoder)
    from ..pipelines.compare import compare as run_comparison
    from ..viewing.images import save_png

    seeds = seed or [0]
    comparison = run_comparison(pipe, prompts, seeds, batch_size=machine.batch_size, **call)
    record = record_defaults(settings, defaults, names) | model.settings | {"dtype": computer.dtype}
    save_png(comparison.sheet(tile), output, record | {"prompts": prompts, "seeds": seeds})
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
