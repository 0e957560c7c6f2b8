"""Reading a pipeline folder strictly: what is missing, unexpected or misshapen is an error that names it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

__all__ = [
    "COMPONENTS",
    "CheckpointError",
    "expert_names",
    "load_component",
    "names",
    "read_config",
    "read_model_index",
]

SHARED = ("vae", "text_encoder", "tokenizer")
"""What all experts of a pipeline share."""

COMPONENTS = (*SHARED, "unet_sol", "unet_lune", "scheduler_sol", "scheduler_lune")
"""What the folder of a pipeline of Sol and Lune holds."""

INDEX = "model_index.json"


class CheckpointError(ValueError):
    """A model folder or file that cannot be used, with the reason."""


def names(keys: Sequence[Any]) -> str:
    """The first five of some names, and how many more there are."""
    shown = ", ".join(str(key) for key in list(keys)[:5])
    return f"{shown} and {len(keys) - 5} more" if len(keys) > 5 else shown


def read_config(file: Path) -> dict[str, Any]:
    """A JSON config.

    Raises:
        CheckpointError: it isn't there or isn't JSON.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} cannot be read: it holds no JSON object")
    return config


def read_model_index(folder: Path, required: Sequence[str] | None = None) -> dict[str, Any]:
    """The folder's `model_index.json`, after checking that every required component is there.

    Args:
        folder: of a diffusers pipeline.
        required: components; by default what the experts it names need, and of those at least one.

    Raises:
        CheckpointError: not a pipeline folder, or a component is missing from it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} has no {INDEX}: it is not a diffusers pipeline folder")
    index = read_config(folder / INDEX)
    if required is None:
        experts = expert_names(index)
        if not experts:
            raise CheckpointError(f"{folder / INDEX} names no unet_sol, unet_lune or other expert")
        required = [*SHARED, *(f"{part}_{name}" for name in experts for part in ("unet", "scheduler"))]
    absent = [name for name in required if name not in index]
    if absent:
        raise CheckpointError(f"{folder / INDEX} does not name {names(absent)}")
    empty = [name for name in required if not any((folder / name).glob("*"))]
    if empty:
        raise CheckpointError(f"{folder} is incomplete: it has no {names([f'{name}/' for name in empty])}")
    return index


def expert_names(index: dict[str, Any]) -> list[str]:
    """A pipeline folder's experts, from noise to data: as `experts` in its index says, else Sol before Lune
    before any others."""
    found = [key.removeprefix("unet_") for key in index if key.startswith("unet_")]
    order = index.get("experts") or ["sol", "lune", *sorted(found)]
    return [name for name in dict.fromkeys([*order, *sorted(found)]) if name in found]


def load_component(cls: type, folder: Path, **kwargs: Any) -> torch.nn.Module:
    """`cls.from_pretrained(folder)` from safetensors, strict.

    Args:
        cls: a diffusers or transformers model class.
        folder: config and weights.
        kwargs: for `from_pretrained`.

    Raises:
        CheckpointError: unreadable files; missing, unexpected or misshapen tensors, up to five named of each.
    """
    try:
        model, info = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{folder} cannot be loaded as {cls.__name__}: {reason[0]}") from error
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    problems = {name: sorted(info.get(name) or [], key=str) for name in kinds}
    found = [f"{name.removesuffix('_keys')}: {names(keys)}" for name, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f"{folder} does not hold the tensors of its {cls.__name__}; {'; '.join(found)}")
    for parameter in model.parameters():
        parameter.data = aligned(parameter.data)
    return model.eval()


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor at an address as torch's own allocator gives, a copy if need be. In a mapped file it may lie
    anywhere, and a CPU's matrix products round differently there, so saved weights would not make the same
    image to the last bit."""
    return tensor if tensor.device.type != "cpu" or tensor.data_ptr() % 64 == 0 else tensor.clone()
