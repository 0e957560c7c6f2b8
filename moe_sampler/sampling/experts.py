"""An expert: a model and everything the planner must know to use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._numbers import number
from .._protocols import missing_names
from .guiders import Guider, read_guider
from .paths import FlowPath, Level, Path, VPPath
from .predictions import Prediction, check_prediction
from .reuse import Reuse, read_reuse
from .scheduler_configs import SOLVER_OF_SCHEDULER, check_scheduler_config, path_from_scheduler_config
from .scheduler_names import check_scheduler, check_solver_name
from .solvers import Solver
from .spacing_names import read_levels
from .spacings import nodes

if TYPE_CHECKING:
    import torch

__all__ = ["SHIFTS", "Expert"]

SHIFTS = (0.001, 1000.0)
"""The smallest and the largest k of shifted sigmas: beyond them nearly all steps are at one end of a run."""
MOST_GUIDANCE = 1000.0
"""Beyond it a guided prediction is the difference of two, enlarged until nothing is left of either."""

_SOLVER_OF_ALGORITHM: dict[str, Solver] = {"dpmsolver++": "dpmpp_2m", "sde-dpmsolver++": "dpmpp_2m_sde"}


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
        dtype: what the model eats; None is float32.
        solver: "ddpm", "ddim", "euler", "heun" (two model evaluations a step), "dpmpp_2m", "dpmpp_2m_sde",
            "dpmpp_3m" or "unip_3", which are built in; or whatever diffusers brings: one of its schedulers, a
            scheduler's class name, or a name people know (`scheduler_names.KNOWN_NAMES`), like "unipc",
            "euler_a", "dpmpp_3m_sde" or "dpmpp_2m_karras". A scheduler's levels come with it.
        eta: DDIM's share of noise, 0 to 1.
        shift: k of the shifted sigmas, on flow paths, in `SHIFTS`.
        spacing: timestep spacing on discrete paths, "trailing", "leading" or "linspace".
        guidance_scale: classifier-free guidance; 1 or less means one model pass without guidance, as
            everywhere in diffusers, whatever the other experts do.
        guidance_window: (high, low), the noise levels between which guidance is on, both included; outside
            the scale is 1 and the model is called once (arXiv:2404.07724). None is everywhere.
        guidance_rescale: phi in [0, 1] of arXiv:2305.08891, section 3.4: the share of the guided prediction
            that is scaled back to the conditional one's standard deviation, sample by sample.
        guider: how the guidance is made of the two predictions: "cfg", plain; "cfg_zero_star", or "apg" with
            its settings in words, "apg eta 0.5 momentum -0.5", or a `guiders.Guider`, which says what they
            mean. None is plain.
        clip_sample_range: clip x0 to plus-minus this before the solver; None leaves it alone. Clipping harms
            latents and is meant for pixel-space models.
        set_alpha_to_one: whether a run's last step goes to the data or, on a discrete path, to the level of
            timestep 0, which keeps a little noise: diffusers' name, of its DDIM.
        reuse: which calls of the model are full; the others compute its outermost layers alone and reuse the
            deep features of the last full one (arXiv:2312.00858). A number k: every k-th. A list of numbers
            from 0: those of the expert's calls. Pairs ((noise, k), ...): every k-th down to that noise level,
            the last one 0. "auto": every third in plans of ten steps or more. None: all. The first call of a
            stretch is always full, and so is a guided one after unguided ones. The model must be a
            `reuse.ReusableModel`, as `architectures.expert_model.ExpertModel` makes one of a UNet.
        reuse_share: what a call that reuses costs of a full one, for `SamplingPlan.cost`.
        levels: where the steps lie of a built-in solver, or on flows of any name: the name of a spacing,
            "timestep", "uniform", "karras", "exponential", "beta", "cosine" or "align_your_steps" (see
            `spacings`), or the noise levels
            themselves, descending, of which those where the expert leads are its steps. None is "timestep"
            on discrete paths and "uniform" on flows.
    """

    name: str
    path: Path
    prediction: Prediction
    model: Callable[..., Any] | None = None
    dtype: torch.dtype | None = None
    solver: Any = "dpmpp_2m"
    eta: float = 0.0
    shift: float = 3.0
    spacing: str = "trailing"
    guidance_scale: float = 1.0
    clip_sample_range: float | None = None
    guidance_window: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    set_alpha_to_one: bool = True
    reuse: Reuse | None = None
    reuse_share: float = 0.1
    levels: Any = None
    guider: Guider | str | None = None

    def __post_init__(self) -> None:
        check_prediction(self.prediction)
        if isinstance(self.solver, str):
            check_solver_name(self.solver)
        else:
            check_scheduler(self.solver)
        missing = missing_names(self.path, Path)
        if missing:
            raise TypeError(
                f"{self.name}: path must be a VPPath, a FlowPath or implement "
                f"moe_sampler.sampling.paths.Path; {type(self.path).__name__} has no {', '.join(missing)}"
            )
        for setting in ("shift", "eta", "guidance_scale", "guidance_rescale"):
            value = number(f"{self.name}: {setting}", getattr(self, setting))
            object.__setattr__(self, setting, value)
        low, high = SHIFTS
        if not low <= self.shift <= high:
            raise ValueError(f"{self.name}: shift must lie between {low:g} and {high:g}, got {self.shift:g}")
        if self.guidance_scale > MOST_GUIDANCE:
            raise ValueError(
                f"{self.name}: the guidance scale may be at most {MOST_GUIDANCE:g}, got "
                f"{self.guidance_scale:g}"
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(f"{self.name}: eta must lie between 0 and 1, got {self.eta}")
        if self.clip_sample_range is not None:
            clip = number(f"{self.name}: clip_sample_range", self.clip_sample_range)
            object.__setattr__(self, "clip_sample_range", clip)
            if not clip > 0:
                raise ValueError(f"{self.name}: clip_sample_range must be positive, got {clip}")
        object.__setattr__(self, "levels", read_levels(f"{self.name}: levels", self.levels))
        object.__setattr__(self, "reuse", read_reuse(f"{self.name}: reuse", self.reuse))
        if not 0 < number(f"{self.name}: reuse_share", self.reuse_share) < 1:
            raise ValueError(f"{self.name}: reuse_share must lie between 0 and 1, got {self.reuse_share}")
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(
                f"{self.name}: guidance_rescale must lie between 0 and 1, got {self.guidance_rescale}"
            )
        object.__setattr__(self, "guider", read_guider(f"{self.name}: guider", self.guider))
        self._check_guider()
        if self.guidance_window is not None:
            what = f"{self.name}: a level of guidance_window"
            given = self.guidance_window
            window = () if isinstance(given, str) else tuple(number(what, level) for level in given)
            if len(window) != 2 or not 0 <= window[1] < window[0] <= 1:
                raise ValueError(
                    f"{self.name}: guidance_window is (high, low) with 0 <= low < high <= 1, from noise (1) "
                    f"to data (0), got {self.guidance_window}"
                )
            object.__setattr__(self, "guidance_window", window)

    def _check_guider(self) -> None:
        guider = self.own_guider
        if guider is None:
            return
        if not self.guided:
            raise ValueError(
                f"{self.name}: guider {guider.kind} is a kind of guidance, and the guidance scale of "
                f"{self.guidance_scale:g} is none: give {self.name} a scale above 1, or no guider"
            )
        if guider.zero_init_steps and self.path.discrete:
            raise ValueError(
                f"{self.name}: zero_init_steps is for flow paths, where a zero prediction leaves the state "
                "as it is; this one is a DDPM path: leave it out"
            )

    @property
    def own_guider(self) -> Guider | None:
        """The guider, as it was read."""
        assert not isinstance(self.guider, str)
        return self.guider

    @property
    def guided(self) -> bool:
        """Whether there is guidance anywhere. As in diffusers, a scale of 1 or less switches it off."""
        return self.guidance_scale > 1.0

    def nodes(self, count: int, high: float = 1.0, low: float = 0.0) -> list[float]:
        """Where `count` steps between two shares of noise begin: see `spacings.nodes`."""
        return nodes(self.levels, self.path, count, high, low, self.shift, self.spacing)

    @property
    def last_level(self) -> Level:
        """Where the last step of a run to the data goes."""
        to_data = self.set_alpha_to_one or not self.path.discrete
        return Level(1.0, 0.0) if to_data else self.path.level(0)

    def guidance_at(self, noise: float) -> float:
        """The guidance scale at a share of noise: 1 without guidance, and outside the guidance window."""
        high, low = self.guidance_window or (1.0, 0.0)
        return self.guidance_scale if self.guided and low <= noise <= high else 1.0

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
            ValueError: a scheduler class, beta schedule or prediction type this package doesn't know, or any
                key that would change the images and isn't honoured (see `scheduler_configs`).
        """
        scheduler = config.get("_class_name", "")
        if scheduler not in SOLVER_OF_SCHEDULER:
            known = ", ".join(SOLVER_OF_SCHEDULER)
            raise ValueError(f'{name}: scheduler "{scheduler}" is not supported: use one of {known}')
        given = {key: value for key, value in settings.items() if value is not None}
        try:
            check_scheduler_config(config, given)
            path = path_from_scheduler_config(config)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        read = {
            "shift": config.get("shift", config.get("flow_shift", 1.0)),
            "spacing": config.get("timestep_spacing", "trailing"),
            "clip_sample_range": config.get("clip_sample_range", 1.0) if config.get("clip_sample") else None,
        }
        read["solver"] = given.get("solver") or _solver_of(name, scheduler, config)
        if read["solver"] == SOLVER_OF_SCHEDULER[scheduler] == "ddim":
            read["set_alpha_to_one"] = config.get("set_alpha_to_one") is not False
        prediction = config.get("prediction_type", "epsilon") if path.discrete else "flow_prediction"
        return cls(name, path, prediction, model, **{**read, **given})


def _solver_of(name: str, scheduler: str, config: Mapping[str, Any]) -> Solver:
    if scheduler != "DPMSolverMultistepScheduler":
        return SOLVER_OF_SCHEDULER[scheduler]
    algorithm = config.get("algorithm_type", "dpmsolver++")
    order, kind = config.get("solver_order", 2), config.get("solver_type", "midpoint")
    if algorithm not in _SOLVER_OF_ALGORITHM or (order, kind) != (2, "midpoint"):
        raise ValueError(
            f"{name}: {scheduler} is supported with algorithm_type {' or '.join(_SOLVER_OF_ALGORITHM)}, "
            f"solver_order 2 and solver_type midpoint, got {algorithm}, {order} and {kind}"
        )
    return _SOLVER_OF_ALGORITHM[algorithm]
