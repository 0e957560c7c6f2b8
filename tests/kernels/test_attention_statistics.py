"""`attention_statistics` and `combine_statistics` against their definitions and a recorded example."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.library import opcheck

from moe_sampler.kernels.attention import (
    AttentionStatistics,
    attention_statistics,
    combine_statistics,
)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "sol_attention_stats.safetensors"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# batch, heads, height, width, head size
SHAPES = [
    pytest.param((2, 1, 1, 2, 8), id="two tokens, one head"),
    pytest.param((2, 3, 3, 5, 8), id="smaller than a tile, odd, head size of the demo experts"),
    pytest.param((1, 2, 1, 37, 16), id="prime, one row, more than one tile of keys"),
    pytest.param((2, 2, 8, 8, 40), id="whole tiles, head size in two chunks"),
    pytest.param((1, 2, 9, 11, 20), id="several tiles and a tail, head size not a multiple of 8"),
    pytest.param((1, 2, 12, 8, 80), id="head size of SD1.5's second level"),
    pytest.param((1, 1, 4, 16, 160), id="head size of SD1.5's third level"),
]


def views(generator, batch, heads, height, width, size, dtype, spread=2.0):
    """q and k as attention layers have them: views of [B, N, heads·head size]."""
    shape = batch, height * width, heads, size
    return [(torch.randn(shape, generator=generator) * spread).to(dtype).transpose(1, 2) for _ in range(2)]


def definition(q, k, height, width, scale=None):
    """Entropy, locality and received attention from the whole attention matrix, in the inputs' precision."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    p = torch.softmax(q @ k.transpose(-1, -2) * scale, -1).mean(1)
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    distance = (places[:, None] - places[None]).square().sum(-1).sqrt()
    entropy = -torch.xlogy(p, p).sum(-1).mean(-1) / math.log(height * width)
    locality = 1 - (p * distance.to(p.dtype)).sum(-1).mean(-1) / distance.max().to(p.dtype)
    return entropy, locality, p.sum(1)


def run(body, q, k, height, width, **options):
    def move(x):
        return x.transpose(1, 2).to(body.device).transpose(1, 2)

    return attention_statistics(move(q), move(k), height, width, backend=body.backend, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics(body, generator, assert_within_rule, shape, dtype):
    q, k = views(generator, *shape, dtype)
    assert shape[1] == 1 or shape[2] * shape[3] == 1 or not q.is_contiguous()
    results = run(body, q, k, *shape[2:4])
    references = definition(q.double(), k.double(), *shape[2:4])
    eager = definition(q, k, *shape[2:4])
    for result, low, reference in zip(results, eager, references, strict=True):
        assert result.dtype == torch.float32
        assert_within_rule(result, low, reference, cap=5e-6)
    torch.testing.assert_close(results.received.mean(1).cpu(), torch.ones(shape[0]), rtol=0, atol=1e-5)


def test_all_samples_at_once_and_one_by_one_agree(body, generator):
    q, k = views(generator, 3, 2, 5, 7, 8, torch.float32)
    together = run(body, q, k, 5, 7)
    for i in range(3):
        alone = run(body, q[i : i + 1], k[i : i + 1], 5, 7)
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b[i : i + 1], rtol=1e-6, atol=1e-6)


def test_the_twin_in_chunks(monkeypatch, generator):
    """As with many tokens: one sample at a time, its queries in chunks that cross the grid's rows."""
    q, k = views(generator, 3, 2, 5, 7, 8, torch.float16)
    whole = attention_statistics(q, k, 5, 7)
    for elements in (1, 2 * 35 * 6, 2 * 35 * 35 * 2):
        monkeypatch.setattr(sys.modules[attention_statistics.__module__], "_TWIN_ELEMENTS", elements)
        for a, b in zip(attention_statistics(q, k, 5, 7), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("scale", [0.5, 0.0, -0.7])
def test_scale(body, generator, scale):
    q, k = views(generator, 1, 2, 4, 9, 16, torch.float32)
    results = run(body, q, k, 4, 9, scale=scale)
    for result, reference in zip(results, definition(q.double(), k.double(), 4, 9, scale), strict=True):
        torch.testing.assert_close(result.cpu().double(), reference, rtol=5e-6, atol=5e-6)
    if scale == 0.0:
        torch.testing.assert_close(results.entropy.cpu(), torch.ones(1), rtol=0, atol=1e-6)


def test_attention_that_is_all_on_one_key(body):
    """Probabilities of exactly 0 and 1: 0·ln 0 counts as 0."""
    q = torch.eye(32).view(1, 1, 32, 32) * 1000
    entropy, locality, received = run(body, q, q, 4, 8, scale=1.0)
    assert entropy.item() == 0 and locality.item() == 1
    assert torch.equal(received.cpu(), torch.ones(1, 32))


def test_one_token_attends_to_itself(body):
    q = torch.ones(2, 3, 1, 8)
    entropy, locality, received = run(body, q, q, 1, 1)
    assert entropy.tolist() == [0, 0] and locality.tolist() == [1, 1] and received.tolist() == [[1], [1]]


def test_empty_batch(body):
    q = torch.ones(0, 3, 4, 8)
    assert [r.shape for r in run(body, q, q, 2, 2)] == [(0,), (0,), (0, 4)]


def test_nan_and_overflow_stay_visible(body, generator):
    q, k = views(generator, 2, 2, 5, 7, 8, torch.float16)
    q[1, 0, 3, 2] = math.nan
    for result in run(body, q, k, 5, 7):
        assert torch.isfinite(result[0]).all() and torch.isnan(result[1]).all()
    q[1, 0, 3, 2] = math.inf
    assert torch.isnan(run(body, q, k, 5, 7).entropy[1])


def test_float16_logits_do_not_overflow(body):
    """Products whose sum passes 65504."""
    q = torch.full((1, 1, 33, 64), 60.0).half()
    entropy, _, received = run(body, q, q, 3, 11)
    torch.testing.assert_close(entropy.cpu(), torch.ones(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(received.cpu(), torch.ones(1, 33), rtol=0, atol=2e-6)


def test_same_bits_every_time(body, generator):
    q, k = views(generator, 2, 2, 6, 9, 16, torch.bfloat16)
    first, second = run(body, q, k, 6, 9), run(body, q, k, 6, 9)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def recorded():
    tensors = load_file(FIXTURE)
    names = sorted(name[: -len(".q")] for name in tensors if name.endswith(".q"))
    layers = [(tensors[f"{n}.q"], tensors[f"{n}.k"]) for n in names]
    sizes = [tuple(tensors[f"{n}.hw"].tolist()) for n in names]
    return layers, sizes, tensors["out.stats"], tensors["out.spatial"]


def test_recorded_features(body):
    layers, sizes, stats, spatial = recorded()
    results = [run(body, q, k, *size) for (q, k), size in zip(layers, sizes, strict=True)]
    result_stats, result_spatial = combine_statistics(results, sizes)
    torch.testing.assert_close(result_stats.cpu(), stats, rtol=0, atol=1e-5)
    torch.testing.assert_close(result_spatial.cpu(), spatial, rtol=0, atol=1e-6)


def test_combine_statistics_by_hand(generator):
    sizes = [(16, 16), (8, 4)]
    layers = [
        AttentionStatistics(*torch.rand(2, 3, generator=generator), torch.rand(3, h * w, generator=generator))
        for h, w in sizes
    ]
    stats, spatial = combine_statistics(layers, sizes, map_size=4)
    entropy = (layers[0].entropy + layers[1].entropy) / 2
    locality = (layers[0].locality + layers[1].locality) / 2
    torch.testing.assert_close(stats, torch.stack([locality, entropy, 1 - entropy], -1))
    # 16 → 4 samples the middle two of four; 8 → 4 averages pairs; 4 → 4 keeps.
    big = layers[0].received.view(3, 4, 4, 4, 4)[:, :, 1:3, :, 1:3].mean((2, 4))
    small = layers[1].received.view(3, 4, 2, 4).mean(2)
    expected = (big + small) / (big + small).sum((1, 2), keepdim=True)
    torch.testing.assert_close(spatial, expected)
    torch.testing.assert_close(spatial.sum((1, 2)), torch.ones(3))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: {"layers": []}, "at least one"),
        (lambda a: {"sizes": a["sizes"] * 2}, "as many"),
        (lambda a: {"sizes": [(2, 3)]}, r"layers\[0\].received must have shape \[2, 6\]"),
        (lambda a: {"map_size": 0}, "map_size must be at least 1"),
    ],
)
def test_combine_refuses(change, message):
    arguments = {
        "layers": [AttentionStatistics(torch.ones(2), torch.ones(2), torch.ones(2, 4))],
        "sizes": [(2, 2)],
    }
    with pytest.raises(ValueError, match=message):
        combine_statistics(**arguments | change(arguments))


Q = torch.ones(1, 2, 6, 8)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((Q[0], Q[0], 2, 3), {}, ValueError, r"q must be \[B, heads, N, head size\]"),
        ((Q, Q[:, :, :5], 2, 3), {}, ValueError, "k must have shape"),
        ((Q, Q, 2, 4), {}, ValueError, "q has 6 tokens, height × width is 2 × 4"),
        ((Q, Q, -2, -3), {}, ValueError, "height × width is -2 × -3"),
        ((Q[:, :0], Q[:, :0], 2, 3), {}, ValueError, "at least one head"),
        ((Q.double(), Q.double(), 2, 3), {}, TypeError, "q must be float32 or float16 or bfloat16"),
        ((Q, Q.half(), 2, 3), {}, TypeError, "k must be float32, got float16"),
        ((Q, Q.to("meta"), 2, 3), {}, ValueError, "k is on meta"),
        ((Q.mT.contiguous().mT, Q, 2, 3), {}, ValueError, "q must be contiguous in its last dimension"),
        ((Q, Q.mT.contiguous().mT, 2, 3), {}, ValueError, "k must be contiguous in its last dimension"),
        ((Q.clone().requires_grad_(), Q, 2, 3), {}, ValueError, "q requires grad"),
        ((Q, Q.clone().requires_grad_(), 2, 3), {}, ValueError, "k requires grad"),
        ((Q, Q, 2, 3), {"scale": math.nan}, ValueError, "scale must be finite, got nan"),
        ((Q, Q, 2, 3), {"backend": "cuda"}, ValueError, "backend must be None"),
    ],
)
def test_refusals(arguments, options, error, message):
    with pytest.raises(error, match=message):
        attention_statistics(*arguments, **options)


@pytest.mark.interpreter
def test_the_kernel_refuses_heads_it_cannot_hold():
    q = torch.ones(1, 1, 2, 264)
    with pytest.raises(ValueError, match="backend='torch' serves it"):
        attention_statistics(q, q, 1, 2, backend="triton")
    assert attention_statistics(q, q, 1, 2, backend="torch").entropy.item() == pytest.approx(1)


def test_no_grad_serves_tensors_that_require_grad():
    with torch.no_grad():
        assert attention_statistics(Q.clone().requires_grad_(), Q, 2, 3).entropy.item() == pytest.approx(1)


def test_opcheck(generator):
    operator = torch.ops.moe_sampler.attention_statistics.default
    for dtype in DTYPES:
        opcheck(operator, (*views(generator, 2, 2, 3, 5, 8, dtype), 3, 5, 0.3))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(generator, compiler):
    q, k = views(generator, 2, 2, 4, 4, 8, torch.float32)

    def features(q, k):
        return combine_statistics([attention_statistics(q * 2, k, 4, 4)], [(4, 4)])

    compiled = torch.compile(features, fullgraph=True, backend=compiler)(q, k)
    torch.testing.assert_close(compiled, features(q, k), rtol=1e-5, atol=1e-6)


# The 16 self-attention layers of SD1.5 on 64 × 64 latents: side of the grid, head size.
SD15 = [(64, 40)] * 5 + [(32, 80)] * 5 + [(16, 160)] * 5 + [(8, 160)]

MEMORY = """
import torch
from moe_sampler.kernels.attention import attention_statistics

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

def views(side, size):
    return [torch.randn(1, side * side, 8, size).transpose(1, 2) for _ in range(2)]

attention_statistics(*views(8, 160), 8, 8)  # loads what the first call loads
q, k = views(64, 40)
before = peak()
attention_statistics(q, k, 64, 64)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
def test_memory_of_the_twin():
    """The attention of these 4096 tokens is 512 MiB; the statistics need less than 64."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 64, f"{result.stdout.strip()} MiB"
