"""Which samples make which batch: a function of (seed, step), so that a resumed run reads on where it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

__all__ = ["BatchPlan"]


@dataclass(frozen=True)
class BatchPlan:
    """A shuffled epoch after another, cut into global batches, micro-batches and shares of processes.

    Batches run on from one epoch into the next, so no sample is left out and a data set may be smaller than a
    batch. A global batch's samples don't depend on how many processes and micro-batches share it.

    Args:
        length: of the data set.
        micro_batch: samples a process computes at once.
        accumulation: micro-batches of a step.
        processes: that share a step.
        seed: of the order.
    """

    length: int
    micro_batch: int
    accumulation: int
    processes: int
    seed: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError("the data set has no samples")

    @property
    def total(self) -> int:
        """Samples of a step."""
        return self.micro_batch * self.accumulation * self.processes

    def places(self, micro: int, process: int) -> range:
        """A micro-batch's places in the global batch."""
        start = (micro * self.processes + process) * self.micro_batch
        return range(start, start + self.micro_batch)

    def indices(self, step: int, micro: int, process: int) -> list[int]:
        """The samples of a micro-batch."""
        start = step * self.total
        positions = [start + place for place in self.places(micro, process)]
        orders = {epoch: self._order(epoch) for epoch in {p // self.length for p in positions}}
        return [int(orders[p // self.length][p % self.length]) for p in positions]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.length)

    def micro_batches(self, process: int, first: int, last: int) -> Iterator[list[int]]:
        """One process's samples of the steps `first` to `last`, the latter not included."""
        order, known = np.empty(0, int), -1
        for step in range(first, last):
            for micro in range(self.accumulation):
                chosen = []
                for place in self.places(micro, process):
                    epoch, row = divmod(step * self.total + place, self.length)
                    if epoch != known:
                        order, known = self._order(epoch), epoch
                    chosen.append(int(order[row]))
                yield chosen
