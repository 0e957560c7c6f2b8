"""How the times that the student is trained at are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from moe_sampler.training.settings import SettingsError

__all__ = ["TimeSettings"]


@dataclass(frozen=True)
class TimeSettings:
    """How a sample's share of noise s is drawn."""

    sampling: Annotated[
        Literal["logit_normal", "uniform"],
        "distribution of s: logit_normal, the sigmoid of a normal number, which favours the middle "
        "(arXiv:2403.03206), or uniform",
    ] = "logit_normal"
    mean: Annotated[float, "of the normal number; above 0 there is more noise"] = 0.0
    std: Annotated[float, "of the normal number; above about 1.4 the ends are favoured"] = 1.0
    stratified: Annotated[
        bool,
        "cut the distribution into as many equally likely parts as a step has samples and draw one in each: "
        "the same distribution, with less variance from step to step",
    ] = True
    shift: Annotated[
        float,
        "k of s' = k·s/(1 + (k - 1)·s), applied to what was drawn: above 1 there is more noise, as large "
        "images need; 1 changes nothing",
    ] = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise SettingsError(f"mean must be finite, got {self.mean}")
        for name in ("std", "shift"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingsError(f"{name} must be positive and finite, got {getattr(self, name)}")
