"""The betas of DDPM's noise schedules by diffusers' names: one formula each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["BETA_SCHEDULES", "betas_from_config", "without_terminal_signal"]


def linear(start: float, end: float, total: int) -> np.ndarray:
    """[T]: linear in t, the DDPM default and Sol's training."""
    return np.linspace(start, end, total)


def scaled_linear(start: float, end: float, total: int) -> np.ndarray:
    """[T]: linear in the square root, as Stable Diffusion."""
    return np.linspace(start**0.5, end**0.5, total) ** 2


def cosine(start: float, end: float, total: int, largest: float = 0.999) -> np.ndarray:
    """[T] with abar(u) = cos^2(pi/2 (u + 0.008) / 1.008), u = t / T (arXiv:2102.09672, eq. 17), which has its
    own ends."""
    u = np.arange(total + 1) / total
    abar = np.cos((u + 0.008) / 1.008 * math.pi / 2.0) ** 2
    return np.minimum(1.0 - abar[1:] / abar[:-1], largest)


def sigmoid(start: float, end: float, total: int) -> np.ndarray:
    """[T]: a logistic curve over -6..6, as GeoDiff."""
    return (end - start) / (1.0 + np.exp(-np.linspace(-6, 6, total))) + start


BETA_SCHEDULES: Mapping[str, Callable[[float, float, int], np.ndarray]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "squaredcos_cap_v2": cosine,
    "sigmoid": sigmoid,
}


def without_terminal_signal(betas: np.ndarray) -> np.ndarray:
    """[T] betas [T] with sqrt(abar) moved and stretched so that its first value stays and its last is 0
    (arXiv:2305.08891, algorithm 1): diffusers' `rescale_betas_zero_snr`. The last beta is 1."""
    roots = np.sqrt(np.cumprod(1.0 - betas))
    first, last = roots[0], roots[-1]
    abar = ((roots - last) * first / (first - last)) ** 2
    return 1.0 - np.concatenate([abar[:1], abar[1:] / abar[:-1]])


def betas_from_config(config: Mapping[str, Any], dtype: type[np.floating] = np.float64) -> np.ndarray:
    """[T] of `dtype`: the betas a diffusers scheduler config describes.

    Raises:
        ValueError: a beta schedule this package doesn't know, or zero terminal SNR from a single beta.
    """
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], dtype=np.float64)
    else:
        name = config.get("beta_schedule", "linear")
        if name not in BETA_SCHEDULES:
            known = ", ".join(BETA_SCHEDULES)
            raise ValueError(f'beta_schedule "{name}" is not supported: use {known} or trained_betas')
        start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
        betas = BETA_SCHEDULES[name](start, end, config.get("num_train_timesteps", 1000))
    betas = betas.astype(dtype)
    if not config.get("rescale_betas_zero_snr"):
        return betas
    if len(betas) < 2:
        raise ValueError("rescale_betas_zero_snr needs at least two timesteps")
    return without_terminal_signal(betas)
