"""Reading a pipeline folder strictly: what is missing, unexpected or misshapen is an error that names it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .._readers import read_json
from ..errors import CheckpointError, first_line, listed
from .state_dicts import refuse

if TYPE_CHECKING:
    import torch

__all__ = [
    "CARD",
    "INDEX",
    "SHARED",
    "aligned",
    "expert_names",
    "load_component",
    "load_strictly",
    "load_tokenizer",
    "read_config",
    "read_model_index",
]

SHARED = ("vae", "text_encoder", "tokenizer")
"""What all experts of a pipeline share."""

INDEX = "model_index.json"

CARD = "README.md"
"""What says to people, and to the hub, what a folder is."""


def read_config(file: Path) -> dict[str, Any]:
    """A JSON config.

    Raises:
        CheckpointError: it isn't there, isn't JSON, or describes a model that no machine can hold.
    """
    config = read_json(file)
    check_sizes(config, file)
    return config


def check_sizes(config: Mapping[str, Any], where: object) -> None:
    """Refuse a model that no machine can hold, before anything is made of its config.

    Raises:
        CheckpointError: more than a thousand layers, or any other whole number above a hundred million.
    """
    for name, value in config.items():
        most = 1000 if "layer" in name and "norm" not in name else 10**8
        level = [value]
        while level:
            item = level.pop()
            if isinstance(item, (list, tuple)):
                level += item
            elif isinstance(item, dict):
                check_sizes(item, where)
            elif isinstance(item, int) and abs(item) > most:
                raise CheckpointError(f"{where}: {name} is more than {most:,}, which is refused")


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
        raise CheckpointError(f"{folder / INDEX} does not name {listed(absent)}")
    empty = [name for name in required if not any((folder / name).glob("*"))]
    if empty:
        raise CheckpointError(f"{folder} is incomplete: it has no {listed([f'{name}/' for name in empty])}")
    return index


def expert_names(index: dict[str, Any]) -> list[str]:
    """A pipeline folder's experts, from noise to data: as `experts` in its index says, else Sol before Lune
    before any others."""
    found = [key.removeprefix("unet_") for key in index if key.startswith("unet_")]
    order = index.get("experts") or ["sol", "lune", *sorted(found)]
    order = order.split(", ") if isinstance(order, str) else order
    if not isinstance(order, list) or not all(isinstance(name, str) for name in order):
        raise CheckpointError(f"{INDEX}: experts must be names, a list or a text with commas, got {order!r}")
    return [name for name in dict.fromkeys([*order, *sorted(found)]) if name in found]


def load_strictly(
    load: Callable[..., Any],
    source: str | os.PathLike,
    model: str,
    *,
    others: Sequence[str] = (),
    **kwargs: Any,
) -> Any:
    """What a `from_pretrained` of diffusers or transformers makes of a source, strict.

    Args:
        load: it.
        source: folder or hub id.
        model: class, for the message.
        others: beginnings of names that belong to parts of a larger model, which are left out.
        kwargs: for it.

    Raises:
        CheckpointError: unreadable files; missing, unexpected or misshapen tensors, up to five named of each.
    """
    try:
        with _without_first_values():
            loaded, info = load(source, output_loading_info=True, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{source} cannot be loaded as {model}: {first_line(error)}") from error
    kinds = ("missing", "unexpected", "mismatched")
    found = {kind: sorted(info.get(f"{kind}_keys") or [], key=str) for kind in kinds}
    found["unexpected"] = [name for name in found["unexpected"] if not str(name).startswith(tuple(others))]
    refuse(str(source), model, found)
    return loaded


@contextmanager
def _without_first_values() -> Iterator[None]:
    """Modules that are made in the body leave their parameters as they come: all are in the file, or it is
    refused. Libraries make them without memory, where torch takes long to fill nothing."""
    from torch.nn import init

    fills = {name: fn for name, fn in vars(init).items() if name.endswith("_") and name[0] != "_"}
    for name in fills:
        setattr(init, name, lambda tensor, *_, **__: tensor)
    try:
        yield
    finally:
        for name, fill in fills.items():
            setattr(init, name, fill)


def load_component(cls: Any, folder: Path, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    """`cls.from_pretrained(folder)` from safetensors, strict, in evaluation mode.

    Args:
        cls: a diffusers or transformers model class.
        folder: config and weights.
        dtype: of the weights; by default what their library chooses.
        kwargs: for `from_pretrained`, and `others` as `load_strictly` takes it.

    Raises:
        CheckpointError: as `load_strictly`.
    """
    from diffusers import ModelMixin

    if dtype is not None:
        # Older diffusers' models know `torch_dtype` alone; to transformers that is the old name.
        kwargs["torch_dtype" if issubclass(cls, ModelMixin) else "dtype"] = dtype
    model = load_strictly(cls.from_pretrained, folder, cls.__name__, use_safetensors=True, **kwargs)
    for parameter in model.parameters():
        parameter.data = aligned(parameter.data)
    return model.eval()


def load_tokenizer(cls: Any, folder: Path) -> Any:
    """`cls.from_pretrained(folder)` of transformers.

    Raises:
        CheckpointError: unreadable files.
    """
    try:
        return cls.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder} cannot be loaded as {cls.__name__}: {first_line(error)}") from error


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor at an address as torch's own allocator gives, a copy if need be. In a mapped file it may lie
    anywhere, and a CPU's matrix products round differently there, so saved weights would not make the same
    image to the last bit."""
    return tensor if tensor.device.type != "cpu" or tensor.data_ptr() % 64 == 0 else tensor.clone()
