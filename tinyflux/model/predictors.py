"""What the experts teach the student, as it uses it: Lune's features and Sol's attention, real or predicted.

Here t runs from noise (0) to data (1).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_sampler.tinyflux.model.config import TinyFluxConfig
from moe_sampler.tinyflux.model.dense import linear

__all__ = ["LunePredictor", "SolOutput", "SolPrior"]


def _real_or(predicted: Tensor, given: Tensor | None, real: Tensor | None) -> Tensor:
    """The real features of the samples that use them, the predicted ones of the others; [B, ...]."""
    if given is None:
        return predicted
    return given if real is None else torch.where(real.view(-1, *(1,) * (given.ndim - 1)), given, predicted)


class LunePredictor(nn.Module):
    """sigmoid(gate) * Linear(LayerNorm(features)), the features predicted from time and text if not given."""

    def __init__(self, config: TinyFluxConfig) -> None:
        super().__init__()
        hidden, features = config.lune_hidden_dim, config.lune_expert_dim
        self.input_proj = linear(config.hidden_size + config.pooled_projection_dim, hidden, gain=0.5)
        self.predictor = nn.Sequential(
            nn.SiLU(),
            linear(hidden, hidden, gain=0.5),
            nn.SiLU(),
            nn.Dropout(config.lune_dropout),
            linear(hidden, hidden, gain=0.5),
            nn.SiLU(),
            linear(hidden, features, gain=0.5),
        )
        self.output_proj = nn.Sequential(
            nn.LayerNorm(features), linear(features, config.hidden_size, gain=0.5)
        )
        self.expert_gate = nn.Parameter(torch.zeros(()))

    def forward(
        self,
        time_and_text: Tensor,
        features: Tensor | None,
        real: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """([B, D] to add to the conditioning, [B, lune_expert_dim] predicted features).

        time_and_text: [B, D + pooled_projection_dim]. features: [B, lune_expert_dim], the real ones, or None.
        real: bool [B], the samples that use them; all do by default. kept: [B, lune_hidden_dim], factors of
        the hidden units in place of what dropout draws.
        """
        predicted = self.input_proj(time_and_text)
        for layer in self.predictor:
            if kept is None or not isinstance(layer, nn.Dropout):
                predicted = layer(predicted)
            else:
                predicted = predicted * kept.to(predicted.dtype)
        signal = self.output_proj(_real_or(predicted, features, real))
        return torch.sigmoid(self.expert_gate) * signal, predicted


class SolOutput(NamedTuple):
    """All float32. temperature: [B, heads]. importance: [B, S, S], the map that is used. stats: [B, 3] and
    spatial: [B, S, S], the predictions."""

    temperature: Tensor
    importance: Tensor
    stats: Tensor
    spatial: Tensor


def _mlp(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(
        linear(width_in, hidden, gain=0.5),
        nn.SiLU(),
        linear(hidden, hidden, gain=0.5),
        nn.SiLU(),
        linear(hidden, width_out, gain=0.5),
    )


class SolPrior(nn.Module):
    """Temperatures and a map of importance for the attention: blend * geometric + (1 - blend) * learned."""

    def __init__(self, config: TinyFluxConfig) -> None:
        super().__init__()
        self.heads, self.side = config.num_attention_heads, config.sol_spatial_size
        self.unit_mean = config.unit_mean_map
        hidden = config.sol_hidden_dim
        width = config.hidden_size + config.pooled_projection_dim
        self.stat_predictor = _mlp(width, hidden, 3)
        self.spatial_predictor = _mlp(width, hidden, self.side**2)
        self.stat_to_temperature = nn.Sequential(
            linear(3, hidden // 2, gain=0.5),
            nn.SiLU(),
            linear(hidden // 2, self.heads, gain=0.5),
            nn.Softplus(),
        )
        if config.sol_qk_scale:
            self.spatial_to_qk_scale = nn.Linear(1, self.heads)
            nn.init.zeros_(self.spatial_to_qk_scale.weight)
            nn.init.ones_(self.spatial_to_qk_scale.bias)
        share = min(max(config.sol_geometric_weight, 1e-4), 1 - 1e-4)
        self.blend_gate = nn.Parameter(torch.tensor(math.log(share / (1 - share))))

    def _geometric_temperature(self, t: Tensor) -> Tensor:
        spread = torch.linspace(-0.2, 0.2, self.heads, dtype=t.dtype, device=t.device)
        return (1 + t[:, None] + spread).clamp(0.5, 3.0)

    def _geometric_map(self, t: Tensor) -> Tensor:
        """Even at data, bright in the middle at noise."""
        axis = torch.linspace(-1, 1, self.side, dtype=t.dtype, device=t.device)
        centre = torch.exp(-2 * torch.sqrt(axis[:, None] ** 2 + axis**2))
        if self.unit_mean:
            centre = centre / centre.mean()
        t = t[:, None, None]
        return t + (1 - t) * centre

    def scaled(self, spatial: Tensor) -> Tensor:
        """A real map on the scale the model works in: with mean 1, or as it is. spatial: [B, S, S]."""
        return spatial / spatial.mean((1, 2), keepdim=True).clamp_min(1e-12) if self.unit_mean else spatial

    def _predicted_map(self, logits: Tensor) -> Tensor:
        if self.unit_mean:
            return (self.side**2 * torch.softmax(logits, -1)).unflatten(-1, (self.side, self.side))
        return torch.sigmoid(logits).unflatten(-1, (self.side, self.side))

    def forward(
        self,
        time_and_text: Tensor,
        t: Tensor,
        stats: Tensor | None,
        spatial: Tensor | None,
        real: Tensor | None = None,
    ) -> SolOutput:
        """Real statistics and the real map stand in for the predicted ones, each on its own.

        time_and_text: [B, D + pooled_projection_dim]. t: [B], float32 (float64 in a float64 model).
        stats: [B, 3] or None. spatial: [B, S, S] or None. real: bool [B], the samples that use them; all do
        by default.
        """
        predicted_stats = self.stat_predictor(time_and_text)
        predicted_map = self._predicted_map(self.spatial_predictor(time_and_text).to(t.dtype))
        learned_temperature = self.stat_to_temperature(_real_or(predicted_stats, stats, real)).to(t.dtype)
        real_map = None if spatial is None else self.scaled(spatial.to(t.dtype))
        learned_map = _real_or(predicted_map, real_map, real)
        blend = torch.sigmoid(self.blend_gate.to(t.dtype))
        return SolOutput(
            torch.lerp(learned_temperature, self._geometric_temperature(t), blend),
            torch.lerp(learned_map, self._geometric_map(t), blend),
            predicted_stats.to(t.dtype),
            predicted_map,
        )
