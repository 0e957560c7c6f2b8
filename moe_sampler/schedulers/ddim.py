"""`FusedDDIMScheduler`: diffusers' `DDIMScheduler`, one kernel launch a step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

from .._config import register_to_config
from ..sampling.paths import Level
from ..sampling.solvers import SolverRow
from .fused_step import solver_step, table_row
from .vp import VPScheduler

__all__ = ["FusedDDIMScheduler"]


class FusedDDIMScheduler(VPScheduler):
    """DDIM sampling with `DDIMScheduler`'s config fields, defaults and numbers.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: the noise path; schedules
            "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid".
        clip_sample, clip_sample_range: clip x0 to plus-minus the range; on by default, as in the original,
            and harmful to latents.
        set_alpha_to_one: whether the last step goes to the data or to the level of timestep 0.
        steps_offset, timestep_spacing: as `set_timesteps` spaces a step count.
        prediction_type: "epsilon", "v_prediction" or "sample".
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
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._start()

    @property
    def final_alpha_cumprod(self) -> torch.Tensor:
        """Squared alpha of where the last step goes."""
        return torch.tensor(self._target(-1).alpha ** 2, dtype=torch.float32)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the nodes by a step count, spaced as the config says."""
        self._follow_config()
        self._set(self._spaced(num_inference_steps), device)

    def _target(self, timestep: int) -> Level:
        if timestep >= 0:
            return self._level(timestep)
        return Level(1.0, 0.0) if self.config["set_alpha_to_one"] else self._level(0)

    def _get_variance(self, timestep: int, prev_timestep: int) -> torch.Tensor:
        """Squared deviation of a step's fresh noise at eta = 1: diffusers' name, which pipelines use."""
        row = solver_step("ddim", self._level(timestep), self._target(prev_timestep), 1.0)
        return torch.tensor(row.n**2, dtype=torch.float32)

    def _row(self, t: int, *options: Any) -> list[float]:
        eta, use_clipped_model_output = options
        # As the original: down by the stride of the step count, whatever the next node is.
        target = self._target(t - self.config["num_train_timesteps"] // self.num_inference_steps)
        level = self._level(t)
        row = solver_step("ddim", level, target, eta)
        p, q = self._x0(level)
        if self.config["clip_sample"] and not use_clipped_model_output:
            # The direction comes from the model's own x0 = p x + q o, only the data's part from the clipped
            # one: a x + b x0 is a (x - alpha x0) + (b + a alpha) x0. What the output adds to the direction
            # goes through a memory.
            row = SolverRow(
                a=row.a * (1.0 - level.alpha * p),
                b=row.b + row.a * level.alpha,
                d_0=-row.a * level.alpha * q,
                n=row.n,
            )
        return table_row(row, p, q, clip=self._clip)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step from `timestep` down by num_train_timesteps // num_inference_steps.

        Args:
            model_output, sample: [B, ...] float32, float16 or bfloat16; neither is modified.
            timestep: one of `timesteps`, or any integer of the training range.
            eta: share of the posterior's noise, 0 to 1.
            use_clipped_model_output: take the direction from the clipped x0, too.
            generator: for the fresh noise, drawn as the original draws it, where eta > 0; None is torch's
                global one.
            variance_noise: [B, ...], the noise itself instead.
            return_dict: an output with `prev_sample` and `pred_original_sample`, or the two as a tuple.

        Returns:
            Tensors in the dtype that sample and model output promote to.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps first: a step's length depends on the number of steps")
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta must lie between 0 and 1, got {eta}")
        if variance_noise is not None and generator is not None:
            raise ValueError("give either generator or variance_noise, not both")
        self._follow_config()
        self._check_tensors(model_output, sample)
        t = self._timestep(timestep)
        table, index = self._table(t, sample.device, float(eta), bool(use_clipped_model_output))
        noise = variance_noise if eta > 0 else None
        if eta > 0 and noise is None:
            noise = self._noise(model_output, generator)
        direct = not math.isinf(self._clip) and not use_clipped_model_output
        memories = [model_output.to(torch.float32, copy=True).contiguous()] if direct else []
        previous, x0 = self._stepped(model_output, sample, table, index, noise, memories)
        if not return_dict:
            return previous, x0
        return DDIMSchedulerOutput(prev_sample=previous, pred_original_sample=x0)
