"""Every comparison under pytest-benchmark, one benchmark a provider:

    pytest bench --benchmark-only

The providers of a comparison are measured together, taking turns (`measure.interleave`), when its first one
is asked for; pytest-benchmark is then shown the times that were taken. BENCH_TURNS=1 in the environment takes
so many turns, however short, for who wants to see that all of it runs and not the times.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache

import pytest

from bench import suites
from bench.measure import OURS, TURNS, Comparison, Result, measure


class _Replay:
    """A clock that shows recorded durations: read once before and once after each call."""

    def __init__(self) -> None:
        self.readings: list[float] = []

    def load(self, seconds: Sequence[float]) -> None:
        now, self.readings = 0.0, []
        for duration in seconds:
            self.readings += [now, now + duration]
            now += duration
        self.readings.reverse()

    def __call__(self) -> float:
        return self.readings.pop()


_replay = _Replay()
_FEWEST, _MOST = (int(os.environ.get("BENCH_TURNS", turns)) for turns in TURNS)
_COMPARISONS = [c for c in suites.comparisons() if not c.slow]


@cache
def _measured(index: int) -> dict[str, Result]:
    return measure(_COMPARISONS[index], (_FEWEST, _MOST))


def _parameters() -> list:
    return [
        pytest.param(index, provider, id=f"{comparison.title}, {provider}")
        for index, comparison in enumerate(_COMPARISONS)
        for provider in comparison.providers
    ]


@pytest.mark.benchmark(timer=_replay)
@pytest.mark.parametrize("index, provider", _parameters())
def test_provider(benchmark, index: int, provider: str) -> None:
    comparison: Comparison = _COMPARISONS[index]
    results = _measured(index)
    result = results[provider]
    benchmark.group = comparison.title
    benchmark.name = provider
    benchmark.extra_info |= {
        "times_ours": result.median / results[OURS].median,
        "dispatches": result.dispatches,
        "host_waits": result.waits,
        "peak_bytes": result.peak_bytes,
    }
    _replay.load(result.seconds.tolist())
    benchmark.pedantic(lambda: None, rounds=len(result.seconds), iterations=1)
