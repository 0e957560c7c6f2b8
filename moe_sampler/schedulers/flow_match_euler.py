"""`FusedFlowMatchEulerScheduler`: diffusers' `FlowMatchEulerDiscreteScheduler`, one kernel launch a step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from moe_sampler.kernels import shift_sigma

from .._config import register_to_config
from ..sampling.paths import FlowPath
from ..sampling.predictions import add_noise, x0_coefficients
from ..sampling.solvers import SolverRow
from ..sampling.spacings import BY_NAME
from .fused_step import FusedScheduler, make_table, solver_step, table_row, view_index

__all__ = ["FusedFlowMatchEulerScheduler"]

_RESPACINGS = {f"use_{name}_sigmas": name for name in ("karras", "exponential", "beta")}


class FusedFlowMatchEulerScheduler(FusedScheduler):
    """Euler on a rectified flow with `FlowMatchEulerDiscreteScheduler`'s config fields, defaults and numbers.

    Args:
        num_train_timesteps: the model is told num_train_timesteps * sigma.
        shift: k of sigma' = k sigma / (1 + (k - 1) sigma).
        use_dynamic_shifting, time_shift_type: shift by exp(mu) ("exponential") or mu ("linear") instead, with
            mu from `set_timesteps`.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: pipelines read them and make mu of them.
        invert_sigmas: sigmas count from 0 (noise) to 1 (data).
        shift_terminal: stretch the sigmas so that the last is this.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: another spacing between the first and the
            last sigma; at most one of them.
        stochastic_sampling: every step goes to the data and back with fresh noise.

    Raises:
        ValueError: values that aren't supported or contradict each other, by name.
    """

    _compatibles: ClassVar[list[str]] = []

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
    ) -> None:
        self._follow_config()
        self.num_inference_steps: int | None = None
        self._shift = shift
        sigmas = np.arange(num_train_timesteps, 0, -1) / num_train_timesteps
        if not use_dynamic_shifting:
            sigmas = shift_sigma(sigmas, shift)
        self.sigma_max, self.sigma_min = float(sigmas[0]), float(sigmas[-1])
        self.sigmas = torch.from_numpy(sigmas).float()
        self.timesteps = torch.from_numpy(sigmas * num_train_timesteps).float()
        self._forget_position()

    def _check_config(self) -> None:
        config = self.config
        self._check_choice("time_shift_type", ("exponential", "linear"))
        if not config["shift"] > 0:
            self._refuse("shift", "use a positive number")
        if config["shift_terminal"] is not None and not 0 <= config["shift_terminal"] < 1:
            self._refuse("shift_terminal", "use a noise level between 0 and 1, or None")
        chosen = [name for name in _RESPACINGS if config[name]]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other: use one of them")

    def _compile_config(self) -> None:
        self._path = FlowPath(timestep_scale=float(self.config["num_train_timesteps"]))
        self._tables: dict[torch.device, torch.Tensor] = {}

    def _forget_position(self) -> None:
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @property
    def shift(self) -> float:
        """k of the shifted sigmas."""
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Another k, from the next `set_timesteps` on."""
        if not shift > 0:
            raise ValueError(f"shift must be positive, got {shift}")
        self._shift = shift

    @property
    def step_index(self) -> int | None:
        """The step that comes next, None before the first; each step increases it."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The step a pipeline said it begins at."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say which step comes first, so that its timestep need not be looked up."""
        self._begin_index = begin_index

    def _shifted(self, sigmas: np.ndarray, mu: float | None) -> np.ndarray:
        if mu is None or not self.config["use_dynamic_shifting"]:
            return shift_sigma(sigmas, self.shift)
        k = math.exp(mu) if self.config["time_shift_type"] == "exponential" else mu
        return shift_sigma(sigmas, k)

    def _stretched(self, sigmas: np.ndarray) -> np.ndarray:
        """The last sigma moved to `shift_terminal`, the others in proportion to their distance from 1."""
        if sigmas[-1] == 1.0:
            raise ValueError("shift_terminal needs a last sigma below 1: use more steps")
        return 1.0 - (1.0 - sigmas) * (1.0 - self.config["shift_terminal"]) / (1.0 - sigmas[-1])

    def _respaced(self, sigmas: np.ndarray) -> np.ndarray:
        """Karras, exponential or beta spacing between the ends."""
        for option, name in _RESPACINGS.items():
            if self.config[option]:
                spacing, (first, last) = BY_NAME[name], (float(sigmas[0]), float(sigmas[-1]))
                places = np.linspace(0.0, 1.0, len(sigmas)).tolist()
                return np.array([spacing.sigma(place, first, last) for place in places])
        return sigmas

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Choose the nodes by a step count, by sigmas that are still to be shifted, or by timesteps.

        A step count alone is spread between the largest and the smallest *shifted* sigma of training and then
        shifted, that is twice, as the original does; pass `np.linspace(1, 1 / n, n)` as sigmas to shift once.
        Timesteps without sigmas are told to the model as they are, while their sigmas are shifted.

        Args:
            num_inference_steps: steps; if sigmas or timesteps are given, their number.
            device: of `timesteps` and `sigmas`.
            sigmas: noise levels, descending within 0..1, without the 0 at the end.
            mu: shift for `use_dynamic_shifting`.
            timesteps: what the model is told at each step.

        Raises:
            ValueError: nothing to go by, lengths that differ, no mu, or sigmas that don't descend.
        """
        self._follow_config()
        counts = {len(given) for given in (sigmas, timesteps) if given is not None}
        if num_inference_steps is not None:
            counts.add(num_inference_steps)
        if len(counts) != 1 or min(counts) < 1:
            raise ValueError(
                "give num_inference_steps, sigmas or timesteps, and as many of each as of the others; got "
                f"{num_inference_steps} steps, {None if sigmas is None else len(sigmas)} sigmas and "
                f"{None if timesteps is None else len(timesteps)} timesteps"
            )
        if self.config["use_dynamic_shifting"] and mu is None:
            raise ValueError("use_dynamic_shifting needs mu: pass it to set_timesteps")
        (count,) = counts
        total = self.config["num_train_timesteps"]
        told = None if timesteps is None else np.asarray(timesteps, dtype=np.float64)
        if sigmas is not None:
            nodes = np.asarray(sigmas, dtype=np.float64)
        elif told is not None:
            nodes = told / total
            if self.config["use_dynamic_shifting"] or self.shift != 1.0:
                logging.get_logger(__name__).warning(
                    "timesteps without sigmas: the model is told them as they are, but the steps' sigmas are "
                    "shifted"
                )
        else:
            nodes = np.linspace(self.sigma_max, self.sigma_min, count)
        if not ((nodes >= 0) & (nodes <= 1)).all():
            raise ValueError(f"sigmas must lie in 0..1, got {nodes.min():g}..{nodes.max():g}")
        nodes = self._shifted(nodes, mu)
        if self.config["shift_terminal"]:
            nodes = self._stretched(nodes)
        nodes = self._respaced(nodes)
        rows = self._compile([*nodes.tolist(), 0.0])
        if self.config["invert_sigmas"]:
            told, nodes, end = None, 1.0 - nodes, 1.0
        else:
            end = 0.0
        self._rows, self._tables = rows, {}
        self.num_inference_steps = count
        self.timesteps = torch.from_numpy(nodes * total if told is None else told).float().to(device)
        self.sigmas = torch.from_numpy(np.append(nodes, end)).float().to(device)
        self._forget_position()

    def _compile(self, noises: Sequence[float]) -> list[list[float]]:
        """A row from every noise level to the next. Inverted sigmas mean a model of data - noise."""
        prediction = "reversed_flow_prediction" if self.config["invert_sigmas"] else "flow_prediction"
        levels = [self._path.at(noise) for noise in noises]
        rows = []
        for level, target in itertools.pairwise(levels):
            row = solver_step("euler", level, target)
            if self.config["stochastic_sampling"]:
                row = SolverRow(a=0.0, b=target.alpha, n=target.sigma)
            rows.append(table_row(row, *x0_coefficients(prediction, level)))
        return rows

    def index_for_timestep(
        self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None
    ) -> int:
        """Where a timestep stands in the schedule; the second place, if it stands there twice, as diffusers.
        Reads device tensors, unless the timestep is one of `timesteps`."""
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        index = view_index(timestep, schedule)
        if index is not None:
            return index
        matches = (schedule.cpu() == torch.as_tensor(timestep).cpu()).nonzero().flatten().tolist()
        if not matches:
            raise ValueError(
                f"timestep {float(timestep):g} is not one of the schedule's: pass one of `timesteps`"
            )
        return matches[min(1, len(matches) - 1)]

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """(1 - sigma) * sample + sigma * noise at timesteps [B] of the schedule. sample, noise: [B, ...].

        After `set_begin_index` the sigma is that of the step which comes next, as in the original.
        """
        if self.config["invert_sigmas"]:
            raise ValueError("inverted sigmas are shares of data, so there is no noise to scale by them")
        if self.begin_index is None:
            indices = [self.index_for_timestep(each) for each in timestep.flatten()]
        else:
            here = self.begin_index if self.step_index is None else self.step_index
            indices = [here] * timestep.numel()
        sigma = self.sigmas.to(sample.device)[indices].to(sample.dtype)
        sigma = sigma.view(-1, *(1,) * (sample.ndim - 1))
        return add_noise(sample, noise, 1.0 - sigma, sigma)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[torch.Tensor]:
        """One step; the first is found by `begin_index` or by its timestep, the others follow it.

        Args:
            model_output, sample: [B, ...] float32, float16 or bfloat16; neither is modified.
            timestep: one of `timesteps`.
            s_churn, s_tmin, s_tmax, s_noise: only their defaults; the original doesn't use them either.
            generator: for `stochastic_sampling`; None is torch's global one.
            per_token_timesteps: only None.
            return_dict: an output with `prev_sample`, or a tuple of it.

        Returns:
            `prev_sample` in the model output's dtype.
        """
        if isinstance(timestep, int) or (
            isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()
        ):
            raise ValueError(f"pass one of `timesteps`, not the index of a step: got {timestep}")
        if per_token_timesteps is not None:
            raise ValueError("per_token_timesteps are not supported: use diffusers' scheduler")
        if (s_churn, s_tmin, s_tmax, s_noise) != (0.0, 0.0, math.inf, 1.0):
            raise ValueError("s_churn, s_tmin, s_tmax and s_noise do nothing on a flow: leave them out")
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps first")
        if self._compiled_config is not self._internal_dict:
            raise ValueError("the config has changed since set_timesteps: call it again")
        self._check_tensors(model_output, sample)
        index = self._begin_index if self._step_index is None else self._step_index
        if index is None:
            index = self.index_for_timestep(timestep)
        if index >= self.num_inference_steps:
            raise ValueError(
                f"all {self.num_inference_steps} steps are done: call set_timesteps for another run"
            )
        if sample.device not in self._tables:
            self._tables[sample.device] = make_table(self._rows, sample.device)
        noise = None
        if self.config["stochastic_sampling"]:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
        x = self._launch(model_output, sample, self._tables[sample.device], index, noise)
        self._step_index = index + 1
        previous = x.to(model_output.dtype)
        if not return_dict:
            return (previous,)
        # diffusers' output says FloatTensor, the legacy class that no tensor of float16 is an instance of.
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=previous)  # pyright: ignore[reportArgumentType]
