"""What a device takes for work, without the time Python takes to ask for it: CUDA graphs, replayed.

On a CPU nothing runs ahead of Python, so there the work itself is called and timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from moe_sampler._graphs import record, warm_up

__all__ = ["Call", "between_events", "recorded", "seconds_of"]

Call = Callable[[], Any]
_SAMPLE = 2e-3  # seconds between two events at least, so that their own cost doesn't count


def recorded(call: Call, device: str) -> Call:
    """A call that repeats on the device what `call` does there, over the same memory.

    call: waits for nothing on the device; run twice here, for what compiles and allocates at first.
    """
    if device == "cpu":
        call()
        return call
    apart = torch.cuda.Stream()
    warm_up(call, apart)
    graph, _ = record(call, apart)
    return graph.replay


def seconds_of(call: Call, device: str, samples: int = 15) -> float:
    """Seconds that the device takes for `call`, the median: between events, or on a CPU by the clock.

    call: returns before the device has done it, as a replay does. Several are queued where one is short.
    """
    if device == "cpu":
        return statistics.median(_by_clock(call) for _ in range(min(samples, 3)))
    between_events(call, 1)
    once = between_events(call, 1)
    count = max(1, round(_SAMPLE / max(once, 1e-7)))
    return statistics.median(between_events(call, count) for _ in range(samples))


def _by_clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def between_events(call: Call, count: int) -> float:
    """Seconds a call, of `count` queued one after the other."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / count
