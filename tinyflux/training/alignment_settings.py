"""Representation alignment: which of the student's tokens follow which of an expert's features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from moe_sampler.tinyflux.training.objective_settings import warmed_up
from moe_sampler.training.settings import SettingsError

if TYPE_CHECKING:  # a command's --help shouldn't wait for torch
    from moe_sampler.tinyflux.training.noise_curve import NoiseCurve

__all__ = ["AlignmentSettings"]


@dataclass(frozen=True)
class AlignmentSettings:
    """loss += weight·(1 - cosine similarity of projected tokens and an expert's map), a mean over tokens.

    REPA (arXiv:2410.06940) with what was found since: it helps early and hinders late (HASTE,
    arXiv:2505.16792), and what helps is how places differ, not what they have in common (iREPA,
    arXiv:2512.10794). Levels are shares of noise, 1 at noise.
    """

    align_weight: Annotated[float, "weight of the alignment; 0 is off, 0.5 is usual"] = 0.0
    align_after: Annotated[
        int | None,
        "after how many of the student's blocks its image tokens are aligned, double blocks first; left out, "
        "a third of them",
    ] = None
    align_maps: Annotated[
        Literal["cached", "live"],
        "the expert's maps: of a cache built with --maps, or of the expert in the loop",
    ] = "cached"
    align_expert: Annotated[
        Literal["lune", "sol"] | None, "whose; left out, the cache's, and Lune's of experts in the loop"
    ] = None
    align_block: Annotated[
        str | None,
        "which block of the expert, as mid_block or up_blocks.1; left out, the cache's, and of experts in "
        "the loop the middle one",
    ] = None
    align_noise: Annotated[
        str,
        "how much noise the expert sees: one level, or a curve over the student's own level as distill_mix "
        'has it ("0:0, 1:1" is the student\'s own); with a cache, levels between those of its maps',
    ] = "0.25"
    align_projector: Annotated[
        Literal["mlp", "conv"], "from tokens to the map's channels: REPA's MLP, or iREPA's 3×3 convolution"
    ] = "mlp"
    align_projector_width: Annotated[int | None, "inner width of the MLP; left out, twice the student's"] = (
        None
    )
    align_centering: Annotated[
        float,
        "0 to 1: how much of a map's mean over space is taken from it before its scale over space is set to "
        "1; 1 leaves only how places differ; 0 leaves the map as it is, scale too",
    ] = 1.0
    align_warmup_steps: Annotated[int, "optimizer steps over which align_weight grows from 0"] = 0
    align_stop_steps: Annotated[int, "optimizer step from which on there is no alignment; 0 is never"] = 0
    align_decay_steps: Annotated[int, "how many steps before the stop the weight falls to 0"] = 0

    def __post_init__(self) -> None:
        if not 0 <= self.align_weight < math.inf:
            raise SettingsError(f"align_weight must not be negative, got {self.align_weight}")
        if not 0 <= self.align_centering <= 1:
            raise SettingsError(f"align_centering must lie between 0 and 1, got {self.align_centering}")
        for name in ("align_after", "align_projector_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} must be at least 1, got {value}")
        for name in ("align_warmup_steps", "align_stop_steps", "align_decay_steps"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.align_decay_steps > self.align_stop_steps:
            raise SettingsError(
                f"align_decay_steps ({self.align_decay_steps}) end at align_stop_steps "
                f"({self.align_stop_steps}), and can't be more"
            )
        if self.align_weight:  # what parses it needs torch
            try:
                levels = self.noise_curve.values
            except ValueError as error:
                raise SettingsError(f"align_noise: {error}") from None
            if not all(0 <= level <= 1 for level in levels):
                raise SettingsError(f"align_noise has levels from 0 to 1, got {self.align_noise!r}")

    @property
    def noise_curve(self) -> NoiseCurve:
        """`align_noise` as a function."""
        from moe_sampler.tinyflux.training.noise_curve import NoiseCurve

        return NoiseCurve.parse(self.align_noise)

    def weight_at(self, step: int) -> float:
        """At an optimizer step, from 0."""
        share = warmed_up(step, self.align_warmup_steps)
        if self.align_stop_steps:
            left = self.align_stop_steps - step
            share *= min(1.0, max(0.0, left / max(1, self.align_decay_steps)))
        return self.align_weight * share
