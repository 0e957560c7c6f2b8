"""What every fused scheduler shares: strict configs, finding a timestep without waiting, launching a row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import FrozenDict

from moe_sampler.kernels import make_row, sampler_step_
from moe_sampler.kernels._dispatch import FLOATS

from ..sampling.paths import Level
from ..sampling.scheduler_configs import FINE
from ..sampling.solvers import Solver, SolverRow, solver_row

__all__ = ["FusedScheduler", "make_table", "solver_step", "view_index"]


def solver_step(solver: Solver, level: Level, target: Level, eta: float = 0.0) -> SolverRow:
    """`solver_row` without history, and a row that stands still where a schedule repeats a level."""
    return SolverRow(1.0, 0.0) if target == level else solver_row(solver, level, target, eta=eta)


def table_row(row: SolverRow, p: float, q: float, clip: float = math.inf) -> list[float]:
    """One row of one unguided model output, with x0 = p * x + q * output."""
    return make_row(p=p, q_cond_0=q, clip=clip, **row._asdict())


def make_table(rows: Iterable[list[float]], device: torch.device) -> torch.Tensor:
    """[steps, ROW_WIDTH] float32 from float64 rows."""
    return torch.tensor(list(rows), dtype=torch.float64).float().to(device)


def view_index(timestep: Any, schedule: torch.Tensor) -> int | None:
    """Which element of `schedule` (contiguous) this tensor *is*, seen from its place in memory alone.

    Iterating over a scheduler's timesteps, or over a slice of them, gives views: so the step is known on the
    host without reading a device tensor, and without counting calls.
    """
    if not isinstance(timestep, torch.Tensor) or timestep.numel() != 1 or timestep.dtype != schedule.dtype:
        return None
    if timestep.device != schedule.device:
        return None
    if timestep.untyped_storage().data_ptr() != schedule.untyped_storage().data_ptr():
        return None
    index = timestep.storage_offset() - schedule.storage_offset()
    return int(index) if 0 <= index < len(schedule) else None


class FusedScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler whose config is checked instead of partly ignored and whose step is one kernel launch."""

    order = 1
    init_noise_sigma = 1.0
    _other_solvers_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields of other schedulers' configs that say how *they* step, so that they mean nothing here."""

    @classmethod
    def from_config(
        cls,
        config: FrozenDict | dict[str, Any] | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """From the config of this scheduler, the original, or another one with the same noise levels.

        Raises:
            ValueError: the config has a setting that changes the noise levels, which this scheduler lacks.
        """
        if config is None:
            raise ValueError("give the config to make the scheduler from, like from_config(other.config)")
        own = cls._get_init_keys(cls)
        for name, value in {**config, **kwargs}.items():
            harmless = name in own or name.startswith("_") or name in cls._other_solvers_fields
            harmless = harmless or value in FINE.get(name, ())
            if not harmless and value is not None and value is not False:
                raise ValueError(
                    f"{cls.__name__} has no {name} (the config says {value!r}): leave it out of the config "
                    "or use the scheduler it is meant for"
                )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def _check_config(self) -> None:
        """Raise a ValueError for a value this scheduler doesn't implement."""
        raise NotImplementedError

    def _compile_config(self) -> None:
        """Everything that depends on the config alone."""
        raise NotImplementedError

    def _follow_config(self) -> None:
        """Pipelines correct a scheduler's config after it was made, and `register_to_config` exchanges it."""
        if getattr(self, "_compiled_config", None) is not self._internal_dict:
            self._check_config()
            self._compile_config()
            self._compiled_config = self._internal_dict

    def _refuse(self, name: str, instead: str) -> None:
        raise ValueError(f"{type(self).__name__} does not support {name}={self.config[name]!r}: {instead}")

    def _check_choice(self, name: str, choices: Iterable[str]) -> None:
        if self.config[name] not in choices:
            self._refuse(name, f"use one of {', '.join(choices)}")

    def scale_model_input(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The sample itself: these schedulers' models see the state unscaled."""
        return sample

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    @staticmethod
    def _check_tensors(model_output: torch.Tensor, sample: torch.Tensor) -> None:
        if model_output.shape != sample.shape:
            raise ValueError(
                f"the model output must have the sample's shape {list(sample.shape)}, got "
                f"{list(model_output.shape)}; learned variances are not supported"
            )
        for name, tensor in (("model output", model_output), ("sample", sample)):
            if tensor.dtype not in FLOATS:
                raise TypeError(f"the {name} must be float32, float16 or bfloat16, got {tensor.dtype}")
        if torch.is_grad_enabled() and (model_output.requires_grad or sample.requires_grad):
            raise RuntimeError(
                "a fused step has no derivative: sample under torch.no_grad(), or use diffusers' scheduler"
            )

    @staticmethod
    def _launch(
        model_output: torch.Tensor,
        sample: torch.Tensor,
        table: torch.Tensor,
        index: int,
        noise: torch.Tensor | None = None,
        x0: torch.Tensor | None = None,
        memories: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """The float32 state after row `index`; `sample` is left alone.

        model_output, sample, noise: [B, ...] of any float dtype. x0: float32 [B, ...], contiguous, written.
        memories: float32 [B, ...], contiguous, read where the row says so.
        """
        x = torch.empty(sample.shape, dtype=torch.float32, device=sample.device).copy_(sample)
        noise = None if noise is None else noise.float().contiguous()
        return sampler_step_(
            x, [model_output.contiguous()], table, index, memories=memories, x0=x0, noise=noise
        )
