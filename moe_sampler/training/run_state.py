"""A run's tensors in and out of checkpoints: the same on one process, DDP or FSDP, compiled or not."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from ..errors import CheckpointError

__all__ = ["generator_tensors", "model_tensors", "optimizer_tensors", "set_generators", "set_tensors"]

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SEPARATOR = "|"


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by its plain name, whole, on the CPU; {} but on process 0 under FSDP."""
    found: dict[str, Any] = get_model_state_dict(model, options=_FULL)
    return found


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments, `<parameter>|<moment>`; none of parameters that never had a gradient."""
    state: dict[str, Any]
    _, state = get_state_dict(model, optimizer, options=_FULL)
    return {
        f"{name}{_SEPARATOR}{moment}": torch.as_tensor(value)
        for name, moments in state.get("state", {}).items()
        if moments.get("step", 1) > 0
        for moment, value in moments.items()
    }


def set_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
) -> None:
    """Fill model and optimizer.

    shapes: of the model's tensors as it holds them; under FSDP what was a scalar is a vector of size 1.

    Raises:
        CheckpointError: tensors of another model; the first few are named.
    """
    wrong = sorted(set(shapes) ^ set(weights)) or [
        name for name, shape in shapes.items() if shape.numel() != weights[name].numel()
    ]
    if wrong:
        raise CheckpointError(f"the checkpoint is of another model, to begin with in {', '.join(wrong[:5])}")
    own: dict[str, Any]
    _, own = get_state_dict(model, optimizer, options=StateDictOptions(cpu_offload=True))
    groups, state = own["param_groups"], {}
    for key, value in moments.items():
        name, _, moment = key.rpartition(_SEPARATOR)
        same = value.numel() == shapes[name].numel() and moment != "step"
        state.setdefault(name, {})[moment] = value.reshape(shapes[name]) if same else value
    for name, own_moments in own["state"].items():
        if name not in state:  # Never had a gradient: as good as new.
            state[name] = {m: torch.zeros(v.shape, dtype=v.dtype) for m, v in own_moments.items()}
    weights = {name: tensor.reshape(shapes[name]) for name, tensor in weights.items()}
    set_state_dict(
        model,
        optimizer,
        model_state_dict=dict(weights),
        optim_state_dict={"state": state, "param_groups": groups},
        options=StateDictOptions(full_state_dict=True),
    )
    # In the layout of their parameters, such as channels last, which AdamW's rounding depends on.
    for parameter, own_moments in optimizer.state.items():
        for moment, value in own_moments.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                own_moments[moment] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def generator_tensors() -> tuple[dict[str, Tensor], dict[str, str]]:
    """(States of torch's, NumPy's and Python's global generators, what of them is no tensor).

    Training draws from none of them, but a model's dropout does, and so may what a task calls.
    """
    numpy_state: Any = np.random.get_state()
    kind, keys, *numpy_rest = numpy_state
    version, words, gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "python": torch.tensor(words, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    rest = {"numpy": [kind, *numpy_rest], "python": [version, gauss]}
    return tensors, {"rest": json.dumps(rest)}


def set_generators(tensors: Mapping[str, Tensor], rest: str) -> None:
    """What `generator_tensors` took."""
    others: dict[str, Any] = json.loads(rest)
    torch.set_rng_state(tensors["torch"])
    kind, *numpy_rest = others["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *numpy_rest))
    version, gauss = others["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
