"""All comparisons, by the table they belong to."""

from __future__ import annotations

from collections.abc import Iterator

from bench import features, noise, steps, student, student_features, training
from bench.measure import Comparison

SUITES = {
    module.SUITE: module.comparisons
    for module in (steps, noise, training, student, features, student_features)
}


def comparisons() -> Iterator[Comparison]:
    for suite in SUITES.values():
        yield from suite()
