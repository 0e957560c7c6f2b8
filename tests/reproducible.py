"""Whether a sample's noise is its seed's."""

from __future__ import annotations

import torch

from moe_sampler import Expert, SamplingPlan, sample

SEEDS = (5, 6, 7)


def assert_reproducible(compiled: SamplingPlan, expert: Expert) -> None:
    """The same again in another order and alone, and another for every seed."""
    start = torch.linspace(-1.0, 1.0, 64).reshape(1, 1, 8, 8)
    starts = start.expand(3, 1, 8, 8)
    together = sample(compiled, expert, starts, seeds=SEEDS)
    for i, seed in enumerate(SEEDS):
        assert torch.equal(sample(compiled, expert, start, seeds=[seed])[0], together[i])
    assert torch.equal(sample(compiled, expert, starts, seeds=[7, 5, 6])[[1, 2, 0]], together)
    # From one start the seeds differ in nothing but this noise.
    assert all((together[i] - together[i - 1]).abs().max() > 1e-3 for i in range(3))
