"""How a ComfyUI model was trained, read from its `model_sampling`, whose sigmas are noise levels.

ComfyUI tells a model the sigma of its own convention. Flow models (`CONST`) have x = (1 - sigma) x0 +
sigma eps, as `FlowPath`. All others (eps, v, EDM, x0) have x = x0 + sigma eps; divided by sqrt(1 + sigma^2)
that is a `VPPath`. What a model predicts need not be known: ComfyUI turns it into x0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import comfy.model_sampling
import numpy as np
import torch

from ..sampling.experts import SHIFTS
from ..sampling.paths import FlowPath, VPPath, noise_of_sigma

__all__ = ["ModelLevels"]

_SAME = 1e-5
"""Two sigmas that differ by less are one, rounded to float32 on the way."""


@dataclass(frozen=True)
class ModelLevels:
    """A ComfyUI model's noise levels.

    Args:
        path: for the planner.
        shift: k of the shifted sigmas that the model was trained or patched to be sampled with; 1 where there
            is none.
    """

    path: VPPath | FlowPath
    shift: float = 1.0

    @classmethod
    def of(cls, model_sampling: Any) -> ModelLevels:
        """Of a MODEL: `ModelLevels.of(model.get_model_object("model_sampling"))`.

        Raises:
            ValueError: a model that makes no image out of noise, or sigmas that make no path.
        """
        if isinstance(model_sampling, comfy.model_sampling.IMG_TO_IMG):
            raise ValueError(
                "this model turns images into images in one call: it has no noise levels to route"
            )
        sigmas = model_sampling.sigmas.detach().cpu().double().numpy()
        if isinstance(model_sampling, comfy.model_sampling.CONST):
            # sigmas[i] is that of the unshifted (i + 1) / T, whatever the class calls its shift.
            count = len(sigmas)
            half = sigmas[count // 2 - 1] if count > 1 else 0.5
            u = (count // 2) / count if count > 1 else 0.5
            shift = half * (1.0 - u) / (u * (1.0 - half))
            scale = float(getattr(model_sampling, "multiplier", 1.0))
            return cls(FlowPath(scale), float(np.clip(_plain(shift), *SHIFTS)))
        return cls(_vp_path(sigmas, model_sampling))

    @cached_property
    def _log_sigmas(self) -> torch.Tensor:
        """[T] float64, of a path with timesteps."""
        assert isinstance(self.path, VPPath)
        return torch.from_numpy(np.log(self.path.sigmas) - np.log(self.path.alphas))

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """0-d float32: the model's sigma at a timestep of the path (0-d). It doesn't wait for the device."""
        if isinstance(self.path, FlowPath):
            return (timestep.double() / self.path.timestep_scale).float()
        table = self._log_sigmas.to(timestep.device)
        t = timestep.double().clamp(0, len(table) - 1)
        low, high = t.floor().long(), t.ceil().long()
        return torch.lerp(table[low], table[high], t - low).exp().float()

    def scaled(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """A state on the path, as ComfyUI gives it to the model. sigma: as `sigma` returns it."""
        return x if isinstance(self.path, FlowPath) else x * (1.0 + sigma.double() ** 2).sqrt().float()

    def sigma_at(self, noise: float) -> float:
        """The model's sigma at a share of noise; beyond its noisiest level, that one's."""
        if isinstance(self.path, FlowPath):
            return noise
        highest = float(self._log_sigmas[-1].exp())
        return min(noise / (1.0 - noise), highest) if noise < 1.0 else highest

    def noise_at(self, sigma: float) -> float:
        """The share of noise at one of the model's sigmas."""
        return noise_of_sigma(self.path, sigma)

    def sigmas_at(self, noises: Iterable[float]) -> torch.Tensor:
        """float32: the model's sigmas at shares of noise."""
        return torch.tensor([self.sigma_at(noise) for noise in noises])


def _plain(shift: float) -> float:
    """A shift as it was set, without float32's rounding."""
    return float(f"{shift:.5g}")


def _vp_path(sigmas: np.ndarray, model_sampling: Any) -> VPPath:
    """The path of a table of sigmas: that of a schedule by name, if they are its."""
    starts = getattr(model_sampling, "linear_start", 0.00085), getattr(model_sampling, "linear_end", 0.012)
    for named in (VPPath.scaled_linear, VPPath.linear):
        for ends in ((), starts):
            path = named(*ends, **({"num_train_timesteps": len(sigmas)} if len(sigmas) != 1000 else {}))
            if np.allclose(path.sigmas / path.alphas, sigmas, rtol=_SAME, atol=0.0):
                return path
    rising = [float(sigmas[0])]
    for sigma in sigmas[1:].tolist():  # some tables end in many equal sigmas
        if sigma > rising[-1] * (1.0 + _SAME):
            rising.append(sigma)
    if not rising[0] > 0.0 or not math.isfinite(rising[-1]):
        raise ValueError(f"a model's sigmas must be positive and finite, got {rising[0]:g} to {rising[-1]:g}")
    log_signal = -np.log1p(np.asarray(rising) ** 2)
    return VPPath(tuple((-np.expm1(np.diff(log_signal, prepend=0.0))).tolist()))
