"""What a call asks of the machine besides time: operator dispatches, waits for the device, memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Each brings a number from the device to the host, so on a GPU the host stands still until it is there.
_WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal")


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.dispatches = self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.dispatches += 1
        self.waits += str(function).startswith(_WAITS)
        return function(*args, **(kwargs or {}))


def count_dispatches(call: Callable[[], Any]) -> tuple[int, int]:
    """(operators dispatched, of these such that wait for the device) by one call.

    What runs inside one operator counts as one, our own and torch's alike. Not for compiled functions: torch
    runs them eagerly, from then on too, once a dispatch mode has watched them.
    """
    with _Count() as count:
        call()
    return count.dispatches, count.waits


def peak_memory(call: Callable[[], Any], device: str) -> int:
    """Bytes that one call has allocated at its worst moment, beyond what was there before it."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activity = [torch.profiler.ProfilerActivity.CPU]
    with _silent(), torch.profiler.profile(activities=activity, profile_memory=True) as profile:
        call()
    if profile.profiler is None or profile.profiler.kineto_results is None:
        raise RuntimeError("torch's profiler kept nothing of what it saw")
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue] - torch's stub leaves it out
        peak = max(peak, held)
    return peak


@contextmanager
def _silent() -> Iterator[None]:
    """Without the lines that the profiler's library writes to stderr when it starts and stops."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
