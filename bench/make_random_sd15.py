"""Write a model of Stable Diffusion 1.5's size with random weights: memory and speed without a download.

`python -m bench.make_random_sd15 FOLDER` writes 4 GB: `base/`, in Stable Diffusion's layout, and one file for
each of two experts, under the published names. It makes noise at the price of pictures. The tokenizer is the
demo experts', whose few tokens are all in the text encoder's vocabulary.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from moe_sampler.architectures.unet import SD15_UNET
from moe_sampler.demo import experts_path
from moe_sampler.loading.weights import empty_model

EXPERTS = {"sol": "sd15-flow-sol-unet.safetensors", "lune": "sd15-flow-lune-unet.safetensors"}

VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
TEXT_ENCODER = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
    "projection_dim": 768,
}


def random_weights(
    model: torch.nn.Module, seed: int, dtype: torch.dtype = torch.float16, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Weights that keep activations finite: norms are the identity, biases nothing, the rest small."""
    generator, tensors = torch.Generator(device).manual_seed(seed), {}
    for key, empty in model.state_dict().items():
        if empty.ndim < 2:
            value = float(key.endswith("weight"))
            tensors[key] = torch.full(empty.shape, value, dtype=dtype, device=device)
        else:
            scale = 0.5 * empty[0].numel() ** -0.5
            drawn = torch.randn(empty.shape, generator=generator, device=device)
            tensors[key] = (drawn * scale).to(dtype)
    return tensors


def write_base(folder: Path) -> None:
    """VAE, text encoder and tokenizer, and the UNet's config, which a file of weights doesn't have."""
    with init_empty_weights():
        parts = {
            "vae": AutoencoderKL.from_config(VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)),
        }
    files = {"vae": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
    for seed, (name, part) in enumerate(parts.items()):
        (folder / name).mkdir(parents=True)
        save_file(random_weights(part, seed), folder / name / files[name], metadata={"format": "pt"})
        if name == "vae":
            part.save_config(folder / name)
        else:
            part.config.save_pretrained(folder / name)
    shutil.copytree(experts_path() / "tokenizer", folder / "tokenizer")
    tokenizer = folder / "tokenizer" / "tokenizer_config.json"
    settings = {
        **json.loads(tokenizer.read_text()),
        "model_max_length": TEXT_ENCODER["max_position_embeddings"],
    }
    tokenizer.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text(
        json.dumps(dict(SD15_UNET), indent=2) + "\n", encoding="utf-8"
    )
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_experts(folder: Path) -> None:
    """One file of 860 M fp16 weights for each expert."""
    unet = empty_model(SD15_UNET, "Stable Diffusion 1.5", torch.float16)
    for seed, (name, file) in enumerate(EXPERTS.items(), start=10):
        save_file(random_weights(unet, seed), folder / file, metadata={"format": "pt"})
        print(f"{name}: {folder / file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="created; it must not exist yet")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True)
    write_base(folder / "base")
    print(f"base: {folder / 'base'}")
    write_experts(folder)


if __name__ == "__main__":
    main()
