"""The bench at Stable Diffusion's size, on models small enough for a test."""

from __future__ import annotations

import pytest

from bench import large

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_provider_makes_an_image(monkeypatch):
    text = {"vocab_size": 49408, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 77}
    unet = {"sample_size": 8, "cross_attention_dim": 32, "norm_num_groups": 8, "attention_head_dim": 2}
    unet |= {"block_out_channels": [16, 32], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
    unet |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "layers_per_block": 1}
    vae = large.VAE | {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1}
    monkeypatch.setattr(large, "CONFIGS", {"unet": unet, "vae": vae, "text_encoder": text})
    monkeypatch.setattr(large, "SIDE", 64)
    monkeypatch.setattr(large, "STEPS", 3)
    rows = large.rows(rounds=1)
    names = [row["provider"] for row in rows]
    assert names[0] == "diffusers, float32" and rows[0]["times_diffusers"] == "1.00"
    assert {"moe-sampler, fast", "moe-sampler, fast, 1 of 2 full", "moe-sampler, fast, all full"} < {*names}
    assert all(float(str(row["seconds_an_image"])) >= 0 for row in rows)
