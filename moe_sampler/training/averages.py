"""The average of the weights over training, and running with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

__all__ = ["WeightAverage"]

_AT_ONCE = 2**25
"""Numbers that are averaged together, so that what is computed on the way takes little memory."""


class WeightAverage:
    """Exponential moving average, float32, of what is trained; under FSDP each process averages its share.

    The decay of update n = 1, 2 ... is min(`decay`, n / (9 + n)), so early weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self._reshard()
        trained = [p.detach() for p in model.parameters() if p.requires_grad]
        # Views of this process's share, which everything that changes weights changes in place.
        self._own = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
        self._average = [p.float().clone() for p in self._own]
        self._parts = _parts([p.numel() for p in self._own])
        # Counted on the device: whether a step counts, only the device knows when it is made.
        self._updates = torch.zeros((), dtype=torch.float64, device=self._own[0].device)

    def _reshard(self) -> None:
        """Give up whole parameters, which the root still has after a forward pass without gradients."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @property
    def updates(self) -> int:
        """How many there were. This waits for the device."""
        return int(self._updates)

    @torch.no_grad()
    def update(self, counts: Tensor | None = None) -> None:
        """After a step. counts: bool [], whether it was made; one that wasn't changes nothing."""
        self._updates += 1 if counts is None else counts
        decay = (self._updates / (9 + self._updates)).clamp_max(self.decay)
        weight = (1 - decay if counts is None else (1 - decay) * counts).float()
        for part in self._parts:
            average, own = self._average[part], self._own[part]
            change = torch._foreach_sub(own, average)
            torch._foreach_mul_(change, weight)
            torch._foreach_add_(average, change)

    @torch.no_grad()
    def set(self, updates: int) -> None:
        """The model's weights are the average after so many updates."""
        self._updates.fill_(updates)
        torch._foreach_copy_(self._average, self._own)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the context the model has the averaged weights; its own come back whatever happens."""
        self._reshard()
        own = [p.clone() for p in self._own]
        try:
            torch._foreach_copy_(self._own, self._average)
            yield
        finally:
            self._reshard()
            torch._foreach_copy_(self._own, own)


def _parts(sizes: Sequence[int]) -> list[slice]:
    """Neighbours that have at most _AT_ONCE numbers together, or one that has more."""
    parts, first, count = [], 0, 0
    for place, size in enumerate(sizes):
        if place > first and count + size > _AT_ONCE:
            parts.append(slice(first, place))
            first, count = place, 0
        count += size
    return [*parts, slice(first, len(sizes))]
