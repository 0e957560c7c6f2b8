"""A model as an expert's: called with text features, in its own dtype; also where features are reused."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import architecture_of, reusable

__all__ = ["ExpertModel"]


class ExpertModel:
    """An `Expert`'s model, and a `sampling.reuse.ReusableModel` where its architecture allows it.

    Args:
        model: of a known architecture, or in `torch.compile`'s wrapper.
        dtype: what it computes in; by default that of its first parameter.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.model, self.dtype = model, dtype or next(model.parameters()).dtype
        self._architecture = architecture_of(model)

    def __call__(
        self, sample: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor, **conditioning: Any
    ) -> torch.Tensor:
        text = prompt_embeds.to(self.dtype)
        return self._architecture.call(self.model, sample, timestep, text, **conditioning)

    def check_reusable(self) -> None:
        """Raise ValueError, with what to do, for a model whose features can't be reused."""
        reusable(self.model)

    def recording(
        self, sample: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor, **conditioning: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        text = prompt_embeds.to(self.dtype)
        return reusable(self.model).call_recording(self.model, sample, timestep, text, **conditioning)

    def reusing(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        features: torch.Tensor,
        prompt_embeds: torch.Tensor,
        **conditioning: Any,
    ) -> torch.Tensor:
        text = prompt_embeds.to(self.dtype)
        found = reusable(self.model)
        return found.call_reusing(self.model, sample, timestep, text, features, **conditioning)
