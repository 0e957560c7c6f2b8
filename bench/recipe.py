"""The published recipe for sampling with Sol and Lune, written out by hand as its guide has it."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor


def sol_step(
    x: Tensor, velocity: Tensor, timestep: Tensor, scheduler: DDPMScheduler | DDIMScheduler
) -> Tensor:
    """v → x0 → ε, then the step of an ε scheduler."""
    alpha_bar = scheduler.alphas_cumprod[timestep]
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x0 = alpha * x - sigma * velocity
    epsilon = (x - alpha * x0) / sigma
    return scheduler.step(epsilon, timestep, x).prev_sample


def lune_step(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, shift: float) -> Tensor:
    """Shift both sigmas, then subtract the velocity."""
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    sigma_next = shift * sigma_next / (1 + (shift - 1) * sigma_next)
    return x - velocity * (sigma - sigma_next)


def guide(output: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance of a doubled batch."""
    uncond, cond = output.chunk(2)
    return uncond + scale * (cond - uncond)


def double(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The next model input, for guidance."""
    return torch.cat([x, x]).to(dtype)
