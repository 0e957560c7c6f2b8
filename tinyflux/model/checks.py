"""Checks of what a student is given, before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_inputs"]


def check_inputs(
    config: Mapping[str, Any],
    size: tuple[int, int] | None,
    *,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    img_ids: Tensor | None,
    txt_ids: Tensor | None,
    **others: Tensor | None,
) -> tuple[int, int] | None:
    """The size (H, W) of the latents, or None where nothing needs it; see `TinyFlux.forward` for the rest.

    Raises:
        ValueError: shapes that don't fit each other or the model, real features without their expert.
    """
    latents, text = hidden_states, encoder_hidden_states
    if latents.ndim != 3 or text.ndim != 3:
        raise ValueError(
            "hidden_states and encoder_hidden_states must have shapes [B, N, C] and [B, L, D], got "
            f"{list(latents.shape)} and {list(text.shape)}"
        )
    (batch, tokens, _), length, side = latents.shape, text.shape[1], config["sol_spatial_size"]
    expected = {
        "hidden_states": (batch, tokens, config["in_channels"]),
        "encoder_hidden_states": (batch, length, config["joint_attention_dim"]),
        "pooled_projections": (batch, config["pooled_projection_dim"]),
        "encoder_attention_mask": (batch, length),
        "drop_text": (batch,),
        "lune_features": (batch, config["lune_expert_dim"]),
        "sol_stats": (batch, 3),
        "sol_spatial": (batch, side, side),
        "lune_mask": (batch,),
        "sol_mask": (batch,),
        "lune_kept": (batch, config["lune_hidden_dim"]),
    }
    inputs = {**others, "hidden_states": latents, "encoder_hidden_states": text}
    for name, shape in expected.items():
        given = inputs[name]
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(given.shape)}")
    if timestep.ndim and tuple(timestep.shape) != (batch,):
        raise ValueError(f"timestep must have shape [{batch}] or [], got {list(timestep.shape)}")
    for name, ids, count in (("img_ids", img_ids, tokens), ("txt_ids", txt_ids, length)):
        if ids is not None and (ids.ndim not in (2, 3) or tuple(ids.shape[-2:]) != (count, 3)):
            raise ValueError(f"{name} must have shape [{count}, 3] or [B, {count}, 3], got {list(ids.shape)}")
    for name, option in (
        ("lune_features", "use_lune_expert"),
        ("sol_stats", "use_sol_prior"),
        ("sol_spatial", "use_sol_prior"),
        ("lune_kept", "use_lune_expert"),
    ):
        if inputs[name] is not None and not config[option]:
            raise ValueError(f"{name} given, but this model has {option}=False")
    return _size(tokens, size, img_ids, config["use_sol_prior"])


def _size(
    tokens: int, size: tuple[int, int] | None, img_ids: Tensor | None, needed: bool
) -> tuple[int, int] | None:
    if size is not None:
        height, width = size
        if height < 1 or width < 1 or height * width != tokens:
            raise ValueError(f"size {height}×{width} is not that of {tokens} tokens")
        return height, width
    if img_ids is not None and not needed:
        return None
    side = math.isqrt(tokens)
    square = side * side == tokens
    # Reading positions back would make a GPU wait, and a compiled graph break.
    if square and img_ids is not None and img_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        ids = img_ids if img_ids.ndim == 2 else img_ids[0]
        square = (ids[-1, 1:] - ids[0, 1:]).tolist() == [side - 1, side - 1]
    if not square:
        raise ValueError(f"the {tokens} tokens aren't those of a square image: give size=(height, width)")
    return side, side
