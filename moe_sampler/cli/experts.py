"""`moe-sampler experts ...`. Heavy imports wait until a command needs them, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..expert_training.settings import KINDS, RunSettings
from ..pipelines.choices import any_of
from ..training.flags import with_settings
from .commands import one_line_errors
from .training import run_training

__all__ = ["app"]

app = typer.Typer(rich_markup_mode="markdown")


def _train(
    kind: Annotated[str, typer.Argument(help=f"{any_of(KINDS)}.")],
    settings: RunSettings,
) -> None:
    """Train an expert: Sol (v on the DDPM path), Lune (rectified flow), or one that predicts the noise.

    `moe-sampler experts train sol --demo --output-dir runs/sol --max-train-steps 2000 --use-david`

    `moe-sampler experts train lune --source pictures/ --base stable-diffusion-v1-5/stable-diffusion-v1-5
    --output-dir runs/lune`

    Called again with the same arguments it continues where it stopped. Several processes:
    `accelerate launch -m moe_sampler.cli experts train ...`
    """
    from ..expert_training.run import train as run

    run_training(lambda: run(kind, settings), settings.training.output_dir)


app.command("train")(one_line_errors()(with_settings(RunSettings, _train)))


@app.command()
def demo(
    output: Annotated[Path, typer.Argument(help="Folder to write the trained experts to.")],
    work_dir: Annotated[
        Path, typer.Option(help="Folder for the rendered scenes, checkpoints and logs; kept for resuming.")
    ] = Path("runs/demo"),
    stage: Annotated[str, typer.Option(help="One stage by name, or all.")] = "all",
    seed: Annotated[int, typer.Option(help="Seed of data, weights and training.")] = 0,
    device: Annotated[
        str | None,
        typer.Option(help="cpu or cuda. Default: a GPU where there is one.", metavar="cpu|cuda"),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Draw as many scenes and make as many steps as fit into this time, over all commands on the "
            "work folder together. Default: on a GPU the steps that made the experts that ship, on a CPU a "
            "thirtieth of their samples."
        ),
    ] = None,
) -> None:
    """Draw the scenes and train the demo experts: minutes on a GPU, an hour and a half on two cores for a
    good draft of them, or the minutes you give it.

    `moe-sampler experts demo my-demo --minutes 60`

    Called again with the same arguments it continues where it stopped, also on the other device.
    """
    with one_line_errors():
        from ..demo.train import train_demo

        try:
            made = train_demo(
                output, work_dir=work_dir, stage=stage, seed=seed, device=device, minutes=minutes
            )
            typer.echo(str(made))
        except RuntimeError as error:  # a stage that failed, or a folder in use: it says which
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(1) from None
