"""CUDA graphs: what a device does for some work, recorded once and then started with a single call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["record", "warm_up"]

T = TypeVar("T")


def warm_up(work: Callable[[], Any], stream: torch.cuda.Stream, times: int = 2) -> None:
    """Do the work as usual, on the stream that it will be recorded on: kernels are compiled, libraries choose
    theirs, what is lazy is made."""
    here = torch.cuda.current_stream(stream.device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        for _ in range(times):
            work()
    here.wait_stream(stream)


def record(
    work: Callable[[], T], stream: torch.cuda.Stream, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, T]:
    """The graph of the work, and what the work gave: tensors that every replay fills anew.

    Args:
        work: waits for nothing on the device; done once here, without the device doing anything.
        stream: of the recording, not the device's default one.
        pool: of memory, shared by graphs of which none reads what another left there.

    Raises:
        RuntimeError: something in it can't be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        return graph, _captured(graph, work, stream, pool)
    except BaseException:
        # torch then refuses to draw random numbers on the device, until a recording succeeds.
        with contextlib.suppress(RuntimeError):
            _captured(torch.cuda.CUDAGraph(), lambda: torch.zeros(1, device=stream.device), stream)
        raise


def _captured(
    graph: torch.cuda.CUDAGraph, work: Callable[[], T], stream: torch.cuda.Stream, pool: Any = None
) -> T:
    # A recording that fails doesn't leave its stream by itself. Other threads may allocate meanwhile.
    with (
        torch.cuda.stream(stream),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
    ):
        return work()
