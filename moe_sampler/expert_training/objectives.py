"""What an expert learns: at which noise levels, what it is shown there, and what it should answer.

    epsilon    DDPM path, integer timesteps    ε                   Ho et al. 2020, arXiv:2006.11239
    sol        DDPM path, integer timesteps    v = α·ε − σ·x0      Salimans and Ho 2022, arXiv:2202.00512
    lune       rectified flow, told 1000·s     u = ε − x0          Liu et al. 2022, arXiv:2209.03003

Levels are drawn as shares of noise s = σ/(α + σ) whatever the path, so one density serves all: on the DDPM
path a sample takes the integer timestep whose share of noise is nearest. Only "uniform" means the timesteps
themselves there, as Stable Diffusion was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_sampler.kernels import ddpm_training_pair, flow_training_pair, weighted_mse
from moe_sampler.kernels.loss_weights import MinSNR
from moe_sampler.kernels.shift import shift_sigma
from moe_sampler.kernels.training_pairs import TrainingPair

from .._transfers import OnDevice
from ..sampling.experts import Expert
from ..sampling.paths import FlowPath, Level, VPPath
from ..sampling.predictions import Prediction, x0_coefficients
from ..training.draws import Draws
from .settings import ExpertSettings, LevelSettings, density_of, scheduler_config

__all__ = ["Levels", "Objective"]


class Levels(NamedTuple):
    """Noise levels of a batch.

    told: what the path counts in, float32 [B] of s for a flow, int64 [B] of timesteps for DDPM. alpha, sigma:
    float32 [B]. noise: float64 [B], the share of noise.
    """

    told: Tensor
    alpha: Tensor
    sigma: Tensor
    noise: Tensor


class Objective:
    """One of the objectives above.

    Args:
        kind: "epsilon", "sol" or "lune".
        expert, levels: settings of theirs; what else they say doesn't count here.

    Attributes:
        scheduler: config of the diffusers scheduler that says what this trains on.
        path, prediction: what it says.
    """

    def __init__(
        self,
        kind: str,
        expert: ExpertSettings | None = None,
        levels: LevelSettings | None = None,
    ) -> None:
        self.kind = kind
        self.settings = LevelSettings() if levels is None else levels
        self.scheduler: Mapping[str, Any] = scheduler_config(kind, expert or ExpertSettings(), self.settings)
        self.density = density_of(kind, self.settings)
        described = Expert.from_scheduler_config(kind, self.scheduler)
        self.path = described.path
        self.prediction: Prediction = described.prediction
        if isinstance(self.path, VPPath):
            alphas, sigmas = torch.from_numpy(self.path.alphas), torch.from_numpy(self.path.sigmas)
            shares = sigmas / (alphas + sigmas)
            self._alphas, self._sigmas = OnDevice(alphas.float()), OnDevice(sigmas.float())
            self._shares, self._between = OnDevice(shares), OnDevice((shares[1:] + shares[:-1]) / 2)

    def draw(self, draws: Draws) -> Levels:
        """Levels of a micro-batch, spread evenly over the density within the global batch."""
        u = draws.stratified("level")
        if self.density == "uniform" and isinstance(self.path, VPPath):
            return self._timesteps((u * self.path.num_train_timesteps).long())
        if self.density == "shifted":
            u = shift_sigma(u, self.settings.shift)
        elif self.density == "focus":
            focused = draws.uniform("focus") < self.settings.focus_share
            u = torch.where(focused, self.settings.focus * u, u)
        return self.at(u)

    def at(self, noise: Tensor) -> Levels:
        """The levels with these shares of noise, float64 [B]; on a DDPM path the nearest there are."""
        if self.path.discrete:
            return self._timesteps(torch.bucketize(noise, self._between.on(noise.device)))
        sigma = noise.float()
        return Levels(sigma, 1 - sigma, sigma, noise)

    def _timesteps(self, timesteps: Tensor) -> Levels:
        device = timesteps.device
        tables = (table.on(device) for table in (self._alphas, self._sigmas, self._shares))
        return Levels(timesteps, *(table[timesteps] for table in tables))

    def pair(
        self, x0: Tensor, levels: Levels, *, seeds: Tensor | None = None, noise: Tensor | None = None
    ) -> TrainingPair:
        """What the model is shown and should answer.

        x0: [B, C, h, w], float. Either seeds: int64 [B], or noise: like x0.
        """
        if self.path.discrete:
            tables = self._alphas.on(x0.device), self._sigmas.on(x0.device)
            return ddpm_training_pair(
                x0, levels.told, *tables, seeds=seeds, noise=noise, prediction=self.prediction
            )
        assert isinstance(self.path, FlowPath)
        return flow_training_pair(
            *(x0, levels.told),
            seeds=seeds,
            noise=noise,
            prediction=self.prediction,
            timestep_scale=self.path.timestep_scale,
        )

    def errors(self, prediction: Tensor, target: Tensor, levels: Levels) -> Tensor:
        """float32 [B]: mean squared errors of the model's answers, with the min-SNR weight if there is one.

        prediction, target: [B, C, h, w].
        """
        gamma = self.settings.min_snr_gamma
        weight = None if gamma is None else MinSNR(gamma, levels.alpha, levels.sigma, self.prediction)
        return weighted_mse(prediction.contiguous(), target, min_snr=weight, reduction="none")

    def x0(self, prediction: Tensor, noisy: Tensor, levels: Levels) -> Tensor:
        """float32 [B, C, h, w]: the data that answers to these inputs stand for."""
        pairs = zip(levels.alpha.tolist(), levels.sigma.tolist(), strict=True)
        factors = torch.tensor([x0_coefficients(self.prediction, Level(*pair)) for pair in pairs])
        p, q = factors.to(noisy.device)[..., None, None, None].unbind(1)
        return p * noisy.float() + q * prediction.float()
