"""diffusers' names of tensors to the original ones, as ComfyUI's single files have them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

Tensors = Mapping[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_names(tensors: Tensors, layers: int) -> dict[str, torch.Tensor]:
    """layers: `layers_per_block`."""

    def name(key: str) -> str:
        for own, original in _ENDS.items():
            if key.startswith(own + "."):
                return original + key.removeprefix(own)
        side, rest = key.split(".", 1)
        if side == "mid_block":
            kind, index, rest = rest.split(".", 2)
            place = "middle_block." + ("1" if kind == "attentions" else str(2 * int(index)))
        else:
            block, kind, index, rest = rest.split(".", 3)
            first = int(block) * (layers + 1)
            if kind == "downsamplers":
                return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
            if kind == "upsamplers":
                attends = any(other.startswith(f"up_blocks.{block}.attentions.") for other in tensors)
                return f"output_blocks.{first + layers}.{2 if attends else 1}.{rest}"
            at = first + int(index) + (1 if side == "down_blocks" else 0)
            blocks = "input_blocks" if side == "down_blocks" else "output_blocks"
            place = f"{blocks}.{at}.{1 if kind == 'attentions' else 0}"
        if kind == "resnets":
            layer, _, end = rest.partition(".")
            rest = f"{_RESNET[layer]}.{end}"
        return f"{place}.{rest}"

    return {name(key): value for key, value in tensors.items()}


_VAE = (
    (r"^(encoder|decoder)\.mid_block\.resnets\.0\.", r"\1.mid.block_1."),
    (r"^(encoder|decoder)\.mid_block\.resnets\.1\.", r"\1.mid.block_2."),
    (r"^(encoder|decoder)\.mid_block\.attentions\.0\.", r"\1.mid.attn_1."),
    (r"^encoder\.down_blocks\.(\d)\.resnets\.(\d)\.", r"encoder.down.\1.block.\2."),
    (r"^encoder\.down_blocks\.(\d)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"^decoder\.up_blocks\.0\.", "decoder.up.3."),
    (r"^decoder\.up_blocks\.1\.", "decoder.up.2."),
    (r"^decoder\.up_blocks\.2\.", "decoder.up.1."),
    (r"^decoder\.up_blocks\.3\.", "decoder.up.0."),
    (r"\.resnets\.(\d)\.", r".block.\1."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_([qkv])\.", r"attn_1.\1."),
    (r"attn_1\.to_out\.0\.", "attn_1.proj_out."),
)


def vae_names(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Of `AutoencoderKL` with four levels; its attention's layers are convolutions in the original."""
    made = {}
    for key, value in tensors.items():
        for pattern, original in _VAE:
            key = re.sub(pattern, original, key)
        attends = "attn_1" in key and value.ndim == 2
        made[key] = value[..., None, None] if attends else value
    return made


_WAN = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".o."),
    (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."),
    (".norm2.", ".norm3."),
)


def wan_names(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Of `WanTransformer3DModel`."""
    made = {}
    for key, value in tensors.items():
        if key == "scale_shift_table":
            key = "head.modulation"
        for own, original in _WAN:
            key = key.replace(own, original)
        made[key.replace("scale_shift_table", "modulation")] = value
    return made
