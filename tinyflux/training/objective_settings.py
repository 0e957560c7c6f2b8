"""What the student is trained for: the data's velocity, the experts' features, the experts' velocity."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from moe_sampler.training.settings import SettingsError

if TYPE_CHECKING:  # a command's flags are made of these settings, and its --help shouldn't wait for torch
    from moe_sampler.sampling.routers import Router
    from moe_sampler.tinyflux.model.config import TinyFluxConfig
    from moe_sampler.tinyflux.training.noise_curve import NoiseCurve

__all__ = ["ObjectiveSettings", "check_objective", "warmed_up"]

_WEIGHTS = ("lune_weight", "sol_stats_weight", "sol_map_weight")
_WARMUPS = ("lune_warmup_steps", "sol_warmup_steps", "distill_warmup_steps")
_SHARES = ("sol_weight_map", "background_weight", "distill_weight", "teacher_dropout", "feature_input")


@dataclass(frozen=True)
class ObjectiveSettings:
    """The student's losses, their weights, and what it is not shown. Levels are shares of noise, 1 at noise.

    loss = min-SNR · ((1 - share)·velocity + share·distilled velocity)
           + lune_weight·lune + sol_stats_weight·sol_stats + sol_map_weight·sol_map

    with share = distill_weight·distill_mix(noise), and every weight but the velocity's ramped up over its
    warm-up steps.
    """

    velocity_loss: Annotated[
        Literal["mse", "huber"], "of the velocity: mean squared error, or Huber's, which outliers move less"
    ] = "mse"
    huber_delta: Annotated[
        float, "error up to which Huber losses, all of them, are e²/2; beyond it they grow like delta·e"
    ] = 0.1
    min_snr_gamma: Annotated[
        float | None,
        "gamma of min-SNR's weight in its velocity form, min(t², gamma·(1 - t)²) (arXiv:2303.09556); 5 is "
        "usual; left out, all noise levels weigh the same",
    ] = None
    sol_weight_map: Annotated[
        float,
        "0 to 1: how much Sol's attention map weighs the pixels of the velocity loss, as "
        "1 + sol_weight_map·(map - 1) of a map with a mean of 1",
    ] = 0.0
    background_weight: Annotated[
        float,
        "0 to 1: how much a pixel outside of its image's mask counts in the velocity losses, beside 1 for "
        "one within; needs caches with masks; 1 is off",
    ] = 1.0
    lune_weight: Annotated[float, "weight of the loss of the predicted Lune features; 0 is off"] = 0.1
    lune_loss: Annotated[
        Literal["cosine", "mse", "huber"], "of Lune's features; cosine is 1 - cosine similarity"
    ] = "cosine"
    lune_warmup_steps: Annotated[int, "optimizer steps over which lune_weight grows from 0"] = 0
    sol_stats_weight: Annotated[
        float, "weight of the squared error of the predicted statistics of Sol's attention; 0 is off"
    ] = 0.05
    sol_map_weight: Annotated[
        float, "weight of the squared error of the predicted map of Sol's attention; 0 is off"
    ] = 0.05
    sol_warmup_steps: Annotated[int, "optimizer steps over which both of Sol's weights grow from 0"] = 0
    distill_weight: Annotated[
        float,
        "0 to 1: share of the routed experts' velocity in the velocity's target, the data have the rest; "
        "needs experts in the loop that share the student's latent space; 0 is off",
    ] = 0.0
    distill_mix: Annotated[
        str,
        "factor from 0 to 1 on distill_weight by noise level: one number, or knots noise:factor with "
        'straight lines between; "1:1, 0.5:0" listens to the experts near noise alone',
    ] = "1"
    distill_loss: Annotated[Literal["mse", "huber"], "of the distilled velocity"] = "mse"
    distill_warmup_steps: Annotated[int, "optimizer steps over which distill_weight grows from 0"] = 0
    distill_handoff_start: Annotated[float, "noise level where Sol begins to hand over to Lune"] = 0.75
    distill_handoff_end: Annotated[
        float, "noise level where Lune has taken over; the same as the start for a hard boundary"
    ] = 0.65
    distill_guidance_scale: Annotated[
        float, "classifier-free guidance of the distilled velocity; 1 is none and costs one pass, not two"
    ] = 1.0
    feature_input: Annotated[
        float,
        "0 to 1: probability that a sample is fed the experts' real features; else it uses its own "
        "predictions, as it does when it samples without experts",
    ] = 0.5
    teacher_dropout: Annotated[
        float, "0 to 1: probability that a sample has no teachers in a step, neither as input nor as target"
    ] = 0.1
    text_dropout: Annotated[
        float | None,
        "0 to 1: probability that a sample sees the null condition in place of its text, which guidance "
        "needs; left out, the model config's text_dropout",
    ] = None

    def __post_init__(self) -> None:
        if not 0 < self.huber_delta < math.inf:
            raise SettingsError(f"huber_delta must be positive and finite, got {self.huber_delta}")
        if self.min_snr_gamma is not None and not 0 < self.min_snr_gamma < math.inf:
            raise SettingsError(f"min_snr_gamma must be positive and finite, got {self.min_snr_gamma}")
        for name in _WEIGHTS:
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingsError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in _WARMUPS:
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in (*_SHARES, "text_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise SettingsError(f"{name} must lie between 0 and 1, got {value}")
        if not math.isfinite(self.distill_guidance_scale):
            raise SettingsError(f"distill_guidance_scale must be finite, got {self.distill_guidance_scale}")
        start, end = self.distill_handoff_start, self.distill_handoff_end
        if not 0 < end <= start < 1:
            raise SettingsError(
                "distill_handoff_start and distill_handoff_end are noise levels between 0 (data) and 1 "
                f"(noise), the start not below the end, got {start} and {end}"
            )
        try:
            factors = self.mix.values if self.distill_mix != "1" else (1.0,)
        except ValueError as error:
            raise SettingsError(f"distill_mix: {error}") from None
        if not all(0 <= factor <= 1 for factor in factors):
            raise SettingsError(f"distill_mix has factors from 0 to 1, got {self.distill_mix!r}")

    @property
    def mix(self) -> NoiseCurve:
        """`distill_mix` as a function."""
        from moe_sampler.tinyflux.training.noise_curve import NoiseCurve

        return NoiseCurve.parse(self.distill_mix)

    def router(self, first: str = "sol", then: str = "lune") -> Router:
        """Who teaches the velocity at a noise level."""
        from moe_sampler.sampling.routers import Boundary, Crossfade

        start, end = self.distill_handoff_start, self.distill_handoff_end
        return Boundary(first, then, start) if start == end else Crossfade(first, then, start, end)


def warmed_up(step: int, warmup_steps: float) -> float:
    """The share of a weight at an optimizer step, from 0: rising to 1 over `warmup_steps`."""
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def check_objective(
    objective: ObjectiveSettings,
    config: TinyFluxConfig,
    teaches: Collection[str] = (),
    routed: bool = False,
    masks: bool = False,
) -> None:
    """Whether a student can be trained for this with what there is.

    config: the student's. teaches: which of "sol" and "lune" give features. routed: whether there are experts
    whose velocity can be distilled. masks: whether samples have any.

    Raises:
        SettingsError: a loss whose teacher is missing, or that trains nothing of this student.
    """
    known = {
        "lune_weight": ("lune", "use_lune_expert", "freeze_lune"),
        "sol_stats_weight": ("sol", "use_sol_prior", "freeze_sol"),
        "sol_map_weight": ("sol", "use_sol_prior", "freeze_sol"),
        "sol_weight_map": ("sol", None, None),
    }
    for name, (teacher, part, frozen) in known.items():
        value = getattr(objective, name)
        if value == 0:
            continue
        if teacher not in teaches:
            raise SettingsError(
                f"{name} is {value}, but nothing gives {teacher.capitalize()}'s features: use a cache that "
                f"was built with this expert, or live teachers, or set {name} to 0"
            )
        if part and not getattr(config, part):
            raise SettingsError(f"{name} is {value}, but this student has {part}=False: set {name} to 0")
        if frozen and getattr(config, frozen):
            raise SettingsError(
                f"{name} is {value}, but {frozen}=True keeps what it would train fixed: set {name} to 0"
            )
    if objective.background_weight != 1 and not masks:
        raise SettingsError(
            f"background_weight is {objective.background_weight}, but the caches have no masks: build them "
            "with --masks or --mask-field, or set it to 1"
        )
    if objective.distill_weight and not routed:
        raise SettingsError(
            f"distill_weight is {objective.distill_weight}, but there are no experts in the loop to distil: "
            "give them, or set distill_weight to 0"
        )
