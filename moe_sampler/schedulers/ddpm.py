"""`FusedDDPMScheduler`: diffusers' `DDPMScheduler`, one kernel launch a step."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

from .._config import register_to_config
from ..sampling.paths import Level
from ..sampling.solvers import SolverRow
from .fused_step import table_row
from .vp import VPScheduler

__all__ = ["FusedDDPMScheduler"]

_VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large")


class FusedDDPMScheduler(VPScheduler):
    """Ancestral DDPM sampling with `DDPMScheduler`'s config fields, defaults and numbers.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: the noise path; schedules
            "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid".
        variance_type: "fixed_small", "fixed_small_log" (the same) or "fixed_large".
        clip_sample, clip_sample_range: clip x0 to plus-minus the range; on by default, as in the original,
            and harmful to latents.
        prediction_type: "epsilon", "v_prediction" or "sample".
        timestep_spacing, steps_offset: as `set_timesteps` spaces a step count.
        rescale_betas_zero_snr: betas whose last level has no signal left (arXiv:2305.08891); an epsilon model
            can't begin there.
        thresholding, dynamic_thresholding_ratio, sample_max_value: only at values that switch them off.

    Raises:
        ValueError: a value that isn't supported, by name.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._start()
        self.custom_timesteps = False

    def _check_config(self) -> None:
        super()._check_config()
        self._check_choice("variance_type", _VARIANCE_TYPES)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Choose the nodes by a step count, or as descending integer timesteps.

        Raises:
            ValueError: both or neither given, or timesteps that don't descend within the training range.
        """
        self._follow_config()
        if num_inference_steps is not None and timesteps is None:
            chosen = self._spaced(num_inference_steps)
        elif timesteps is not None and num_inference_steps is None:
            chosen = [int(t) for t in timesteps]
            total = self.config["num_train_timesteps"]
            if not chosen or any(after >= before for before, after in itertools.pairwise(chosen)):
                raise ValueError("timesteps must be given in descending order")
            if chosen[0] >= total or chosen[-1] < 0:
                raise ValueError(f"timesteps must lie in 0..{total - 1}, got {chosen[0]}..{chosen[-1]}")
        else:
            raise ValueError("give either num_inference_steps or timesteps")
        self.custom_timesteps = timesteps is not None
        self._set(chosen, device)

    def _previous(self, t: int) -> int:
        """The next timestep of the schedule below this one; -1, the data, below the last."""
        index = self._indices.get(t)
        if index is not None:
            return self._steps[index + 1] if index + 1 < len(self._steps) else -1
        return max((each for each in self._steps if each < t), default=-1)

    def previous_timestep(self, timestep: int | torch.Tensor) -> torch.Tensor:
        """The next timestep of the schedule below this one, 0-d int64; -1, the data, below the last."""
        return torch.tensor(self._previous(self._timestep(timestep)))

    def _get_variance(self, t: int | torch.Tensor) -> torch.Tensor:
        """Squared deviation of the step's fresh noise: diffusers' name, which pipelines use."""
        return torch.tensor(self._update(self._timestep(t)).n ** 2, dtype=torch.float32)

    def _update(self, t: int) -> SolverRow:
        """The posterior's mean and the fresh noise's deviation (arXiv:2006.11239, eq. 7)."""
        previous = self._previous(t)
        level = self._level(t)
        target = self._level(previous) if previous >= 0 else Level(1.0, 0.0)
        # The original's ratio of float32 numbers: near the data 1 minus it has four digits, and these are
        # the ones its users' images were made with.
        # Where no signal is left to keep on either side, a fresh draw has the right distribution.
        kept = float(np.float32(level.alpha**2) / np.float32(target.alpha**2)) if target.alpha > 0 else 0.0
        share = target.sigma**2 / level.sigma**2
        variance = (1.0 - kept) * (1.0 if self.config["variance_type"] == "fixed_large" else share)
        return SolverRow(
            a=math.sqrt(kept) * share,
            b=target.alpha * (1.0 - kept) / level.sigma**2,
            n=math.sqrt(variance) if t > 0 else 0.0,
        )

    def _row(self, t: int, *options: Any) -> list[float]:
        return table_row(self._update(t), *self._x0(self._level(t)), clip=self._clip)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step from `timestep` to the next of the schedule.

        Args:
            model_output, sample: [B, ...] float32, float16 or bfloat16; neither is modified.
            timestep: one of `timesteps`, or any integer of the training range, which steps to the schedule's
                next node below it.
            generator: for the fresh noise, drawn as the original draws it, at every timestep above 0; None is
                torch's global one.
            return_dict: an output with `prev_sample` and `pred_original_sample`, or the two as a tuple.

        Returns:
            Tensors in the dtype that sample and model output promote to.
        """
        self._follow_config()
        self._check_tensors(model_output, sample)
        t = self._timestep(timestep)
        table, index = self._table(t, sample.device)
        noise = self._noise(model_output, generator) if t > 0 else None
        previous, x0 = self._stepped(model_output, sample, table, index, noise)
        if not return_dict:
            return previous, x0
        return DDPMSchedulerOutput(prev_sample=previous, pred_original_sample=x0)
