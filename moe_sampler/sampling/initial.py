"""What a run starts from: noise, or a noised image."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_sampler.kernels import philox_normal

from .plan import SamplingPlan
from .predictions import add_noise

__all__ = ["INITIAL_NOISE_STREAM", "check_state", "initial_latents", "noised"]

INITIAL_NOISE_STREAM = 1  # the steps' own noise is stream 0


def initial_latents(
    plan: SamplingPlan,
    shape: Sequence[int],
    seeds: Sequence[int] | torch.Tensor,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The state a plan starts from: float32 noise that depends on each sample's seed alone.

    For plans that begin at pure noise; one that begins further down starts from an image (see `noised`).

    Args:
        plan: decides the scale.
        shape: of the batch, [B, ...].
        seeds: B integers, one a sample.
    """
    return _drawn(shape, seeds, device).mul_(plan.initial_scale)


def noised(
    plan: SamplingPlan,
    x0: torch.Tensor,
    *,
    seeds: Sequence[int] | torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """The state a plan starts from if it starts from an image: alpha * x0 + sigma * noise at its first level.

    Args:
        plan: one that begins below pure noise, `plan(..., start=0.6)`; `plan.start_level` is the level.
        x0: [B, ...] float32, clean latents.
        seeds: B integers, one a sample, for the noise `initial_latents` would draw; or
        noise: [B, ...] float32, N(0, 1).

    Returns:
        [B, ...] float32.
    """
    if (seeds is None) == (noise is None):
        raise ValueError("give either seeds or noise")
    check_state(x0)
    if seeds is not None:
        noise = _drawn(x0.shape, seeds, x0.device)
    elif noise is not None and noise.shape != x0.shape:
        raise ValueError(f"noise must have shape {list(x0.shape)}, got {list(noise.shape)}")
    assert noise is not None  # one of the two was given
    return add_noise(x0, noise, plan.start_level.alpha, plan.start_level.sigma)


def _drawn(
    shape: Sequence[int], seeds: Sequence[int] | torch.Tensor, device: torch.device | str
) -> torch.Tensor:
    if len(seeds) != shape[0]:
        raise ValueError(f"{shape[0]} samples need as many seeds, got {len(seeds)}")
    return philox_normal(tuple(shape), seeds, stream=INITIAL_NOISE_STREAM, device=device)


def check_state(x: torch.Tensor) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f"the sampling state is float32 whatever the models' dtype, got {x.dtype}")
