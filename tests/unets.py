"""A UNet of two levels that is small enough to be called by the hundred, and what it is called with."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

__all__ = ["CROSS", "PLAIN", "config", "inputs", "unet"]

CROSS, PLAIN = "CrossAttnUpBlock2D", "UpBlock2D"


def config(layers: int = 1, ends_in: str = PLAIN, **more) -> dict:
    down = {CROSS: "CrossAttnDownBlock2D", PLAIN: "DownBlock2D"}[ends_in]
    return {
        "sample_size": 8,
        "block_out_channels": [8, 16],
        "down_block_types": [down, "CrossAttnDownBlock2D"],
        "up_block_types": [CROSS, ends_in],
        "layers_per_block": layers,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        **more,
    }


def unet(seed: int = 0, **settings) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel.from_config(config(**settings)).eval()


def inputs(seed: int = 1, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(batch, 4, 8, 8), torch.tensor(400 + seed), torch.randn(batch, 5, 12)
