"""Models as small as ComfyUI still knows, with random weights: as diffusers has them, and as single files."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, WanTransformer3DModel
from original_names import unet_names, vae_names, wan_names
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel


def in_half(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The model in float32, with weights that float16 holds, so that a file takes half the room.

    Its last layer is enlarged: an untrained network says next to nothing.
    """
    torch.manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.05)
        parameter.data.add_(noise * 0.3).copy_(parameter.data.half().float())
    return model.eval()


def halves(tensors) -> dict[str, torch.Tensor]:
    return {key: value.half().contiguous() for key, value in tensors.items()}


def sd15_unet(seed: int) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's first width and text features, on two levels."""
    torch.manual_seed(seed)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(320, 320),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    return in_half(model, seed)


def sd15_vae() -> AutoencoderKL:
    """Its VAE, whose size ComfyUI doesn't read from the file."""
    torch.manual_seed(1)
    kind = "DownEncoderBlock2D", "UpDecoderBlock2D"
    return in_half(
        AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=(kind[0],) * 4,
            up_block_types=(kind[1],) * 4,
            layers_per_block=2,
        ),
        1,
    )


def sd15_text_encoder() -> CLIPTextModel:
    torch.manual_seed(2)
    config = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        num_hidden_layers=12,
        projection_dim=768,
    )
    return in_half(CLIPTextModel(config), 2)


def save_checkpoint(file: Path, unet: UNet2DConditionModel, vae: AutoencoderKL, text: CLIPTextModel) -> None:
    """One file with all three, as ComfyUI's checkpoints are."""
    clip = {key.removeprefix("text_model."): value for key, value in text.state_dict().items()}
    parts = {
        "model.diffusion_model.": unet_names(unet.state_dict(), layers=1),
        "first_stage_model.": vae_names(vae.state_dict()),
        "cond_stage_model.transformer.text_model.": clip,
    }
    tensors = {prefix + key: value for prefix, own in parts.items() for key, value in own.items()}
    save_file(halves(tensors), file)


def sdxl_base(seed: int) -> UNet2DConditionModel:
    """Of SDXL's kind with the depths of its smallest relative, and one width."""
    torch.manual_seed(seed)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(320, 320, 320),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=2048,
        attention_head_dim=(5, 5, 5),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return in_half(model, seed)


def sdxl_refiner(seed: int) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    attends = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(384,) * 4,
        layers_per_block=2,
        down_block_types=("DownBlock2D", attends[0], attends[0], "DownBlock2D"),
        up_block_types=("UpBlock2D", attends[1], attends[1], "UpBlock2D"),
        transformer_layers_per_block=4,
        cross_attention_dim=1280,
        attention_head_dim=(6,) * 4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2560,
    )
    return in_half(model, seed)


def save_unet(file: Path, unet: UNet2DConditionModel) -> None:
    save_file(halves(unet_names(unet.state_dict(), layers=unet.config.layers_per_block)), file)


def wan(seed: int) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    small = {"num_layers": 2, "ffn_dim": 256, "text_dim": 4096, "rope_max_seq_len": 32}
    return in_half(WanTransformer3DModel(num_attention_heads=1, attention_head_dim=128, **small), seed)


def save_wan(file: Path, model: WanTransformer3DModel) -> None:
    save_file(halves(wan_names(model.state_dict())), file)
