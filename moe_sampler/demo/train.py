"""Train the demo experts from nothing: the whole of `moe-sampler experts demo`.

A run may be killed at any time and started again with the same arguments: it continues where it was. Stages
run as child processes, so that independent ones run side by side.

A run that is told its minutes gives every stage a share of the time that is left when it begins, and a stage
takes as many steps as fit (`training.pace`); so what one stage needs too much the later ones have less of.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .._files import claim, sole_user
from .record import RunRecord
from .stages import EXPERTS, SHARES, STAGES, TRAINED, WAVES, Recipe, Workshop, default_recipe

DEVICES = ("cpu", "cuda")
COMPILES_FROM = 4.0
"""Minutes of a run on a GPU, from which on it pays to compile the experts: a step then takes about half the
time, and compiling about a minute of several cores, while the stages before them run."""
_NAMES = ("checkpoints", "scenes", "tokenizer", "*.npy", "run.json")


def train_demo(
    output: str | Path,
    *,
    work_dir: str | Path = "runs/demo",
    stage: str = "all",
    seed: int = 0,
    recipe: Recipe | None = None,
    device: str | None = None,
    minutes: float | None = None,
    quiet: bool = False,
) -> Path:
    """Render the scenes, train autoencoder, text encoder, trunk, Sol and Lune, and write the experts' folder.

    On a GPU it takes the steps that made the experts that ship, on a CPU as many as two cores make in an hour
    and a half. Interrupted runs continue when called again with the same arguments, on the same device or the
    other one.

    Args:
        output: folder to write the experts to, replaced as a whole at the end.
        work_dir: keeps scenes (1.2 GB), texts (1.6 GB), latents and checkpoints.
        stage: "all", or one of `STAGES` whose predecessors are done.
        seed: seed of initial weights, batches and noise. The scenes are always the same.
        recipe: sizes and lengths; by default those of the device that the run began on.
        device: "cpu" or "cuda"; by default a GPU where there is one.
        minutes: take as many scenes and steps as fit into this time, which counts over all commands on this
            work folder. Without it, the recipe's steps.
        quiet: no progress bars.

    Returns:
        `output`.

    Raises:
        ValueError: for an unknown stage or device, or a stage whose predecessors are not done.
        CheckpointError: a folder that holds other things by our names, or that another run works in.
        RuntimeError: when a stage fails.
    """
    if stage != "all" and stage not in STAGES:
        raise ValueError(f'unknown stage "{stage}": use "all" or one of {", ".join(STAGES)}')
    if minutes is not None and not 0 < minutes < math.inf:
        raise ValueError(f"minutes must be positive, got {minutes}")
    device = _device(device)
    from .export import check_output  # it imports torch

    folder = Path(work_dir)
    check_output(Path(output))
    claim(folder, "demo training", _NAMES)
    with sole_user(folder, "trained in"), _bars(quiet) as bars:
        run = _Run(folder, seed, recipe, device, minutes)
        compiling = _begin_compiling(run, stage)
        for wave in WAVES:
            if any(name in EXPERTS for chain in wave for name in chain):
                _wait_for(compiling)
            wanted = [tuple(name for name in chain if stage in ("all", name)) for chain in wave]
            if any(wanted):
                _run_wave(run, wanted, Path(output), bars)
            else:
                _check_finished(run.workshop, wave, stage)
            if stage != "all" and any(wanted):
                break
    return Path(output)


def _device(wanted: str | None) -> str:
    import torch

    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted not in DEVICES:
        raise ValueError(f'unknown device "{wanted}": use {" or ".join(DEVICES)}')
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds no CUDA device here; use cpu")
    return wanted


class _Run:
    """A work folder's run: what it remembers, its stages, and the time it has.

    Raises:
        ValueError: a folder of another run.
    """

    def __init__(
        self, folder: Path, seed: int, recipe: Recipe | None, device: str, minutes: float | None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._began = folder, time.time()
        timed = minutes is not None
        record = RunRecord.read(folder) or RunRecord(seed, timed, large=device == "cuda")
        if record.seed != seed:
            raise ValueError(f"{folder} belongs to a run with another seed: use another work folder")
        if record.timed != timed:
            said = "with --minutes" if record.timed else "without --minutes"
            raise ValueError(f"{folder} belongs to a run {said}: go on {said}, or use another work folder")
        self._record, self._before = record, record.spent
        self._seconds = None if minutes is None else 60 * minutes
        long = recipe is None and record.large if minutes is None else minutes >= COMPILES_FROM
        recipe = recipe or default_recipe(record.large)
        if record.scenes is not None:
            recipe = dataclasses.replace(recipe, scenes=record.scenes)
        self.workshop = Workshop(folder, seed, recipe, device, timed, compiled=device == "cuda" and long)
        self._write()

    def settle_scenes(self, count: int) -> None:
        self.workshop = dataclasses.replace(
            self.workshop, recipe=dataclasses.replace(self.workshop.recipe, scenes=count)
        )
        self._write(scenes=count)

    def note_time(self) -> None:
        """Every few seconds, so that a run that is killed still knows what it took."""
        if time.time() - self._began + self._before - self._record.spent > 2:
            self._write()

    def deadlines(self, chains: list[tuple[str, ...]]) -> dict[str, float]:
        """When each stage of a wave has to end, as `time.time` counts; {} where there is no limit."""
        if self._seconds is None:
            return {}
        now = time.time()
        left = max(0.0, self._seconds - self._before - (now - self._began))
        here = max(sum(SHARES[name] for name in chain) for chain in chains)
        later = [name for chain in chains for name in chain]
        rest = sum(self._wave_share(wave) for wave in WAVES[_wave_of(later[0]) + 1 :])
        wave = left * here / (here + rest)
        found = {}
        for chain in chains:
            whole, done = sum(SHARES[name] for name in chain), 0.0
            for name in chain:
                done += SHARES[name]
                found[name] = now + wave * done / whole
        return found

    @staticmethod
    def _wave_share(wave: tuple[tuple[str, ...], ...]) -> float:
        return max(sum(SHARES[name] for name in chain) for chain in wave)

    def _write(self, **changes: int) -> None:
        spent = self._before + time.time() - self._began
        self._record = dataclasses.replace(self._record, spent=round(spent, 1), **changes)
        self._record.write(self.folder)


def _wave_of(stage: str) -> int:
    return next(i for i, wave in enumerate(WAVES) if any(stage in chain for chain in wave))


@contextmanager
def _bars(quiet: bool) -> Iterator[Progress]:
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), disable=quiet) as bars:
        yield bars


def _check_finished(workshop: Workshop, wave: tuple[tuple[str, ...], ...], stage: str) -> None:
    for name in (name for chain in wave for name in chain):
        if not workshop.finished(name):
            raise ValueError(f'stage "{stage}" needs stage "{name}" first')


def _begin_compiling(run: _Run, stage: str) -> list[BaseProcess]:
    """Processes that compile what the experts' stages will run: the trunk's is Lune's."""
    workshop = run.workshop
    if not workshop.compiled or stage != "all" or workshop.finished("trunk"):
        return []
    workshop.tokenizer()
    context = _context(workshop.device)
    processes: list[BaseProcess] = [
        context.Process(target=workshop.precompile, args=(name,), daemon=True) for name in ("lune", "sol")
    ]
    for process in processes:
        process.start()
    return processes


def _wait_for(compiling: list[BaseProcess]) -> None:
    for process in compiling:
        process.join()
        if process.exitcode:
            raise RuntimeError("the experts couldn't be compiled: the error is above")
    compiling.clear()


def _run_wave(run: _Run, chains: list[tuple[str, ...]], output: Path, bars: Progress) -> None:
    """Run chains of stages side by side, each chain in its own process, and wait for all."""
    workshop = run.workshop
    chains = [tuple(name for name in chain if not workshop.finished(name)) for chain in chains]
    chains = [chain for chain in chains if chain]
    if not chains:
        return
    deadlines, now = run.deadlines(chains), time.time()
    lengths = {
        name: _length(workshop, name) if not deadlines else max(1, round(deadlines[name] - now))
        for chain in chains
        for name in chain
    }
    tasks = {name: bars.add_task(name, total=total, note="") for name, total in lengths.items()}
    if "scenes" in tasks:
        count = workshop.scenes().render(
            progress=lambda done, total: bars.update(tasks["scenes"], completed=done, total=total),
            until=deadlines.get("scenes"),
        )
        run.settle_scenes(count)
        bars.update(tasks["scenes"], total=bars.tasks[tasks["scenes"]].completed)
        return
    context = _context(workshop.device)
    threads = _threads(len(chains))
    running: list[BaseProcess] = []
    try:
        for chain in chains:
            arguments = (workshop, chain, output, threads, deadlines)
            process = context.Process(target=_child, args=arguments, daemon=True)
            process.start()
            running.append(process)  # one that never began can't be ended
        while any(process.is_alive() for process in running) and not any(
            process.exitcode for process in running
        ):
            time.sleep(0.2)
            run.note_time()
            for name, task in tasks.items():
                _show(bars, task, workshop.checkpoints / name / "log.jsonl", now if deadlines else None)
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
        run.note_time()


@cache
def _context(device: str) -> ForkServerContext | SpawnContext:
    """How the stages' processes are begun: out of one that has imported everything, once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moe_sampler.demo.stages"])
    if device == "cuda":
        # A process that has asked CUDA itself for devices, as some of the imports do, can't be forked to use
        # it; one that has asked the driver's library can.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        probe = context.Process(target=_use_cuda)
        probe.start()
        probe.join()
        if probe.exitcode:
            return multiprocessing.get_context("spawn")
    return context


def _use_cuda() -> None:
    import torch

    try:
        torch.cuda.init()
    except RuntimeError:
        sys.exit(1)


def _threads(processes: int) -> int:
    """For each of so many processes, of what this one would use."""
    import torch

    return max(1, torch.get_num_threads() // processes)


def _length(workshop: Workshop, name: str) -> int:
    return workshop.recipe.steps(name) if name in TRAINED else 1


def _show(bars: Progress, task: TaskID, log: Path, since: float | None) -> None:
    """Steps out of the stage's log; of a timed run, the seconds of its wave."""
    if not log.exists():
        return
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and lines[-1].endswith("\n"):  # else it is being written
        record = json.loads(lines[-1])
        note = f"loss {record['loss']:.4g}" if "loss" in record else ""
        if since is None:
            bars.update(task, completed=record["step"], note=note)
        else:
            bars.update(task, completed=round(time.time() - since), note=f"step {record['step']}, {note}")


def _stop_with_parent() -> None:
    """SIGTERM, after which the stage saves and stops, once the parent is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _child(
    workshop: Workshop, chain: tuple[str, ...], output: Path, threads: int, deadlines: dict[str, float]
) -> None:
    """Stages one after another, in a process of their own that ends when the parent does."""
    import torch

    if workshop.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(threads)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    for name in chain:
        if name == "latents":
            workshop.encode()
        elif name == "export":
            workshop.export(output)
        else:
            workshop.train(name, deadlines.get(name))
