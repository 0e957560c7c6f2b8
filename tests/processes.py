"""Processes beside a test's own, forked from one that has the trainers imported: a new Python takes eight
seconds to."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Ended", "command", "module", "run"]

_fresh = multiprocessing.get_context("spawn")
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["moe_sampler.tinyflux.training.run", "torch.distributed.fsdp"])


class Ended(NamedTuple):
    """`codes`: every process's exit code, negative for a signal. What all of them wrote."""

    codes: list[int | None]
    stdout: str
    stderr: str


def run(target: Callable[..., object], *arguments: object, processes: int = 1, **environment: str) -> Ended:
    """`target(*arguments)` in every process, each told by a launcher's variables which of them it is."""
    shared = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment}
    context = _server if shared["ACCELERATE_USE_CPU"] == "true" else _fresh  # a fork may be denied CUDA
    if processes > 1:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    with tempfile.TemporaryDirectory() as folder:
        out, err = ([Path(folder, f"{name}-{rank}") for rank in range(processes)] for name in ("out", "err"))
        started = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            given = (os.environ | shared | own, out[rank], err[rank], target, arguments)
            started.append(context.Process(target=_child, args=given))
            started[-1].start()
        for child in started:
            child.join(300)
            child.kill()  # what has ended can't be
            child.join()
        written = ("".join(path.read_text(encoding="utf-8") for path in paths) for paths in (out, err))
        return Ended([child.exitcode for child in started], *written)


def module(name: str, arguments: Sequence[str], folder: Path) -> None:
    """`python -m NAME` with these arguments in this folder, for `run`."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def command(arguments: Sequence[str]) -> None:
    """`moe-sampler` with these arguments, for `run`."""
    from moe_sampler.cli import main

    sys.argv = ["moe-sampler", *arguments]
    main()


def _child(
    environment: dict[str, str], out: Path, err: Path, target: Callable[..., object], arguments: tuple
) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    torch.set_num_threads(1)
    target(*arguments)
    sys.stdout.flush()
