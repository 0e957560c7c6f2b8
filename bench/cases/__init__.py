"""Every kernel at the shapes and dtypes it is used with, as launches to compile, count and time on paper.

for case in cases():
    built = case.build(case.shape, "meta")
    print(case, aot.compile_launch(built.launch, 90))
"""

from __future__ import annotations

from bench.cases.case import Case
from bench.cases.sampler import sampler_cases
from bench.cases.training import training_cases


def cases() -> list[Case]:
    """Every kernel, for every dtype it supports."""
    return [*sampler_cases(), *training_cases()]
