"""From the student's tokens to an expert's features: trained along, and no part of what is saved."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from moe_sampler.tinyflux.model.dense import linear

__all__ = ["AlignmentProjector"]


class AlignmentProjector(nn.Module):
    """Maps image tokens to the channels of an expert's feature map.

    "mlp" is REPA's (arXiv:2410.06940), three layers with SiLU between that see each token alone; "conv" is
    iREPA's (arXiv:2512.10794), one 3×3 convolution, which keeps more of how places differ.

    Args:
        width: D, of the tokens.
        channels: of the map.
        kind: "mlp" or "conv".
        inner: the MLP's inner width; by default 2·D.
    """

    def __init__(
        self, width: int, channels: int, kind: Literal["mlp", "conv"] = "mlp", inner: int | None = None
    ) -> None:
        super().__init__()
        self.layers: nn.Module
        if kind == "conv":
            conv = nn.Conv2d(width, channels, 3, padding=1)
            nn.init.xavier_uniform_(conv.weight)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
            self.layers = conv
            return
        inner = 2 * width if inner is None else inner
        self.layers = nn.Sequential(
            linear(width, inner), nn.SiLU(), linear(inner, inner), nn.SiLU(), linear(inner, channels)
        )

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, h·w, channels] of tokens: [B, h·w, D], rows first; size: (h, w)."""
        if not isinstance(self.layers, nn.Conv2d):
            return self.layers(tokens)
        image = tokens.transpose(1, 2).unflatten(2, size)
        return self.layers(image).flatten(2).transpose(1, 2)
