"""What tells two models apart: every name, dtype, shape and byte; or the weights, in whatever precision."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from torch import nn

from moe_sampler.loading.fingerprint import fingerprint, portable_fingerprint, same_weights


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


def network(seed=0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48), nn.Linear(48, 8))
    model.register_buffer("places", torch.arange(5))
    return model


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("loaded", DTYPES)
@pytest.mark.parametrize("in_file", DTYPES)
def test_weights_are_known_in_every_precision(in_file, loaded):
    """As a file has them, or rounded once more when they were loaded."""
    wanted = portable_fingerprint(network().to(in_file))
    assert same_weights(wanted, portable_fingerprint(network().to(in_file).to(loaded)))
    assert same_weights(portable_fingerprint(network().to(loaded)), wanted)
    assert not same_weights(wanted, portable_fingerprint(network(1).to(loaded)))
    tuned = network()
    with torch.no_grad():
        tuned[0].weight += 0.02 * tuned[0].weight * torch.randn(48, 32)
    assert not same_weights(wanted, portable_fingerprint(tuned.to(loaded)))
    other = network()
    other.places[0] = 3
    assert not same_weights(wanted, portable_fingerprint(other.to(loaded)))


def test_in_one_precision_every_bit_counts():
    changed = network()
    with torch.no_grad():
        changed[0].weight[3, 3] += 1e-6
    assert not same_weights(portable_fingerprint(network()), portable_fingerprint(changed))
    assert same_weights(fingerprint(network()), portable_fingerprint(network()))
    assert not same_weights(fingerprint(network()), portable_fingerprint(changed))
