"""What the schedulers on DDPM's integer timesteps share: betas, levels, timesteps, forward noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor

from moe_sampler.kernels import ROW_WIDTH

from ..sampling.betas import BETA_SCHEDULES, betas_from_config
from ..sampling.paths import SPACINGS, Level, spaced_timesteps
from ..sampling.predictions import add_noise, x0_coefficients
from .fused_step import FusedScheduler, make_table, view_index

__all__ = ["VPScheduler"]

_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_NO_ROW = [math.nan] * ROW_WIDTH
"""Of the one training timestep that says nothing of x0: it is refused before it is used."""


class VPScheduler(FusedScheduler):
    """Base of the schedulers on a `VPPath`. Subclasses say where a step goes and with which row."""

    _compatibles: ClassVar[list[str]] = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    _other_solvers_fields = frozenset(
        {
            *("variance_type", "set_alpha_to_one", "skip_prk_steps", "solver_order", "solver_type"),
            *("algorithm_type", "lower_order_final", "euler_at_final", "final_sigmas_type", "predict_x0"),
            *("solver_p", "disable_corrector", "lambda_min_clipped", "interpolation_type"),
            *("noise_sampler_seed", "flow_shift", "time_shift_type"),
        }
    )

    def _check_config(self) -> None:
        config = self.config
        self._check_choice("prediction_type", _PREDICTIONS)
        self._check_choice("timestep_spacing", SPACINGS)
        if config["trained_betas"] is None:
            self._check_choice("beta_schedule", BETA_SCHEDULES)
        if config["thresholding"]:
            self._refuse("thresholding", "use clip_sample with a clip_sample_range, or diffusers' scheduler")
        if config["clip_sample"] and not config["clip_sample_range"] > 0:
            self._refuse("clip_sample_range", "use a positive range, or clip_sample=False")

    def _compile_config(self) -> None:
        # In float32, as the originals: near the data 1 - abar has few digits, and a model that was trained
        # with those of diffusers is to be sampled with them. From alphas_cumprod on everything is float64.
        self.betas = torch.from_numpy(betas_from_config(self.config, np.float32))
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        abar = self.alphas_cumprod.double().numpy()
        if not abar.size or not (self.betas > 0).all() or not (abar >= 0).all():
            raise ValueError(
                f"{type(self).__name__} does not support {self._said_of_betas()}: betas must be positive, "
                "and below 1 while any signal is left"
            )
        # Betas far larger than usual leave float32's range before the last timestep. What is below it is a
        # signal all the same, which clipping x0 makes use of; only a beta of 1 leaves none.
        signal = np.cumprod(self.betas.numpy() != 1.0)
        abar = np.maximum(abar, signal * float(np.finfo(np.float32).smallest_subnormal))
        self._alphas, self._sigmas = np.sqrt(abar), np.sqrt(1.0 - abar)
        self._forward_levels = torch.from_numpy(np.stack([self._alphas, self._sigmas])).float()
        self._tables: dict[tuple, torch.Tensor] = {}

    def _said_of_betas(self) -> str:
        """What the config says of them, for messages."""
        if self.config["trained_betas"] is not None:
            return "these trained_betas"
        names = ("beta_schedule", "beta_start", "beta_end")
        return ", ".join(f"{name}={self.config[name]!r}" for name in names)

    def _level(self, t: int) -> Level:
        return Level(float(self._alphas[t]), float(self._sigmas[t]))

    def _start(self) -> None:
        """The state of a scheduler that was just made: every training timestep, no step count."""
        self._follow_config()
        self.num_inference_steps: int | None = None
        self._schedule(range(self.config["num_train_timesteps"] - 1, -1, -1), None)

    def _set(self, timesteps: Sequence[int], device: torch.device | str | None) -> None:
        """The state after `set_timesteps`."""
        self._check_timestep(max(timesteps))
        self.num_inference_steps = len(timesteps)
        self._schedule(timesteps, device)

    def _schedule(self, timesteps: Sequence[int], device: torch.device | str | None) -> None:
        self._steps = list(timesteps)
        self._indices = {t: index for index, t in enumerate(self._steps)}
        self.timesteps = torch.tensor(self._steps, dtype=torch.int64).to(device)
        # A pipeline may put something else into `timesteps`; views are looked up in what was made here.
        self._scheduled = self.timesteps
        self._tables.clear()

    def _spaced(self, num_inference_steps: int) -> list[int]:
        """diffusers' timesteps for the config's spacing."""
        self._check_count()
        total = self.config["num_train_timesteps"]
        if not 1 <= num_inference_steps <= total:
            raise ValueError(
                f"num_inference_steps must lie between 1 and num_train_timesteps = {total}, got "
                f"{num_inference_steps}"
            )
        if self.config["timestep_spacing"] == "trailing":
            # NumPy's arange decides which way the original's halves round; its float error may add a node -1.
            nodes = np.arange(total, 0, -total / num_inference_steps)[:num_inference_steps]
            return [round(node) - 1 for node in nodes]
        spacing, offset = self.config["timestep_spacing"], self.config["steps_offset"]
        return spaced_timesteps(total, num_inference_steps, spacing, offset).tolist()

    def _timestep(self, timestep: int | torch.Tensor) -> int:
        """The timestep as an integer; waits for the device only where a device tensor isn't one of ours."""
        index = view_index(timestep, self._scheduled)
        if index is not None:
            return self._steps[index]
        floating = timestep.is_floating_point() if isinstance(timestep, torch.Tensor) else timestep % 1 != 0
        if floating:
            raise ValueError(f"timesteps of {type(self).__name__} are integers, got {timestep}")
        t = int(timestep)
        if not 0 <= t < len(self):
            raise ValueError(f"timestep {t} is outside 0..{len(self) - 1}")
        return t

    def _defined(self, t: int) -> bool:
        """Whether the model's output at a timestep says anything about x0."""
        return self.config["prediction_type"] != "epsilon" or bool(self._alphas[t] > 0)

    def _check_count(self) -> None:
        if len(self.betas) != len(self):
            self._refuse("num_train_timesteps", f"trained_betas has {len(self.betas)} values")

    def _check_timestep(self, t: int) -> None:
        """Raise a ValueError if nothing can be known of the step from `t`."""
        self._check_count()
        if not self._defined(t):
            rescaled = self.config["rescale_betas_zero_snr"]
            given = "rescale_betas_zero_snr=True" if rescaled else self._said_of_betas()
            raise ValueError(
                f"{type(self).__name__} does not support {given} with prediction_type='epsilon' at timestep "
                f"{t}: no signal is left there, and an epsilon model says nothing about the sample; begin at "
                "a lower timestep, or name the prediction_type the model was trained on"
            )

    @property
    def _clip(self) -> float:
        return self.config["clip_sample_range"] if self.config["clip_sample"] else math.inf

    def _x0(self, level: Level) -> tuple[float, float]:
        return x0_coefficients(self.config["prediction_type"], level)

    def _row(self, t: int, *options: Any) -> list[float]:
        """The row of the step from timestep `t`."""
        raise NotImplementedError

    def _table(self, t: int, device: torch.device, *options: Any) -> tuple[torch.Tensor, int]:
        """A table on the device with the row of `t`, and where in it: the schedule's, or one of its own."""
        self._check_timestep(t)
        index = self._indices.get(t)
        key = (None if index is not None else t, device, *options)
        if key not in self._tables:
            timesteps = self._steps if index is not None else [t]
            rows = (self._row(each, *options) if self._defined(each) else _NO_ROW for each in timesteps)
            self._tables[key] = make_table(rows, device)
        return self._tables[key], index or 0

    def _levels(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha, sigma) at timesteps [B] or 0-d, broadcast against `like`, in its dtype."""
        self._follow_config()
        self._forward_levels = self._forward_levels.to(like.device)
        alpha, sigma = self._forward_levels[:, timesteps.to(like.device).flatten()].to(like.dtype)
        shape = (-1, *(1,) * (like.ndim - 1))
        return alpha.view(shape), sigma.view(shape)

    def _noise(self, model_output: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Fresh noise for a step, drawn as the originals draw it."""
        return randn_tensor(
            model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
        )

    def _stepped(
        self,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        table: torch.Tensor,
        index: int,
        noise: torch.Tensor | None,
        memories: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(next sample, x0), both in the dtype that sample and model output promote to."""
        x0 = torch.empty(sample.shape, dtype=torch.float32, device=sample.device)
        x = self._launch(model_output, sample, table, index, noise, x0, memories)
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        return x.to(dtype), x0.to(dtype)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.IntTensor
    ) -> torch.Tensor:
        """alpha * x0 + sigma * noise at integer timesteps [B]. original_samples, noise: [B, ...]."""
        return add_noise(original_samples, noise, *self._levels(timesteps, original_samples))

    def get_velocity(
        self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.IntTensor
    ) -> torch.Tensor:
        """v = alpha * noise - sigma * x0 at integer timesteps [B]. sample (x0), noise: [B, ...]."""
        alpha, sigma = self._levels(timesteps, sample)
        # x0 and noise in each other's places: the velocity is the state a quarter turn further on.
        return add_noise(noise, sample, alpha, -sigma)
