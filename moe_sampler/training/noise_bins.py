"""Losses by noise level, summed up for a line of the log."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

__all__ = ["NoiseBins"]


class NoiseBins:
    """The mean loss in each of `count` equal parts of the noise axis, 0 (data) to 1 (noise)."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._sums = torch.zeros(2, count, dtype=torch.float64)

    def add(self, losses: Tensor, noise: Tensor) -> None:
        """losses, noise: [B], on the host."""
        part = (noise.double() * self.count).long().clamp_(0, self.count - 1)
        self._sums[0].index_add_(0, part, losses.detach().double())
        self._sums[1].index_add_(0, part, torch.ones_like(losses, dtype=torch.float64))

    def take(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Means by bin, "0.2-0.4" for example, of all processes; empty bins are left out. Starts anew."""
        sums = self._sums
        if accelerator is not None and accelerator.num_processes > 1:
            reduced = accelerator.reduce(sums.to(accelerator.device), "sum")
            assert isinstance(reduced, Tensor)
            sums = reduced
        totals, counts = sums.tolist()
        self._sums.zero_()
        edges = [f"{i / self.count:.3g}-{(i + 1) / self.count:.3g}" for i in range(self.count)]
        return {edge: t / n for edge, t, n in zip(edges, totals, counts, strict=True) if n}
