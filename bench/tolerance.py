"""The rule for results in low precision: an error no larger than twice that of eager torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["error_and_allowance"]


def error_and_allowance(
    result: Tensor, eager: Tensor, reference: Tensor, cap: float = 1e-6
) -> tuple[float, float]:
    """(|result − reference|, 2·|eager in that precision − reference| + 1e-6), by largest error.

    A float32 result was computed in float32 whatever the precision of the inputs, so it is capped besides:
    `cap` is 1e-6 of the largest value elementwise, and up to 1e-4 for long reductions. reference: float64.
    An error that is not a number is infinite.
    """
    error = (result.to(reference) - reference).abs().max().item()
    allowed = 2 * (eager.to(reference) - reference).abs().max().item() + 1e-6
    if result.dtype == torch.float32:
        allowed = min(allowed, cap + cap * reference.abs().max().item())
    return (error if error == error else float("inf")), allowed
