"""All comparisons, by the table they belong to."""

from __future__ import annotations

from collections.abc import Iterator

from bench import steps
from bench.measure import Comparison

SUITES = {"sampler step": steps.comparisons}


def comparisons() -> Iterator[Comparison]:
    for suite in SUITES.values():
        yield from suite()
