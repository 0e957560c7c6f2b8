"""Random numbers of training, each a function of (seed, step, place in the global batch) alone.

So a batch is the same on one process or on eight, and a run that was stopped and resumed draws what one that
was not would have drawn, without any generator's state. All of it is drawn on the host, so it is the same for
any device; to a GPU it is copied in the background.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._transfers import to_device

__all__ = ["Draws"]


class Draws:
    """What one micro-batch draws. Every purpose has its own `stream`, a name, so that none disturbs another.

    Args:
        seed: of the run, not negative.
        step: optimizer step, from 0.
        places: the samples' places in the step's global batch.
        total: samples in the global batch.
        device: of the tensors.
    """

    def __init__(
        self, seed: int, step: int, places: range, total: int, device: torch.device | str = "cpu"
    ) -> None:
        if not 0 <= places.start <= places.stop <= total or places.step != 1:
            raise ValueError(f"places {places} do not lie in a batch of {total}")
        self.seed, self.step, self.places, self.total, self.device = seed, step, places, total, device

    def __len__(self) -> int:
        return len(self.places)

    def on(self, device: torch.device | str) -> Draws:
        """The same draws elsewhere."""
        return Draws(self.seed, self.step, self.places, self.total, device)

    def values(self, kind: str, of: Any, *more: Any) -> Tensor:
        """What the method `kind` gives with these arguments, on the host."""
        if kind == "scheduled":
            return torch.tensor(of(self.step, *more), dtype=torch.float32)
        drawn = getattr(_Kinds, kind)(self._generator(of), self.total, *more)
        return torch.from_numpy(drawn[self.places.start : self.places.stop].copy())

    def tensor(self, kind: str, of: Any, *more: Any) -> Tensor:
        """The same, on the draws' device."""
        return to_device(self.values(kind, of, *more), self.device)

    def _generator(self, stream: str, *more: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(stream.encode()), self.step, *more])

    def uniform(self, stream: str) -> Tensor:
        """float64 [B] in [0, 1)."""
        return self.tensor("uniform", stream)

    def stratified(self, stream: str) -> Tensor:
        """float64 [B] in [0, 1): the global batch has one in each of as many equal parts, in random order."""
        return self.tensor("stratified", stream)

    def normal(self, stream: str) -> Tensor:
        """float64 [B] of N(0, 1)."""
        return self.tensor("normal", stream)

    def integers(self, stream: str, below: int) -> Tensor:
        """int64 [B] in [0, below)."""
        return self.tensor("integers", stream, below)

    def seeds(self, stream: str) -> Tensor:
        """int64 [B], for `philox_normal` and the training pairs."""
        return self.tensor("integers", stream, 2**62)

    def scheduled(self, value: Callable[..., float], *arguments: float) -> Tensor:
        """float32 []: `value` of the step and the arguments, a number that follows from the step alone, such
        as a weight that warms up. As what is drawn it is a tensor, so that a step may be recorded and
        replayed with the next step's. It is the same function at every step."""
        return self.tensor("scheduled", value, *arguments)

    def generators(self, stream: str) -> list[np.random.Generator]:
        """One a sample, for what no array of numbers does, such as the words of a caption."""
        return [self._generator(stream, place) for place in self.places]


class _Kinds:
    """Of a whole global batch: [total]."""

    @staticmethod
    def uniform(generator: np.random.Generator, total: int) -> np.ndarray:
        return generator.uniform(size=total)

    @staticmethod
    def stratified(generator: np.random.Generator, total: int) -> np.ndarray:
        parts = np.arange(total) + generator.uniform(size=total)
        return generator.permutation(parts / total)

    @staticmethod
    def normal(generator: np.random.Generator, total: int) -> np.ndarray:
        return generator.standard_normal(total)

    @staticmethod
    def integers(generator: np.random.Generator, total: int, below: int) -> np.ndarray:
        return generator.integers(below, size=total)
