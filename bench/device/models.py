"""Models of Stable Diffusion 1.5's size with random weights, made where they run: the price of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bench.make_random_sd15 import TEXT_ENCODER, VAE, random_weights
from bench.measure import DEVICE
from moe_sampler import HybridPipeline, SamplingRun
from moe_sampler.architectures.unet import SD15_UNET
from moe_sampler.demo import experts_path
from moe_sampler.loading.presets import TRAINING
from moe_sampler.loading.weights import empty_model

__all__ = ["FULL", "TOY", "Models", "Size"]

Module = TypeVar("Module", bound=torch.nn.Module)

PROMPT, GUIDANCE = "a castle with two towers, at dusk", 7.5


@dataclass(frozen=True)
class Size:
    """What is built and drawn. pixels: the side of an image. steps: of an image; fewer: of a shorter one."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Any]
    dtype: torch.dtype
    pixels: int
    batches: tuple[int, ...]
    steps: int
    fewer: int


FULL = Size(SD15_UNET, VAE, TEXT_ENCODER, torch.float16, 512, (1, 4), 20, 10)
TOY = Size(
    {
        **SD15_UNET,
        "sample_size": 8,
        "block_out_channels": [16, 32],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "norm_num_groups": 8,
    },
    {
        **VAE,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 16,
    },
    {
        **TEXT_ENCODER,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 16,
    },
    torch.float32,
    16,
    (1,),
    3,
    2,
)


class Models:
    """Two experts, a VAE and a text encoder; our pipeline and diffusers' around the same modules."""

    def __init__(self, size: Size) -> None:
        self.size = size
        unets = [
            _filled(empty_model(size.unet, name, size.dtype), seed, size.dtype)
            for seed, name in enumerate(("Sol", "Lune"))
        ]
        with init_empty_weights():
            vae = AutoencoderKL(**size.vae)
            text_encoder = CLIPTextModel(CLIPTextConfig(**size.text))
        tokenizer = CLIPTokenizer.from_pretrained(
            experts_path() / "tokenizer", model_max_length=size.text["max_position_embeddings"]
        )
        self.ours = HybridPipeline(
            vae=_filled(vae, 2, size.dtype),
            text_encoder=_filled(text_encoder, 3, size.dtype),
            tokenizer=tokenizer,
            unet_sol=unets[0],
            unet_lune=unets[1],
            scheduler_sol=DDPMScheduler(**_settings("sol")),
            scheduler_lune=FlowMatchEulerDiscreteScheduler(**_settings("lune")),
        )
        self.theirs = self.new_theirs(self.ours.unet_sol)
        self.ours.set_progress_bar_config(disable=True)

    def new_theirs(self, unet: Any) -> StableDiffusionPipeline:
        """diffusers' own pipeline for one expert."""
        nothing: Any = None  # which its annotations don't allow
        pipe = StableDiffusionPipeline(
            vae=self.ours.vae,
            text_encoder=self.ours.text_encoder,
            tokenizer=self.ours.tokenizer,
            unet=unet,
            scheduler=cast(Any, DDPMScheduler(**_settings("sol"))),
            safety_checker=nothing,
            feature_extractor=nothing,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def new_run(self, expert: str, batch: int, steps: int, cond: Tensor, uncond: Tensor) -> SamplingRun:
        """What our pipeline runs for `batch` images; cond, uncond: [batch, tokens, channels]."""
        experts = self.ours.experts(guidance_scale=GUIDANCE)
        compiled = self.ours.plan(expert, num_inference_steps=steps, experts=experts)
        cells = self.size.pixels // self.ours.vae_scale_factor
        return SamplingRun(
            compiled,
            experts,
            shape=(batch, 4, cells, cells),
            seeds=list(range(batch)),
            cond={"prompt_embeds": cond},
            uncond={"prompt_embeds": uncond},
            device=DEVICE,
        )

    def model_input(self, batch: int) -> dict[str, Tensor]:
        """What the UNet is called with for `batch` guided images."""
        cells = self.size.pixels // self.ours.vae_scale_factor
        tokens, channels = self.size.text["max_position_embeddings"], self.size.text["hidden_size"]
        make = {"device": DEVICE, "dtype": self.size.dtype}
        return {
            "sample": torch.randn(2 * batch, 4, cells, cells, **make),
            "timestep": torch.tensor(500, device=DEVICE),
            "encoder_hidden_states": torch.randn(2 * batch, tokens, channels, **make),
        }


def _settings(expert: str) -> dict[str, Any]:
    """What an expert's scheduler is made of."""
    return {name: value for name, value in TRAINING[expert].items() if name != "_class_name"}


def _filled(model: Module, seed: int, dtype: torch.dtype) -> Module:
    """An empty model with random weights, on the device."""
    model.load_state_dict(random_weights(model, seed, dtype, DEVICE), assign=True)
    return model.to(DEVICE).eval().requires_grad_(False)
