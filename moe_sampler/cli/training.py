"""What the commands that train have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from .machine import quiet

__all__ = ["run_training"]


def run_training(train: Callable[[], dict[str, Any]], output_dir: Path) -> None:
    """Run it, and say once what came of it. Stopped by a signal, the command ends as the signal would end it.

    train: returns what `Trainer.train` does.
    """
    from accelerate import PartialState

    from ..training.trainer import Interrupted, NonFiniteError

    quiet()
    try:
        result = train()
    except Interrupted as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(128 + stopped.signal) from None
    except NonFiniteError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from None
    if PartialState().is_main_process:
        skipped = f", {result['skipped']} steps skipped" if result["skipped"] else ""
        typer.echo(f"{output_dir}: trained to step {result['step']}{skipped}")
        for name, value in result["validation"].items():
            typer.echo(f"  {name:16} {value:.5f}")
        if result["best"] is not None and result["best"]["step"] != result["step"]:
            typer.echo(f"  best at step {result['best']['step']}: {result['best']['loss']:.5f}, in best/")
