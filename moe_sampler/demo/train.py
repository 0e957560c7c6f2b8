"""Train the demo experts from nothing: the whole of `moe-sampler experts demo`.

A run may be killed at any time and started again with the same arguments: it continues where it was. Stages
run as child processes, so that independent ones use two cores at once.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import threading
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
            wanted = [tuple(name for name in chain if stage in ("all", name)) for chain in wave]
            if any(wanted):
                _run_wave(workshop, wanted, Path(output), bars)
            else:
                _check_finished(workshop, wave, stage)
            if stage != "all" and any(wanted):
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


def _check_finished(workshop: Workshop, wave: tuple[tuple[str, ...], ...], stage: str) -> None:
    for name in (name for chain in wave for name in chain):
        if not workshop.finished(name):
            raise ValueError(f'stage "{stage}" needs stage "{name}" first')


def _run_wave(workshop: Workshop, chains: list[tuple[str, ...]], output: Path, bars: Progress) -> None:
    """Run chains of stages side by side, each chain in its own process, and wait for all."""
    chains = [tuple(name for name in chain if not workshop.finished(name)) for chain in chains]
    tasks = {
        name: bars.add_task(name, total=_length(workshop, name), note="")
        for chain in chains
        for name in chain
    }
    if "scenes" in tasks:
        workshop.scenes().render(
            progress=lambda done, total: bars.update(tasks["scenes"], completed=done, total=total)
        )
        return
    context = multiprocessing.get_context("spawn")
    running: list[BaseProcess] = []
    try:
        for chain in filter(None, chains):
            running.append(context.Process(target=_child, args=(workshop, chain, output), daemon=True))
            running[-1].start()
        while any(process.is_alive() for process in running) and not any(
            process.exitcode for process in running
        ):
            time.sleep(0.5)
            for name, task in tasks.items():
                _show(bars, task, workshop.checkpoints / name / "log.jsonl")
        if any(process.exitcode for process in running):
            raise RuntimeError(
                f"training stopped in {' or '.join(tasks)}: the error is above; run again to continue"
            )
        for task in tasks.values():
            bars.update(task, completed=bars.tasks[task].total)
    finally:
        for process in running:
            process.terminate()
            process.join()


def _length(workshop: Workshop, name: str) -> int:
    return workshop.recipe.steps(name) if name in TRAINED else 1


def _show(bars: Progress, task: int, log: Path) -> None:
    if not log.exists():
        return
    lines = log.read_text(encoding="utf-8").splitlines()
    if lines:
        record = json.loads(lines[-1])
        note = f"loss {record['loss']:.4g}" if "loss" in record else ""
        bars.update(task, completed=record["step"], note=note)


def _stop_with_parent() -> None:
    """SIGTERM, after which the stage saves and stops, once the parent is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _child(workshop: Workshop, chain: tuple[str, ...], output: Path) -> None:
    """Stages one after another, in a process of their own that ends when the parent does."""
    import torch

    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    for name in chain:
        if name == "latents":
            torch.set_num_threads(os.cpu_count() or 1)
            workshop.encode()
        elif name == "export":
            workshop.export(output)
        else:
            workshop.train(name)
