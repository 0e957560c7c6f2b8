"""`moe-sampler tinyflux train`."""

from __future__ import annotations

from moe_sampler.tinyflux.training.settings import StudentSettings

from ..training.flags import with_settings
from .commands import one_line_errors
from .training import run_training

__all__ = ["train"]


def _train(settings: StudentSettings) -> None:
    """Train a student on caches of what Sol and Lune teach.

    `moe-sampler tinyflux train student.toml --output-dir runs/student`

    Settings are in a TOML file, in tables named as the panels below, or flags, which win. The same
    command continues a run that was stopped. Several processes:

    `accelerate launch --num_processes 4 -m moe_sampler.cli tinyflux train student.toml`
    """
    from moe_sampler.tinyflux.training.run import train as run

    run_training(lambda: run(settings), settings.training.output_dir)


train = one_line_errors()(with_settings(StudentSettings, _train))
