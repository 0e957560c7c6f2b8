"""The average of the weights over training, and running with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

__all__ = ["WeightAverage"]


class WeightAverage:
    """Exponential moving average, float32, of what is trained; under FSDP each process averages its share.

    The decay of update n = 1, 2 ... is min(`decay`, n / (9 + n)), so early weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.updates = model, decay, 0
        self._reshard()
        trained = [p.detach() for p in model.parameters() if p.requires_grad]
        # Views of this process's share, which everything that changes weights changes in place.
        self._own = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
        self._average = [p.float().clone() for p in self._own]

    def _reshard(self) -> None:
        """Give up whole parameters, which the root still has after a forward pass without gradients."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, self.updates / (9 + self.updates))
        torch._foreach_lerp_(self._average, self._own, 1 - decay)

    @torch.no_grad()
    def set(self, updates: int) -> None:
        """The model's weights are the average after so many updates."""
        self.updates = updates
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
