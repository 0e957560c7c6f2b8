"""Strict loading of a pipeline folder: what is missing, unexpected or misshapen is an error that names it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

__all__ = ["COMPONENTS", "CheckpointError", "load_component", "read_config", "read_model_index"]

COMPONENTS = ("vae", "text_encoder", "tokenizer", "unet_sol", "unet_lune", "scheduler_sol", "scheduler_lune")
"""What a hybrid pipeline's folder holds."""

_INDEX = "model_index.json"


class CheckpointError(ValueError):
    """A model folder or file that cannot be used, with the reason."""


def _names(keys: Sequence[Any]) -> str:
    shown = ", ".join(str(key) for key in list(keys)[:5])
    return f"{shown} and {len(keys) - 5} more" if len(keys) > 5 else shown


def read_config(file: Path) -> dict[str, Any]:
    """A JSON config.

    Raises:
        CheckpointError: it isn't there or isn't JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


def read_model_index(folder: Path, required: Sequence[str] = COMPONENTS) -> dict[str, Any]:
    """The folder's `model_index.json`, after checking that every required component is there.

    Raises:
        CheckpointError: not a pipeline folder, or a component is missing from it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    if not (folder / _INDEX).is_file():
        raise CheckpointError(f"{folder} has no {_INDEX}: it is not a diffusers pipeline folder")
    index = read_config(folder / _INDEX)
    absent = [name for name in required if name not in index]
    if absent:
        raise CheckpointError(f"{folder / _INDEX} does not name {_names(absent)}")
    empty = [name for name in required if not any((folder / name).glob("*"))]
    if empty:
        raise CheckpointError(f"{folder} is incomplete: it has no {_names([f'{name}/' for name in empty])}")
    return index


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
    found = [f"{name.removesuffix('_keys')}: {_names(keys)}" for name, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f"{folder} does not hold the tensors of its {cls.__name__}; {'; '.join(found)}")
    return model.eval()
