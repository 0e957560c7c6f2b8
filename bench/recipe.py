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
    # diffusers' pipelines pass tensors, too, whatever the annotation says.
    return scheduler.step(epsilon, timestep, x, return_dict=False)[0]  # pyright: ignore[reportArgumentType]


def sol_step_written_out(
    x: Tensor, velocity: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor, ancestral: bool
) -> Tensor:
    """`sol_step` with DDPM's (Ho et al. 2020) or DDIM's (Song et al. 2021) step in place of the scheduler's.

    alpha_bar, alpha_bar_next: 0-d, at this timestep and the next. The schedulers themselves break the graph
    of torch.compile at every look-up; this compiles to one.
    """
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x0 = alpha * x - sigma * velocity
    epsilon = (x - alpha * x0) / sigma
    x0 = (x - sigma * epsilon) / alpha
    if not ancestral:
        return alpha_bar_next.sqrt() * x0 + (1 - alpha_bar_next).sqrt() * epsilon
    step_alpha = alpha_bar / alpha_bar_next
    of_x0 = alpha_bar_next.sqrt() * (1 - step_alpha) / (1 - alpha_bar)
    of_x = step_alpha.sqrt() * (1 - alpha_bar_next) / (1 - alpha_bar)
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - step_alpha)
    return of_x0 * x0 + of_x * x + variance.sqrt() * torch.randn_like(x)


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
