"""What a run's steps are fed with: the models' inputs and timesteps, and noise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from moe_sampler.kernels.noise import normal_of_steps

from .experts import Expert
from .plan import ExpertCall, SamplingPlan

__all__ = ["Inputs", "NoiseAhead", "timesteps_of"]


class Inputs:
    """Two alternating sets of model inputs, so that a model may return its input itself."""

    def __init__(self, x: torch.Tensor, experts: Mapping[str, Expert]) -> None:
        self._x, self._experts = x, experts
        self._buffers: dict[tuple[int, int, int, torch.dtype], torch.Tensor] = {}

    def buffers(self, calls: Iterable[ExpertCall], index: int) -> list[torch.Tensor]:
        return [self._buffer(index % 2, slot, call) for slot, call in enumerate(calls)]

    def _buffer(self, parity: int, slot: int, call: ExpertCall) -> torch.Tensor:
        batch = self._x.shape[0] * (2 if call.guided else 1)
        key = (parity, slot, batch, self._experts[call.name].dtype or torch.float32)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(
                (batch, *self._x.shape[1:]), dtype=key[-1], device=self._x.device
            )
        return self._buffers[key]

    def write(self, calls: Sequence[ExpertCall], index: int) -> list[torch.Tensor]:
        """Fill a step's inputs from the state: before the first step, or after a callback changed it."""
        buffers = self.buffers(calls, index)
        for call, buffer in zip(calls, buffers, strict=True):
            for copy in buffer.split(self._x.shape[0]):
                copy.copy_(self._x * call.input_scale)
        return buffers


def timesteps_of(plan: SamplingPlan, device: torch.device) -> list[list[torch.Tensor]]:
    """0-d device tensors, int64 for discrete paths and float32 else, moved in two copies."""
    calls = [call for step in plan.steps for call in step.calls]
    whole = iter(torch.tensor([int(c.timestep) for c in calls], dtype=torch.int64).to(device).unbind())
    real = iter(torch.tensor([float(c.timestep) for c in calls], dtype=torch.float32).to(device).unbind())
    pairs = iter([(i, r) for i, r in zip(whole, real, strict=True)])

    def pick(call: ExpertCall) -> torch.Tensor:
        integer, floating = next(pairs)
        return integer if isinstance(call.timestep, int) else floating

    return [[pick(call) for call in step.calls] for step in plan.steps]


class NoiseAhead:
    """The noise of coming steps, drawn several at a time, on a CPU: a model leaves nothing of the generator
    in the caches, and to fetch that again at every step costs more than the noise of small latents."""

    _ELEMENTS = 1 << 18

    def __init__(self, steps: Sequence[int], like: torch.Tensor, seeds: torch.Tensor) -> None:
        self._steps, self._shape, self._seeds = steps, tuple(like.shape), seeds
        self._count = max(1, self._ELEMENTS // max(like.numel(), 1))
        self._drawn: dict[int, torch.Tensor] = {}

    def __call__(self, step: int) -> torch.Tensor:
        if step not in self._drawn:
            coming = [other for other in self._steps if other >= step][: self._count]
            drawn = normal_of_steps(self._shape, self._seeds, coming)
            self._drawn = dict(zip(coming, drawn.unbind(), strict=True))
        return self._drawn.pop(step)
