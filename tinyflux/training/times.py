"""At which times the student is trained.

Time t runs from noise (0) to data (1); what is drawn is the share of noise s = 1 - t, on which shifts act.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_sampler.kernels import shift_sigma
from moe_sampler.tinyflux.training.time_settings import TimeSettings
from moe_sampler.training.draws import Draws

__all__ = ["sample_noise"]

_MARGIN = 1e-4  # at the very ends there is nothing to learn, or an SNR of 0 or infinity to weigh it by


def sample_noise(settings: TimeSettings, draws: Draws) -> Tensor:
    """Every sample's share of noise: float32 [B] in [1e-4, 1 - 1e-4], on the draws' device."""
    noise = draws.stratified("time") if settings.stratified else draws.uniform("time")
    if settings.sampling == "logit_normal":
        noise = torch.sigmoid(settings.mean + settings.std * torch.special.ndtri(noise))
    return shift_sigma(noise, settings.shift).clamp(_MARGIN, 1 - _MARGIN).float()
