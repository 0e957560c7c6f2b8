"""The average of the weights over training, and running with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import nn

__all__ = ["WeightAverage"]


class WeightAverage:
    """diffusers' exponential moving average, in float32, over what is trained.

    The decay grows as (1 + step) / (10 + step) up to `decay`, so early weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.average = EMAModel(self._trained(), decay=decay, foreach=True)

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def update(self) -> None:
        self.average.step(self._trained())

    @property
    def step(self) -> int:
        return self.average.optimization_step

    def set(self, step: int) -> None:
        """The model's weights are the average after `step` updates."""
        self.average.optimization_step = step
        with torch.no_grad():
            for average, parameter in zip(self.average.shadow_params, self._trained(), strict=True):
                average.copy_(parameter)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the context the model has the averaged weights; its own come back whatever happens."""
        own = [p.detach().clone() for p in self._trained()]
        try:
            self.average.copy_to(self._trained())
            yield
        finally:
            with torch.no_grad():
                for parameter, kept in zip(self._trained(), own, strict=True):
                    parameter.copy_(kept)
