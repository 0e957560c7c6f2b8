"""An expert: a model and everything the planner must know to use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .paths import FlowPath, Path, VPPath, path_from_scheduler_config
from .predictions import Prediction, check_prediction
from .solvers import Solver, check_solver

__all__ = ["Expert"]

_SOLVER_OF_SCHEDULER = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}


@dataclass(frozen=True)
class Expert:
    """A diffusion expert. Settings are this expert's own; change one with `dataclasses.replace`.

    Args:
        name: how routers, step counts and plans call it.
        path: the noise path it was trained on, which also says what timestep it is told.
        prediction: what it predicts (see `predictions.Prediction`).
        model: `model(sample, timestep, **conditioning)` with sample [B or 2B, ...] of `dtype` and timestep a
            0-d tensor (int64 on a discrete path, float32 else); returns the prediction, or a tuple that
            starts with it, or a diffusers output. Only sampling needs it, planning doesn't.
        dtype: what the model eats.
        solver: "ddpm", "ddim", "euler" or "dpmpp_2m".
        eta: DDIM's share of noise, 0 to 1.
        shift: k of the shifted sigmas, on flow paths.
        spacing: timestep spacing on discrete paths, "trailing", "leading" or "linspace".
        guidance_scale: classifier-free guidance; 1 means one model pass without guidance, whatever the
            other experts do.
        clip_sample_range: clip x0 to plus-minus this before the solver; None leaves it alone. Clipping harms
            latents and is meant for pixel-space models.
    """

    name: str
    path: Path
    prediction: Prediction
    model: Callable[..., Any] | None = None
    dtype: torch.dtype = torch.float32
    solver: Solver = "dpmpp_2m"
    eta: float = 0.0
    shift: float = 3.0
    spacing: str = "trailing"
    guidance_scale: float = 1.0
    clip_sample_range: float | None = None

    def __post_init__(self) -> None:
        check_prediction(self.prediction)
        check_solver(self.solver)
        if not isinstance(self.path, Path):
            raise TypeError(
                f"{self.name}: path must be a VPPath, a FlowPath or implement moe_sampler.paths.Path"
            )
        if not self.shift > 0:
            raise ValueError(f"{self.name}: shift must be positive, got {self.shift}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"{self.name}: eta must lie between 0 and 1, got {self.eta}")
        if self.clip_sample_range is not None and not self.clip_sample_range > 0:
            raise ValueError(f"{self.name}: clip_sample_range must be positive, got {self.clip_sample_range}")

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1.0

    @classmethod
    def sol(cls, model: Callable[..., Any] | None = None, name: str = "sol", **settings) -> Expert:
        """Sol: v-prediction on DDPM's linear betas, sampled ancestrally as published."""
        return cls(name, VPPath.linear(), "v_prediction", model, **{"solver": "ddpm", **settings})

    @classmethod
    def lune(cls, model: Callable[..., Any] | None = None, name: str = "lune", **settings) -> Expert:
        """Lune: rectified flow, told 1000 * s, Euler on sigmas shifted by 2 as published."""
        return cls(
            name, FlowPath(), "flow_prediction", model, **{"solver": "euler", "shift": 2.0, **settings}
        )

    @classmethod
    def sd15(cls, model: Callable[..., Any] | None = None, name: str = "sd15", **settings) -> Expert:
        """Stable Diffusion 1.5: epsilon-prediction on scaled-linear betas."""
        return cls(name, VPPath.scaled_linear(), "epsilon", model, **settings)

    @classmethod
    def from_scheduler_config(
        cls, name: str, config: Mapping[str, Any], model: Callable[..., Any] | None = None, **settings
    ) -> Expert:
        """What a diffusers scheduler config says of an expert; `settings` that aren't None take precedence.

        The config's class is the default solver, its betas the path; shift, prediction type, spacing and
        clipping are the expert's own.

        Raises:
            ValueError: a scheduler class, beta schedule or prediction type this package doesn't know.
        """
        scheduler = config.get("_class_name", "")
        if scheduler not in _SOLVER_OF_SCHEDULER:
            known = ", ".join(_SOLVER_OF_SCHEDULER)
            raise ValueError(f'{name}: scheduler "{scheduler}" is not supported: use one of {known}')
        path = path_from_scheduler_config(config)
        read = {
            "solver": _SOLVER_OF_SCHEDULER[scheduler],
            "shift": config.get("shift", 1.0),
            "spacing": config.get("timestep_spacing", "trailing"),
            "clip_sample_range": config.get("clip_sample_range", 1.0) if config.get("clip_sample") else None,
        }
        prediction = config.get("prediction_type", "epsilon") if path.discrete else "flow_prediction"
        given = {key: value for key, value in settings.items() if value is not None}
        return cls(name, path, prediction, model, **{**read, **given})
