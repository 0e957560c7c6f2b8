"""The student's training step and attention statistics beside their alternatives, with peak memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bench import features, student, student_training
from bench.device.results import Results, Row
from bench.measure import TURNS, Comparison, table_rows
from bench.measure import measure as measured
from bench.student import Work
from bench.student_training import rows

__all__ = ["measure"]

_TOY = Work(
    {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "num_double_layers": 1,
        "num_single_layers": 1,
        "axes_dims_rope": (4, 6, 6),
        "lune_expert_dim": 16,
        "lune_hidden_dim": 16,
        "lune_dropout": 0.0,
        "sol_hidden_dim": 16,
    },
    batch=2,
    side=4,
    length=4,
)
_PUBLISHED = Work({"lune_dropout": 0.0}, batch=16, side=32, length=128, dtype=torch.bfloat16)
"""TinyFlux-Deep's own size; images of 256 pixels a side, in a 16-channel VAE's latents."""


def measure(results: Results) -> None:
    turns = (1, 1) if results.rehearsal else TURNS
    if results.rehearsal:
        comparisons = [student.comparison(_TOY), features.comparison("toy", [(1, 4, 8)], torch.float32)]
        loops = partial(rows, kinds=("cached",), seconds=0.0, turns=turns, batch=2, samples=2)
    else:
        comparisons = [
            student.comparison(_PUBLISHED),
            features.comparison("all 16 of Stable Diffusion 1.5", features.STABLE_DIFFUSION, torch.float16),
            features.comparison("one of 64×64, head size 40", [(1, 64, 40)], torch.float16),
            student.comparison(student.MIDDLE),
            *features.comparisons(),
        ]
        loops = partial(rows, seconds=6.0)
    for comparison in comparisons:
        results.attempt(comparison.title, lambda comparison=comparison: _rows(comparison, turns))
    results.attempt(
        student_training.SUITE,
        lambda: [(student_training.SUITE, row) for row in loops()],
    )


def _rows(comparison: Comparison, turns: tuple[int, int]) -> Iterator[tuple[str, Row]]:
    for row in table_rows(comparison, measured(comparison, turns)):
        yield comparison.suite, row
