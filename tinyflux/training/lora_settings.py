"""Training adapters of a student in place of all of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from moe_sampler.training.settings import SettingsError

__all__ = ["LoraSettings"]


@dataclass(frozen=True)
class LoraSettings:
    """LoRA (arXiv:2106.09685) of a student that init_from names; the rest of it stays as it is.

    What predicts the experts' features isn't adapted, so lune_weight, sol_stats_weight and sol_map_weight
    don't count.
    """

    lora_rank: Annotated[int, "Rank of the adapters; 0 trains the whole student"] = 0
    lora_alpha: Annotated[float | None, "Over the rank, the adapters' scale. Default: the rank"] = None
    lora_targets: Annotated[
        tuple[str, ...], "Last parts of the names of the blocks' layers. Default: all attention and MLPs"
    ] = ()
    lora_dropout: Annotated[float, "Of what the adapters see"] = 0.0

    def __post_init__(self) -> None:
        if self.lora_rank < 0:
            raise SettingsError(f"lora_rank must not be negative, got {self.lora_rank}")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise SettingsError(f"lora_alpha must be positive and finite, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise SettingsError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout}")

    @property
    def alpha(self) -> float:
        """What the file says."""
        return float(self.lora_rank) if self.lora_alpha is None else self.lora_alpha
