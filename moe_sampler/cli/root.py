"""The `moe-sampler` command. Heavy imports wait until a command needs them, so that --help is quick."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from .commands import command_group
from .compare import compare
from .generate import generate
from .plan import plan
from .ui import ui

__all__ = ["app", "end_with_signals"]

app = typer.Typer(
    name="moe-sampler",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    help="""Diffusion experts of different parametrizations make one image together.

**Sol** (v-prediction) lays the image out in the early, noisy steps; **Lune** (rectified flow) paints it in
the later ones. A run is planned before it starts; `moe-sampler plan` shows the plan.""",
)
for _command in (generate, plan, compare, ui):
    app.command()(_command)
for _group in (
    command_group(
        "experts",
        "The experts' own training: Sol, Lune or an ε-expert on any images, and the demo's experts anew.",
        module="experts",
    ),
    command_group(
        "tinyflux",
        "The student: caches of what Sol and Lune teach it, its training, its images, and upstream's files.",
        module="student",
    ),
):
    app.add_typer(_group)


def _version(value: bool) -> None:
    if value:
        from .. import __version__

        typer.echo(f"moe-sampler {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def end_with_signals() -> None:
    """SIGTERM and SIGHUP end the process as Ctrl-C does: what is half written is removed on the way out."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
