"""What the commands that train have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

__all__ = ["run_training"]


def run_training(train: Callable[[], dict[str, Any]]) -> str:
    """Run it, and say what came of it; stopped by a signal, the command ends as that signal would end it.

    Returns:
        A line of text.
    """
    from ..training.trainer import Interrupted, NonFiniteError

    _quiet_libraries()
    try:
        result = train()
    except Interrupted as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(128 + stopped.signal) from None
    except NonFiniteError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from None
    parts = [f"{result['step']} steps"]
    if result["skipped"]:
        parts.append(f"{result['skipped']} of them skipped")
    if "loss" in result["validation"]:
        parts.append(f"held-out loss {result['validation']['loss']:.4f}")
    if result["best"] is not None:
        parts.append(f"best {result['best']['loss']:.4f} at step {result['best']['step']}")
    return ", ".join(parts)


def _quiet_libraries() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
