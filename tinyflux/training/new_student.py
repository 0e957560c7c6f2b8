"""The student that a run begins with: new, in the sizes that its data and settings say, or a trained one."""

from __future__ import annotations

from typing import Any

import torch

from moe_sampler.tinyflux.features.cache_read import FeatureCache
from moe_sampler.tinyflux.model.config import TinyFluxConfig
from moe_sampler.tinyflux.model.tinyflux import TinyFlux
from moe_sampler.tinyflux.training.settings import ModelSettings, StudentSettings
from moe_sampler.training import SettingsError

__all__ = ["SIZES", "student_of"]

_PRESETS = {"demo": TinyFluxConfig.demo, "deep": TinyFluxConfig.deep, "deep_v4": TinyFluxConfig.deep_v4}
SIZES = {
    "in_channels": ("latents", 0),
    "joint_attention_dim": ("prompt_embeds", -1),
    "pooled_projection_dim": ("pooled_prompt_embeds", -1),
    "lune_expert_dim": ("lune", -1),
    "sol_spatial_size": ("sol_maps", -1),
}
"""Settings of a student that its data decide: (a cache's tensor, the axis of a sample's)."""


def student_of(settings: StudentSettings, cache: FeatureCache) -> TinyFlux:
    """In float32; a new one's weights follow from the run's seed.

    Raises:
        CheckpointError: one to continue that can't be loaded.
        SettingsError: sizes that contradict each other.
    """
    wanted = settings.model
    if wanted.init_from is not None:
        return TinyFlux.from_pretrained(wanted.init_from).float()
    config = _config(wanted, cache)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.training.seed)
        return TinyFlux(config)


def _config(wanted: ModelSettings, cache: FeatureCache) -> TinyFluxConfig:
    make, given = _PRESETS[wanted.preset], wanted.changes()
    shapes = {name: shape[1:] for name, shape in cache.shapes.items()}
    of_data = {name: shapes[tensor][axis] for name, (tensor, axis) in SIZES.items() if tensor in shapes}
    try:
        return make(**{**of_data, **given, **_widths(make(), given)})
    except ValueError as error:
        raise SettingsError(f"model: {error}") from None


def _widths(preset: TinyFluxConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The width, the heads, a head's width and its parts, of what was given of them."""
    width, heads = given.get("hidden_size"), given.get("num_attention_heads")
    head = given.get("attention_head_dim")
    if width is None and heads is None and head is None:
        return {}
    if head is None:
        head = width // heads if width and heads else preset.attention_head_dim
    if heads is None:
        heads = max(1, width // head) if width else preset.num_attention_heads
    found = {"hidden_size": width or heads * head, "num_attention_heads": heads, "attention_head_dim": head}
    if "axes_dims_rope" not in given and head != preset.attention_head_dim:
        index = head // 16 * 2
        row = (head - index) // 4 * 2
        found["axes_dims_rope"] = (index, row, head - index - row)
    return found
