"""Tiny random models in the formats that the published ones have, and captioned pictures.

Stable Diffusion's folder with Sol's and Lune's files, Flux's folder, CLIP with its vision half, T5 with its
decoder.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from moe_sampler.data.scenes import DemoScenes
from moe_sampler.demo import experts_path

__all__ = ["LUNE_WIDTH", "POOLED", "SIDE", "TEXT", "write_models", "write_pictures"]

SIDE = 64
"""Of the pictures, in pixels; both VAEs halve it three times."""
TEXT, POOLED, LUNE_WIDTH = 24, 40, 32
"""Widths of T5's states, CLIP-L's pooled state and Lune's middle block."""


def write_models(folder: Path, seed: int = 0) -> None:
    """`sd15/`, `sol.safetensors`, `lune.safetensors`, `flux/`, `clip/` and `t5/` below the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _stable_diffusion(folder / "sd15")
        for name in ("sol", "lune"):
            weights = {key: value.half().contiguous() for key, value in _unet().state_dict().items()}
            save_file(weights, folder / f"{name}.safetensors")
        tokenizer, t5 = _t5()
        t5.save_pretrained(folder / "t5")
        tokenizer.save_pretrained(folder / "t5")
        clip = _clip()
        clip.save_pretrained(folder / "clip")
        _clip_tokenizer().save_pretrained(folder / "clip")
        _flux(folder / "flux", clip, tokenizer, t5)


def write_pictures(folder: Path, count: int) -> None:
    """Captioned pictures, of several sizes."""
    folder.mkdir(parents=True)
    for index in range(count):
        sample = DemoScenes(count)[index]
        sample.image.resize((SIDE + 16 * (index % 2), SIDE)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(sample.caption)


def _vae(channels: int, **config: float) -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        **config,
    )


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(16, LUNE_WIDTH),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        attention_head_dim=2,
    )


def _clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(experts_path() / "tokenizer")


def _text_config(width: int) -> CLIPTextConfig:
    tokenizer = _clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _clip() -> CLIPModel:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=POOLED,
    )
    return CLIPModel(CLIPConfig(text_config=_text_config(POOLED).to_dict(), vision_config=vision.to_dict()))


def _t5() -> tuple[T5Tokenizer, T5ForConditionalGeneration]:
    words = sorted({word for i in range(64) for word in DemoScenes(64)[i].caption.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [(f"▁{word}", -5.0) for word in words]
    pieces += [(letter, -10.0) for letter in ("▁", *"abcdefghijklmnopqrstuvwxyz,.")]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT,
        d_kv=8,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        tie_word_embeddings=False,
        feed_forward_proj="gated-gelu",
    )
    return tokenizer, T5ForConditionalGeneration(config)


def _stable_diffusion(folder: Path) -> None:
    parts = {
        "vae": ("diffusers", _vae(4, scaling_factor=0.18215)),
        "text_encoder": ("transformers", CLIPTextModel(_text_config(32))),
        "tokenizer": ("transformers", _clip_tokenizer()),
        "unet": ("diffusers", _unet()),
    }
    _pipeline(folder, "StableDiffusionPipeline", parts)


def _flux(folder: Path, clip: CLIPModel, tokenizer: T5Tokenizer, t5: T5ForConditionalGeneration) -> None:
    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict(clip.text_model.state_dict(), strict=False)
    encoder = T5EncoderModel(t5.config)
    encoder.load_state_dict(t5.state_dict(), strict=False)
    parts = {
        "vae": ("diffusers", _vae(16, scaling_factor=0.3611, shift_factor=0.1159)),
        "text_encoder": ("transformers", text),
        "tokenizer": ("transformers", _clip_tokenizer()),
        "text_encoder_2": ("transformers", encoder),
        "tokenizer_2": ("transformers", tokenizer),
    }
    _pipeline(folder, "FluxPipeline", parts)


def _pipeline(folder: Path, name: str, parts: dict) -> None:
    for part, (_, model) in parts.items():
        model.save_pretrained(folder / part)
    index = {part: [library, type(model).__name__] for part, (library, model) in parts.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name, **index}))
