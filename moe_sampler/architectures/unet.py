"""diffusers' `UNet2DConditionModel`: Stable Diffusion 1.5, Sol, Lune and the demo's experts."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .protocol import ModelShape

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention
    from torch import Tensor, nn

__all__ = ["SD15_UNET", "UNET", "UNet"]

SD15_UNET: Mapping[str, Any] = MappingProxyType(
    {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "act_fn": "silu",
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "norm_num_groups": 32,
        "norm_eps": 1e-05,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "center_input_sample": False,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
    }
)
"""Stable Diffusion 1.5's UNet (859,520,964 parameters), Sol's and Lune's too."""

# diffusers' own defaults, for configs that leave them out
_DEFAULTS = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 1280,
    "block_out_channels": (320, 640, 1280, 1280),
}

_TOKENS = 77
"""Of CLIP's prompts."""

_ORIGINAL = "model.diffusion_model."
_ORIGINAL_BLOCKS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.")

_FOREIGN = (
    (("lora_A", "lora_B", "lora_down", "lora_up", "lora.down", "lora.up"), "a LoRA: use load_lora_weights"),
    (("controlnet_cond_embedding", "controlnet_"), "a ControlNet"),
    (("add_embedding.", "label_emb."), "an SDXL UNet"),
    (("double_blocks.", "single_blocks.", "transformer_blocks.0.attn."), "a transformer, not a UNet"),
    (("down_blocks.0.motion_modules",), "a video UNet"),
    (("text_model.encoder.", "token_embedding."), "a text encoder"),
    (("quant_conv.", "encoder.mid_block.", "decoder.mid_block.", "decoder.conv_in."), "a VAE"),
)
"""Parts of keys by which other models are known; the first that fits counts."""


class UNet:
    """The UNet as an `Architecture` whose features can be reused and whose layers can be watched."""

    class_name = "UNet2DConditionModel"
    prefixes = ("unet.",)

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        """Every level but the first halves the latents."""
        own = {**_DEFAULTS, **config}
        size = own["sample_size"]
        if isinstance(size, list | tuple):
            size = size[0] if len(set(size)) == 1 else None
        return ModelShape(
            size,
            own["in_channels"],
            own["out_channels"],
            own["cross_attention_dim"],
            2 ** (len(own["block_out_channels"]) - 1),
        )

    def build(self, config: Mapping[str, Any]) -> UNet2DConditionModel:
        from diffusers import UNet2DConditionModel

        model = UNet2DConditionModel.from_config(dict(config))
        assert isinstance(model, UNet2DConditionModel)  # no tuple: nobody asked for unused settings
        return model

    def call(
        self, model: nn.Module, x: Tensor, timestep: Tensor, prompt_embeds: Tensor, **conditioning: Any
    ) -> Tensor:
        return model(x, timestep, prompt_embeds, return_dict=False, **conditioning)[0]

    def own_names(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        """From the original Stable Diffusion names, by diffusers' own converter."""
        bare = any(key.startswith(_ORIGINAL_BLOCKS) for key in tensors)
        if not bare and not any(key.startswith(_ORIGINAL) for key in tensors):
            return dict(tensors)
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

        original = {_ORIGINAL + key: value for key, value in tensors.items()} if bare else dict(tensors)
        converted = convert_ldm_unet_checkpoint(dict(original), dict(config))
        # It leaves out what it doesn't know; that must not go unnoticed.
        used = {value.data_ptr() for value in converted.values()}
        for key, value in original.items():
            if key.startswith(_ORIGINAL) and value.data_ptr() not in used:
                converted[key] = value
        return converted

    def guess(
        self, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], unexpected: Collection[str]
    ) -> str:
        for parts, meaning in _FOREIGN:
            strange = any(part in key for key in unexpected for part in parts)
            if strange and not any(part in key for key in expected for part in parts):
                return f"This looks like {meaning}"
        if any(key.startswith((_ORIGINAL, *_ORIGINAL_BLOCKS, "first_stage_model.")) for key in unexpected):
            return "These look like original-format keys of another architecture than the config's"
        if "conv_in.weight" in tensors and "conv_in.weight" in expected:
            channels, own = tensors["conv_in.weight"].shape[1], expected["conv_in.weight"].shape[1]
            if channels != own:
                return f"Its latents have {channels} channels, not {own}: an inpainting or other special UNet"
        cross = next((key for key in expected if key.endswith("attn2.to_k.weight")), None)
        if cross is not None and cross in tensors and tensors[cross].shape[-1:] != expected[cross].shape[-1:]:
            return (
                f"It was trained on text features of {tensors[cross].shape[-1]} channels, as another base has"
            )
        return ""

    # Reusing its features

    def check_reusable(self, model: UNet2DConditionModel) -> None:
        from .unet_reuse import check_reusable

        check_reusable(model)

    def call_recording(
        self,
        model: UNet2DConditionModel,
        x: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        **conditioning: Any,
    ) -> tuple[Tensor, Tensor]:
        from .unet_reuse import recording_model

        recording, last = recording_model(model)
        output = self.call(recording, x, timestep, prompt_embeds, **conditioning)
        assert last.features is not None  # the call left them there
        return output, last.features

    def call_reusing(
        self,
        model: UNet2DConditionModel,
        x: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        features: Tensor,
        **conditioning: Any,
    ) -> Tensor:
        from .unet_reuse import reusing_model

        return self.call(reusing_model(model, features), x, timestep, prompt_embeds, **conditioning)

    def reuse_share(self, config: Mapping[str, Any]) -> float:
        return _reuse_share(json.dumps({**config, "_name_or_path": None}, sort_keys=True, default=list))

    # Watching its layers

    def block_channels(self, model: UNet2DConditionModel) -> dict[str, int]:
        widths = list(model.config["block_out_channels"])
        found = {f"down_blocks.{i}": width for i, width in enumerate(widths)}
        if model.mid_block is not None:
            found["mid_block"] = widths[-1]
        found.update({f"up_blocks.{i}": width for i, width in enumerate(reversed(widths))})
        return found

    def middle(self, model: UNet2DConditionModel) -> nn.Module | None:
        return model.mid_block

    def self_attention_layers(self, model: UNet2DConditionModel) -> dict[str, Attention]:
        from diffusers.models.attention_processor import Attention

        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, Attention) and not module.is_cross_attention
        }

    def first_layers(self, model: UNet2DConditionModel, names: Collection[str]) -> UNet2DConditionModel:
        from torch import nn

        last = max((int(name.split(".")[1]) for name in names if name.startswith("up_blocks.")), default=-1)
        short = copy.copy(model)
        up_blocks = nn.ModuleList(list(model.up_blocks)[: last + 1])
        ends = {"up_blocks": up_blocks, "conv_norm_out": None, "conv_out": nn.Identity()}
        short._modules = {**model._modules, **ends}
        return short


UNET = UNet()


@lru_cache(maxsize=16)
def _reuse_share(config: str) -> float:
    import torch

    from .unet_reuse import check_reusable, share_of_outer_layers

    own: dict[str, Any] = json.loads(config)
    shape = UNET.shape(own)
    side = shape.sample_size or 64
    with torch.device("meta"):
        model: Any = UNET.build(own)
        check_reusable(model)
        x = torch.empty(1, shape.in_channels, side, side)
        text = torch.empty(1, _TOKENS, shape.cross_attention_dim)
        return share_of_outer_layers(model, (x, torch.empty((), dtype=torch.int64), text))
