"""Timing providers side by side: interleaved, warmed up, with what they ran on in every row.

On a GPU a call is timed in two ways. `median_us` is what Python, torch and the device take together for calls
queued one after the other, which for small work is the time to launch it. `device_us` is the device's alone:
the call's work replayed as a CUDA graph.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bench.counting import count_dispatches, peak_memory
from bench.graphs import Call, between_events, recorded, seconds_of
from bench.roofline import DEVICES

ENVIRONMENT = ("machine", "threads", "torch", "diffusers", "numpy")
OURS, COMPILED = "moe-sampler", "torch.compile"
TURNS = (7, 60)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Comparison:
    """The same work done by several providers.

    Args:
        suite: the table it belongs to.
        case: what distinguishes it within the table.
        providers: what makes each provider's callable, ours under `OURS`; made only when it is measured.
        moved_bytes: what the operation must read and write, for the bandwidth a GPU achieved.
        memory: also measure the peak of what a call allocates.
        slow: takes a minute; left out of pytest.
    """

    suite: str
    case: Mapping[str, str]
    providers: Mapping[str, Callable[[], Call]]
    moved_bytes: int | None = None
    memory: bool = False
    slow: bool = False

    @property
    def title(self) -> str:
        return ", ".join([self.suite, *self.case.values()])


@dataclass(frozen=True)
class Result:
    """Seconds of every call of one provider, and what a call asks of a GPU; None for compiled functions.

    device_seconds: of the device alone; None on a CPU, and for work that cannot be captured as a graph.
    """

    seconds: np.ndarray = field(repr=False)
    dispatches: int | None
    waits: int | None
    peak_bytes: int | None
    device_seconds: float | None = None

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


def environment() -> dict[str, str]:
    """Columns that say what a row was measured on."""
    machine = {"machine": _machine(), "threads": str(torch.get_num_threads())}
    return machine | {name: importlib.metadata.version(name) for name in ENVIRONMENT[2:]}


def _machine() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.open() if line.startswith("model name")]
        if models:
            return f"{models[0]}, {len(models)} cores"
    return platform.processor() or platform.machine()


def _timed_on_cpu(call: Call, count: int) -> list[float]:
    """Seconds of each of `count` calls."""
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken


def _timed_on_cuda(call: Call, count: int) -> list[float]:
    """Seconds a call, of `count` queued one after the other: alone, each would find the device idle."""
    return [between_events(call, count)]


def in_turn(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name): each name once a round, in an order that moves on by one every round."""
    for turn in range(rounds):
        first = turn % len(names)
        yield from ((turn, name) for name in (*names[first:], *names[:first]))


def interleave(
    providers: Mapping[str, Call], seconds: float = 0.4, turns: tuple[int, int] = TURNS
) -> dict[str, np.ndarray]:
    """Seconds per call of each provider, the providers taking turns.

    A turn is one call that doesn't count, so that caches hold this provider's data and not its neighbour's,
    and then calls for about a millisecond, at least one and at most 20, each timed (on CUDA all together).
    The order moves on by one every round. Compilation and first allocations are excluded. seconds: for all
    turns together, which sets their number within `turns`.
    """
    timed = _timed_on_cuda if DEVICE == "cuda" else _timed_on_cpu
    calls, warm = {}, min(3, turns[1])
    for name, call in providers.items():
        for _ in range(warm):
            call()
        once = min(second for _ in range(warm) for second in timed(call, 1))
        calls[name] = int(min(max(1e-3 / once, 1), 20)), once
    round_seconds = sum((count + 1) * once for count, once in calls.values())
    names = list(providers)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _, name in in_turn(names, int(min(max(seconds / round_seconds, turns[0]), turns[1]))):
        call = providers[name]
        call()
        taken[name] += timed(call, calls[name][0])
    return {name: np.asarray(values) for name, values in taken.items()}


def measure(comparison: Comparison, turns: tuple[int, int] = TURNS) -> dict[str, Result]:
    """All providers of one comparison."""
    providers = {name: make() for name, make in comparison.providers.items()}
    seconds = interleave(providers, turns=turns)
    results = {}
    for name, call in providers.items():
        dispatches, waits = (None, None) if COMPILED in name else count_dispatches(call)
        peak = peak_memory(call, DEVICE) if comparison.memory else None
        device = _device_seconds(call) if DEVICE == "cuda" and not waits else None
        results[name] = Result(seconds[name], dispatches, waits, peak, device)
    return results


def _device_seconds(call: Call) -> float | None:
    try:
        return seconds_of(recorded(call, DEVICE), DEVICE)
    except RuntimeError:  # what waits for the device, or is compiled to a graph already, cannot be captured
        return None


def table_rows(comparison: Comparison, results: Mapping[str, Result]) -> list[dict[str, object]]:
    """A row a provider; `times_ours` above 1 says how much faster ours is, below 1 how much slower."""
    peak_bandwidth = {device.name: device.bandwidth for device in DEVICES}
    found = []
    for name, result in results.items():
        low, high = np.percentile(result.seconds, (20, 80))
        row = {
            "suite": comparison.suite,
            **comparison.case,
            "provider": name,
            "median_us": f"{result.median * 1e6:.1f}",
            "p20_us": f"{low * 1e6:.1f}",
            "p80_us": f"{high * 1e6:.1f}",
            "times_ours": f"{result.median / results[OURS].median:.2f}",
            "rounds": len(result.seconds),
            "dispatches": "" if result.dispatches is None else result.dispatches,
            "host_waits": "" if result.waits is None else result.waits,
        }
        if result.peak_bytes is not None:
            row["peak_MiB"] = f"{result.peak_bytes / 2**20:.2f}"
        if DEVICE == "cuda":
            row["device_us"] = "" if result.device_seconds is None else f"{result.device_seconds * 1e6:.1f}"
        if DEVICE == "cuda" and comparison.moved_bytes is not None:
            achieved = comparison.moved_bytes / (result.device_seconds or result.median)
            row["GB_per_s"] = f"{achieved / 1e9:.0f}"
            peaks = [peak for device, peak in peak_bandwidth.items() if device.split()[0] in _machine()]
            row["of_peak"] = f"{achieved / peaks[0]:.0%}" if peaks else ""
        found.append(row | environment())
    return found
