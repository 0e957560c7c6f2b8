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
from .fused_step import solver_step, table_row
from .vp import VPScheduler

__all__ = ["FusedDDPMScheduler"]

_VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large")


class FusedDDPMScheduler(VPScheduler):
    """Ancestral DDPM sampling with `DDPMScheduler`'s config fields, defaults and numbers.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: the noise path; schedules
            "linear", "scaled_linear", "squaredcos_cap_v2".
        variance_type: "fixed_small", "fixed_small_log" (the same) or "fixed_large".
        clip_sample, clip_sample_range: clip x0 to plus-minus the range; on by default, as in the original,
            and harmful to latents.
        prediction_type: "epsilon", "v_prediction" or "sample".
        timestep_spacing, steps_offset: as `set_timesteps` spaces a step count.
        thresholding, dynamic_thresholding_ratio, sample_max_value, rescale_betas_zero_snr: only at values
            that switch them off.

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
        self.num_inference_steps = len(chosen)
        self._schedule(chosen, device)

    def previous_timestep(self, timestep: int | torch.Tensor) -> int:
        """The next timestep of the schedule below this one; -1, the data, below the last."""
        t = self._timestep(timestep)
        index = self._indices.get(t)
        if index is not None:
            return self._steps[index + 1] if index + 1 < len(self._steps) else -1
        return max((each for each in self._steps if each < t), default=-1)

    def _row(self, t: int, *options: Any) -> list[float]:
        previous = self.previous_timestep(t)
        level = self._path.level(t)
        target = self._path.level(previous) if previous >= 0 else Level(1.0, 0.0)
        row = solver_step("ddpm", level, target)
        if t == 0:
            row = row._replace(n=0.0)
        elif self.config["variance_type"] == "fixed_large":
            # The posterior's mean with the forward step's deviation, sqrt(1 - abar / abar').
            row = row._replace(n=math.sqrt(1.0 - (level.alpha / target.alpha) ** 2))
        return table_row(row, *self._x0(level), clip=self._clip)

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
        x0 = torch.empty(sample.shape, dtype=torch.float32, device=sample.device)
        previous, x0 = self._stepped(model_output, sample, table, index, noise, x0)
        if not return_dict:
            return previous, x0
        return DDPMSchedulerOutput(prev_sample=previous, pred_original_sample=x0)
