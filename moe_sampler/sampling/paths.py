"""Noise paths: how a timestep, as a model is told it, becomes a noise level, and back.

Everything here is float64 on the host. A level is a pair (alpha, sigma) with x = alpha * x0 + sigma * eps.
Two levels on different paths are the same noise level when alpha / sigma agree; the latents then differ by a
positive factor only, which is what makes an exact handoff between experts possible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np

from moe_sampler.kernels.shift import shift_sigma

from .betas import linear, scaled_linear

__all__ = [
    "SPACINGS",
    "FlowPath",
    "Level",
    "Path",
    "VPPath",
    "noise_of_sigma",
    "sigma_of_noise",
    "spaced_timesteps",
]


SPACINGS = ("trailing", "leading", "linspace")


@dataclass(frozen=True, slots=True)
class Level:
    """A noise level: x = alpha * x0 + sigma * eps."""

    alpha: float
    sigma: float

    @property
    def noise(self) -> float:
        """Share of noise sigma / (alpha + sigma): the flow coordinate s, 1 at pure noise and 0 at data."""
        return self.sigma / (self.alpha + self.sigma)

    @property
    def half_log_snr(self) -> float:
        """ln(alpha / sigma); -inf at pure noise, +inf at data."""
        if self.alpha == 0.0:
            return -math.inf
        if self.sigma == 0.0:
            return math.inf
        return math.log(self.alpha / self.sigma)


class Path(Protocol):
    """What the planner needs to know of a path. Implement it to bring your own."""

    discrete: bool
    """Whether the model was trained on integer timesteps, so that nodes must lie on that grid."""

    def at(self, noise: float) -> Level:
        """The level on this path with the given share of noise (see `Level.noise`)."""
        ...

    def timestep(self, level: Level) -> float:
        """What the model is told at this level; `level` may lie on any path."""
        ...

    def level(self, timestep: float) -> Level:
        """The level a model on this path means by `timestep`."""
        ...

    def initial_scale(self, level: Level) -> float:
        """Factor on N(0, 1) noise when sampling starts at `level` without an image."""
        ...

    def grid(self, steps: int, start: float, end: float, shift: float, spacing: str) -> list[float]:
        """`steps` nodes from `start` (included) towards `end` (excluded), as shares of noise, descending."""
        ...


def _check_betas(given: Sequence[float] | np.ndarray) -> np.ndarray:
    betas = np.asarray(given, dtype=np.float64)
    if betas.ndim != 1 or not betas.size or not ((betas > 0) & (betas < 1))[:-1].all():
        raise ValueError("betas must be a one-dimensional sequence of values in (0, 1)")
    if not 0 < betas[-1] <= 1:
        raise ValueError(f"the last beta must lie in (0, 1], 1 for no signal at all, got {betas[-1]}")
    return betas


def _outside(total: int, spacing: str, offset: int) -> str:
    return f"spacing {spacing!r} with steps_offset {offset} leaves 0..{total - 1}"


def spaced_timesteps(total: int, steps: int, spacing: str, offset: int = 0) -> np.ndarray:
    """[steps] int64: diffusers' descending timesteps of a whole run on `total` training timesteps (table 2 of
    arXiv:2305.08891). offset: its `steps_offset`, of "leading".

    Raises:
        ValueError: the offset leaves the training timesteps.
    """
    if spacing == "trailing":
        timesteps = np.round(total - total / steps * np.arange(steps)) - 1
    elif spacing == "leading":
        timesteps = (np.arange(steps) * (total // steps))[::-1] + offset
    else:
        timesteps = np.round(np.linspace(0, total - 1, steps))[::-1]
    if timesteps.min() < 0 or timesteps.max() > total - 1:
        raise ValueError(_outside(total, spacing, offset))
    return timesteps.astype(np.int64)


@dataclass(frozen=True)
class VPPath:
    """Variance-preserving (DDPM) path on integer timesteps: alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t).

    Ho et al. 2020 (arXiv:2006.11239). Sol uses linear betas, Stable Diffusion 1.5 scaled-linear ones. A last
    beta of 1 means that nothing of the data is left at the last timestep: zero terminal SNR.
    """

    betas: tuple[float, ...] = field(repr=False)
    steps_offset: int = 0
    discrete = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(_check_betas(self.betas).tolist()))

    @classmethod
    @lru_cache(maxsize=16)
    def linear(
        cls, start: float = 1e-4, end: float = 0.02, num_train_timesteps: int = 1000, **kwargs
    ) -> VPPath:
        """Betas linear in t: diffusers' `beta_schedule="linear"`, the DDPM default and Sol's training."""
        return cls(tuple(linear(start, end, num_train_timesteps)), **kwargs)

    @classmethod
    @lru_cache(maxsize=16)
    def scaled_linear(
        cls, start: float = 0.00085, end: float = 0.012, num_train_timesteps: int = 1000, **kwargs
    ) -> VPPath:
        """Betas linear in their square root: diffusers' `"scaled_linear"`, as Stable Diffusion 1.5."""
        return cls(tuple(scaled_linear(start, end, num_train_timesteps)), **kwargs)

    @property
    def num_train_timesteps(self) -> int:
        return len(self.betas)

    @cached_property
    def alphas(self) -> np.ndarray:
        """[T] float64: sqrt(abar_t)."""
        return np.sqrt(np.cumprod(1.0 - np.asarray(self.betas)))

    @cached_property
    def sigmas(self) -> np.ndarray:
        """[T] float64: sqrt(1 - abar_t)."""
        with np.errstate(divide="ignore"):  # log(0) at a last beta of 1
            return np.sqrt(-np.expm1(np.cumsum(np.log1p(-np.asarray(self.betas)))))

    @cached_property
    def zero_terminal_snr(self) -> bool:
        """Whether the last timestep is pure noise."""
        return self.betas[-1] == 1.0

    @cached_property
    def _half_log_snrs(self) -> np.ndarray:
        """[T] for interpolation between timesteps, so finite."""
        ratios = self.alphas / self.sigmas
        if self.zero_terminal_snr:
            # Half way to pure noise alpha / sigma is then half as large, as where it goes to 0 linearly.
            ratios[-1] = ratios[-2] / 4.0 if len(ratios) > 1 else 1.0
        return np.log(ratios)

    @cached_property
    def _rising(self) -> tuple[np.ndarray, np.ndarray]:
        """Half the log SNRs in rising order, and their timesteps."""
        timesteps = np.arange(self.num_train_timesteps, dtype=np.float64)
        return self._half_log_snrs[::-1].copy(), timesteps[::-1].copy()

    def at(self, noise: float) -> Level:
        norm = math.hypot(1.0 - noise, noise)
        return Level((1.0 - noise) / norm, noise / norm)

    def level(self, timestep: float) -> Level:
        """Exact at integer timesteps; between them ln(alpha / sigma) is interpolated linearly."""
        if not 0 <= timestep <= self.num_train_timesteps - 1:
            raise ValueError(f"timestep {timestep} is outside 0..{self.num_train_timesteps - 1}")
        index = int(timestep)
        if index == timestep:
            return Level(float(self.alphas[index]), float(self.sigmas[index]))
        ratio = math.exp(np.interp(timestep, np.arange(self.num_train_timesteps), self._half_log_snrs))
        return self.at(1.0 / (1.0 + ratio))

    def timestep(self, level: Level) -> float:
        """Inverse of `level`; levels beyond the ends of the grid get its ends."""
        return float(np.interp(level.half_log_snr, *self._rising))

    def nearest_timestep(self, noise: float) -> int:
        """The integer timestep whose level is closest to a share of noise."""
        return round(self.timestep(self.at(noise)))

    def initial_scale(self, level: Level) -> float:
        # The training distribution at the last timestep is N(0, 1) to within alpha_T: diffusers'
        # init_noise_sigma = 1 for VP schedulers.
        return 1.0

    def grid(
        self, steps: int, start: float = 1.0, end: float = 0.0, shift: float = 1.0, spacing: str = "trailing"
    ) -> list[float]:
        """Integer-timestep nodes. Over the whole range these are diffusers' timesteps for `spacing`.

        Args:
            steps: number of nodes.
            start, end: shares of noise; the span is cut out of the timestep axis between them.
            shift: not used: VP spacings have none.
            spacing: "trailing", "leading" or "linspace" (table 2 of arXiv:2305.08891). They differ at the
                ends of the axis only: "leading" begins a stride below its top, "leading" and "linspace" have
                their last node at its bottom (plus `steps_offset`, for "leading"). A part of the axis that
                shares an end with it is spaced like it there; at a handoff, nodes begin right there, and end
                a stride before it.
        """
        if spacing not in SPACINGS:
            raise ValueError(f'unknown timestep spacing "{spacing}": use one of {", ".join(SPACINGS)}')
        total = self.num_train_timesteps
        from_noise, to_data = start >= self.level(total - 1).noise, end <= 0.0
        if from_noise and to_data:
            timesteps = spaced_timesteps(total, steps, spacing, self.steps_offset)
        else:
            timesteps = self._part_of_axis(steps, start, end, spacing, from_noise, to_data)
        if len(np.unique(timesteps)) < steps:
            raise ValueError(
                f"{steps} steps do not fit on the integer timesteps between noise levels {start:.3f} and "
                f"{end:.3f}: use fewer steps there"
            )
        if timesteps.min() < 0 or timesteps.max() > total - 1:
            raise ValueError(_outside(total, spacing, self.steps_offset))
        return [self.level(int(t)).noise for t in timesteps]

    def _part_of_axis(
        self, steps: int, start: float, end: float, spacing: str, from_noise: bool, to_data: bool
    ) -> np.ndarray:
        top = self.num_train_timesteps - 1 if from_noise else self.nearest_timestep(start)
        if not from_noise and self.level(top).noise <= end:
            top += (
                1  # the nearest timestep lies beyond so short a span; the next noisier one is in front of it
            )
        # As timesteps of one more, so that the data lie at 0: the axis then has `total` equal strides.
        first, last = top + 1.0, 0.0 if to_data else self.timestep(self.at(end)) + 1.0
        if spacing == "leading" and from_noise:
            first -= (first - last) / (steps + 1)
        if spacing != "trailing" and to_data:
            bottom = 1.0 + (self.steps_offset if spacing == "leading" else 0)
            timesteps = np.round(np.linspace(first, bottom, steps)) - 1
        else:
            timesteps = np.round(first - (first - last) / steps * np.arange(steps)) - 1
        if not from_noise:
            timesteps[0] = top
        return timesteps


@dataclass(frozen=True)
class FlowPath:
    """Rectified-flow path in continuous time: alpha = 1 - s, sigma = s (Liu et al. 2022, arXiv:2209.03003).

    Args:
        timestep_scale: the model is told `timestep_scale * s` (1000 for Lune and diffusers' flow models).
        data_at_one: the model's clock runs from noise (0) to data (`timestep_scale`), as TinyFlux's does.
    """

    timestep_scale: float = 1000.0
    data_at_one: bool = False
    discrete = False

    def at(self, noise: float) -> Level:
        return Level(1.0 - noise, noise)

    def level(self, timestep: float) -> Level:
        s = timestep / self.timestep_scale
        if not 0 <= s <= 1:
            raise ValueError(f"timestep {timestep} is outside 0..{self.timestep_scale:g}")
        return self.at(1.0 - s if self.data_at_one else s)

    def timestep(self, level: Level) -> float:
        s = level.noise
        return self.timestep_scale * (1.0 - s if self.data_at_one else s)

    def initial_scale(self, level: Level) -> float:
        return level.sigma

    def grid(
        self, steps: int, start: float = 1.0, end: float = 0.0, shift: float = 1.0, spacing: str = "linspace"
    ) -> list[float]:
        """Shifted sigmas: uniform before the shift s' = k s / (1 + (k - 1) s), so that a span of a run has
        the nodes' density of the whole run (Esser et al. 2024, arXiv:2403.03206, eq. 23)."""
        first, last = shift_sigma(start, 1.0 / shift), shift_sigma(end, 1.0 / shift)
        nodes = [shift_sigma(first + (last - first) * i / steps, shift) for i in range(steps)]
        nodes[0] = start
        return nodes


def noise_of_sigma(path: Path, sigma: float) -> float:
    """The share of noise of what diffusers' schedulers and k-diffusion's functions call sigma: a flow's own,
    and sigma / alpha on other paths."""
    return sigma if isinstance(path, FlowPath) else sigma / (1.0 + sigma)


def sigma_of_noise(path: Path, noise: float) -> float:
    """The inverse of `noise_of_sigma`; noise below 1 on paths other than a flow's."""
    return noise if isinstance(path, FlowPath) else noise / (1.0 - noise)
