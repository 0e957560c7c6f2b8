"""A student as upstream TinyFlux's `load_model` reads it: model.safetensors and its own config.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_sampler._files import whole_folder, write_text
from moe_sampler.tinyflux.model.config import TinyFluxConfig
from moe_sampler.tinyflux.model.tinyflux import TinyFlux

__all__ = ["export_student"]

_UPSTREAMS = (
    *("hidden_size", "num_attention_heads", "attention_head_dim", "in_channels", "patch_size"),
    *("joint_attention_dim", "pooled_projection_dim", "num_double_layers", "num_single_layers"),
    *("mlp_ratio", "axes_dims_rope", "use_lune_expert", "lune_expert_dim", "lune_hidden_dim"),
    *("lune_dropout", "freeze_lune", "use_sol_prior", "sol_spatial_size", "sol_hidden_dim"),
    *("sol_geometric_weight", "freeze_sol", "use_t5_vec"),
)
"""All that its config knows; it refuses any other key."""

_BEHAVIOUR = ("time_factor", "qk_norm", "head_temperature", "unit_mean_map", "null_condition")


def export_student(student: TinyFlux, folder: Path) -> list[str]:
    """Write the folder, whole or not at all.

    Returns:
        What upstream's own sampler does otherwise than this student's data were.

    Raises:
        ValueError: a student that upstream's model cannot be; it says in what.
        OSError: the folder exists and isn't empty, or can't be written.
    """
    config, published = student.config, TinyFluxConfig.deep_v4()
    others = [
        f"{name} {config[name]} (upstream: {getattr(published, name)})"
        for name in _BEHAVIOUR
        if config[name] != getattr(published, name)
    ]
    if others:
        raise ValueError(
            f"upstream's model has no {', '.join(others)}: only students of the preset deep_v4 can be "
            "exported"
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: give another folder")
    tensors = {name: tensor.contiguous() for name, tensor in _tensors(student)}
    values = {name: config[name] for name in _UPSTREAMS}
    with whole_folder(folder) as partial:
        save_file(tensors, partial / "model.safetensors", {"format": "pt"})
        write_text(partial / "config.json", json.dumps(values, indent=2) + "\n")
    return list(_notes(student))


def _tensors(student: TinyFlux) -> Iterator[tuple[str, Tensor]]:
    yield from student.state_dict().items()
    if student.sol_prior is not None and not student.config["sol_qk_scale"]:
        # Nothing uses them, but upstream's model holds them.
        heads = student.config["num_attention_heads"]
        yield "sol_prior.spatial_to_qk_scale.weight", torch.zeros(heads, 1)
        yield "sol_prior.spatial_to_qk_scale.bias", torch.ones(heads)


def _notes(student: TinyFlux) -> Iterator[str]:
    config = student.config
    if config["text_mask"]:
        yield "it was trained with the text's padding masked, which upstream's sampler doesn't do"
    if config["latent_shift"]:
        yield (
            f"its latents are (encoded - {config['latent_shift']:g}) * scale, but upstream's sampler decodes "
            "latents / scale: add the shift there"
        )
    if config["schedule"] != "data":
        yield "it was trained for steps that crowd near the noise; upstream's crowd near the data"
