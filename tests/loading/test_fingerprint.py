"""What tells two models apart: every name, dtype, shape and byte, and nothing else."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

from moe_sampler.loading.fingerprint import fingerprint


def made(first="a", second="b", shape=(2, 3), dtype=torch.float32, change=0.0) -> nn.Module:
    model = nn.Module()
    values = torch.arange(6.0)
    values[5] += change
    model.register_parameter(first, nn.Parameter(values.reshape(shape).to(dtype)))
    model.register_buffer(second, torch.ones(2))
    return model


def test_everything_of_a_model_counts():
    kinds = [made(), made("c"), made("b", "a"), made(shape=(3, 2)), made(shape=(6,)), made(change=1e-6)]
    kinds += [made(dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)]
    assert len({fingerprint(model) for model in kinds}) == len(kinds)


def test_nothing_else_does():
    model = made()
    wanted = fingerprint(model)
    assert fingerprint(made()) == wanted
    model.a.data = model.a.data.t().contiguous().t()  # another layout
    model.requires_grad_(False).eval()
    model.register_buffer("of no file", torch.ones(1), persistent=False)
    assert fingerprint(model) == wanted
    reordered = nn.Module()
    reordered.register_buffer("b", torch.ones(2))
    reordered.register_parameter("a", made().a)
    assert fingerprint(reordered) == wanted


def test_it_is_the_same_in_other_versions():
    """Caches and runs of training that exist are recognised by it."""
    rows = (
        (["a", "torch.float32", [2, 3]], torch.arange(6.0)),
        (["b", "torch.float32", [2]], torch.ones(2)),
    )
    whole = b"".join(json.dumps(row).encode() + values.numpy().tobytes() for row, values in rows)
    assert fingerprint(made()) == hashlib.sha256(whole).hexdigest()
    assert fingerprint(nn.Module()) == hashlib.sha256().hexdigest()
