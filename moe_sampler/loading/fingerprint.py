"""What tells two models apart, whatever their files are called."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["fingerprint", "portable_fingerprint", "same_weights"]

_ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
"""The largest relative error of a number that is rounded to a format."""
_FINEST = 2.0**-24
"""float16's steps near zero."""


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, flat, shape in _flat_tensors(model):
        digest.update(json.dumps([name, str(flat.dtype), shape]).encode())
        digest.update(_bytes_of(flat))
    return digest.hexdigest()


def portable_fingerprint(model: nn.Module) -> str:
    """As `fingerprint`, but for `same_weights` to compare with that of another precision.

    "bytes:layout:formats:values": `fingerprint`; SHA-256 of names and shapes, and the bytes of tensors that
    hold no floats; dtypes of those that do; two values of each of them, as float32 in base64.
    """
    layout, floats = hashlib.sha256(), []
    for name, flat, shape in _flat_tensors(model):
        layout.update(json.dumps([name, shape]).encode())
        if flat.is_floating_point():
            floats.append(flat)
        else:
            layout.update(_bytes_of(flat))
    formats = sorted({str(flat.dtype).removeprefix("torch.") for flat in floats})
    values = base64.b64encode(_spread(floats).tobytes()).decode()
    return ":".join((fingerprint(model), layout.hexdigest(), ",".join(formats), values))


def same_weights(one: str, other: str) -> bool:
    """Whether two portable fingerprints are of the same weights.

    In one precision to the bit. In two, as far as the coarser one's rounding shows: weights that differ by
    less than that cannot be told apart.
    """
    parts, others = one.split(":"), other.split(":")
    if len(parts) < 4 or len(others) < 4 or parts[2] == others[2]:  # older ones are the first part alone
        return parts[0] == others[0]
    if parts[1] != others[1]:
        return False
    ours, theirs = (np.frombuffer(base64.b64decode(p[3]), "<f4").astype(np.float64) for p in (parts, others))
    errors = sorted(_ROUNDING.get(name, 0.0) for p in (parts, others) for name in p[2].split(","))
    allowed = sum(errors[-2:]) * np.maximum(abs(ours), abs(theirs)) + _FINEST
    return bool((abs(ours - theirs) <= allowed).all())


def _flat_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, list[int]]]:
    for name, tensor in sorted(model.state_dict().items()):
        yield name, tensor.detach().to("cpu").contiguous().flatten(), list(tensor.shape)


def _bytes_of(flat: Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data


def _spread(floats: list[Tensor]) -> np.ndarray:
    """Values within every tensor, since training may have moved some of them alone."""
    found = [flat[[len(flat) // 3, 2 * len(flat) // 3]].float().numpy() for flat in floats if len(flat)]
    return np.concatenate([np.empty(0, np.float32), *found]).astype("<f4")
