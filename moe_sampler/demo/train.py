"""Train the demo experts from nothing: the whole of `moe-sampler train-demo`.

A run may be killed at any time and started again with the same arguments: it continues where it was. Stages
run as child processes, so that independent ones use two cores at once.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .stages import SHIPPED, STAGES, TRAINED, WAVES, Recipe, Workshop


def train_demo(
    output: str | Path,
    *,
    work_dir: str | Path = "runs/demo",
    stage: str = "all",
    seed: int = 0,
    recipe: Recipe = SHIPPED,
    quiet: bool = False,
) -> Path:
    """Render the scenes, train autoencoder, text encoder, trunk, Sol and Lune, and write the experts' folder.

    Takes about two hours on two cores. Interrupted runs continue when called again with the same arguments.

    Args:
        output: folder to write the experts to, replaced as a whole at the end.
        work_dir: keeps scenes (600 MB), latents and checkpoints.
        stage: "all", or one of `STAGES` whose predecessors are done.
        seed: seed of initial weights, batches and noise. The scenes are always the same.
        recipe: sizes and lengths; the defaults made the experts that ship.
        quiet: no progress bars.

    Returns:
        `output`.

    Raises:
        ValueError: for an unknown stage, or one whose predecessors are not done.
        RuntimeError: when a stage fails or another run uses the work folder.
    """
    if stage != "all" and stage not in STAGES:
        raise ValueError(f'unknown stage "{stage}": use "all" or one of {", ".join(STAGES)}')
    workshop = Workshop(Path(work_dir), seed, recipe)
    workshop.folder.mkdir(parents=True, exist_ok=True)
    with _sole_user(workshop), _bars(quiet) as bars:
        for wave in WAVES:
            if stage != "all" and stage not in wave:
                missing = [name for name in wave if not workshop.finished(name)]
                if missing:
                    raise ValueError(f'stage "{stage}" needs stage "{missing[0]}" first')
                continue
            names = [name for name in wave if stage in ("all", name) and not workshop.finished(name)]
            _run_wave(workshop, names, Path(output), bars)
            if stage in wave:
                break
    return Path(output)


@contextmanager
def _sole_user(workshop: Workshop) -> Iterator[None]:
    """Only one run at a time may use a work folder, and only with the seed and recipe it began with."""
    with open(workshop.folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another training run is using {workshop.folder}") from None
        record = workshop.folder / "run.json"
        if record.exists() and json.loads(record.read_text())["seed"] != workshop.seed:
            raise ValueError(f"{workshop.folder} belongs to a run with another seed: use another work folder")
        record.write_text(json.dumps({"seed": workshop.seed}))
        yield


@contextmanager
def _bars(quiet: bool) -> Iterator[Progress]:
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), disable=quiet) as bars:
        yield bars


def _run_wave(workshop: Workshop, names: list[str], output: Path, bars: Progress) -> None:
    """Run the named stages side by side, each in its own process, and wait for all."""
    if "scenes" in names:
        task = bars.add_task("scenes", total=None, note="")
        workshop.scenes().render(progress=lambda done, total: bars.update(task, completed=done, total=total))
        return
    context = multiprocessing.get_context("spawn")
    running: dict[str, tuple[BaseProcess, int]] = {}
    for name in names:
        process = context.Process(target=_child, args=(workshop, name, output), daemon=True)
        process.start()
        total = getattr(workshop.recipe, name).steps if name in TRAINED else 1
        running[name] = (process, bars.add_task(name, total=total, note=""))
    try:
        while any(process.is_alive() for process, _ in running.values()):
            for name, (process, task) in running.items():
                _show(bars, task, workshop.checkpoints / f"{name}.log")
                if process.exitcode:
                    raise RuntimeError(f"stage {name} failed with exit code {process.exitcode}")
            time.sleep(0.5)
        failed = [name for name, (process, _) in running.items() if process.exitcode]
        if failed:
            raise RuntimeError(f"stage {failed[0]} failed with exit code {running[failed[0]][0].exitcode}")
        for _, task in running.values():
            bars.update(task, completed=bars.tasks[task].total)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()


def _show(bars: Progress, task: int, log: Path) -> None:
    if not log.exists():
        return
    lines = log.read_text(encoding="utf-8").splitlines()
    if lines:
        record = json.loads(lines[-1])
        step, _ = record.pop("step"), record.pop("seconds")
        bars.update(
            task, completed=step, note=" ".join(f"{key} {value:.4g}" for key, value in record.items())
        )


def _child(workshop: Workshop, name: str, output: Path) -> None:
    """One stage, in its own process; ends when the parent does."""
    import torch

    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def stop_with_parent() -> None:
        if parent is not None and not parent.is_alive():
            raise SystemExit("the training run was stopped")

    if name == "latents":
        torch.set_num_threads(os.cpu_count() or 1)
        workshop.encode()
    elif name == "export":
        workshop.export(output)
    else:
        workshop.train(name, each_step=stop_with_parent)
