"""What a self-attention layer looks at, without its attention matrix: Sol's features, layer by layer.

With p_h = softmax(q_h·k_hᵀ·scale) over the keys and p̄ = mean over heads of p_h, for N tokens on a grid:

    entropy     = −mean over queries of Σ_k p̄ ln p̄, over ln N
    locality    = 1 − mean over queries of Σ_k p̄·|place of query − place of key|, over the grid's diagonal
    received[k] = Σ over queries of p̄, the attention a key receives

p̄ ln p̄ needs the mean over heads first, so there are two streaming passes: the softmax's largest logit and sum
for every head and query, then p̄ tile by tile from logits computed again. Memory is O(N); in the second pass a
program owns keys and sees all queries, so every sum has one owner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_sampler.kernels import _jit
from moe_sampler.kernels._dispatch import FLOATS, Operator, check_tensor

if TYPE_CHECKING:
    import triton.language as tl

_LOG2_E = math.log2(math.e)
_BLOCK_K = 32
_MAX_HEAD_SIZE = 160  # the largest of Stable Diffusion; larger ones spill registers
_TWIN_ELEMENTS = 1 << 21  # logits the twin holds at a time: 8 MiB, which stays in cache


class AttentionStatistics(NamedTuple):
    """One layer's statistics. entropy, locality: float32 [B]. received: float32 [B, N], mean 1."""

    entropy: Tensor
    locality: Tensor
    received: Tensor


def _check(q: Tensor, k: Tensor, height: int, width: int, scale: float) -> None:
    if q.ndim != 4:
        raise ValueError(f"q must be [B, heads, N, head size], got shape {list(q.shape)}")
    check_tensor("q", q, q.device, FLOATS, strided=True)
    check_tensor("k", k, q.device, (q.dtype,), q.shape, strided=True)
    if height < 1 or width < 1 or q.shape[2] != height * width:
        raise ValueError(f"q has {q.shape[2]} tokens, height × width is {height} × {width}")
    if q.shape[1] < 1 or q.shape[3] < 1:
        raise ValueError(f"q must have at least one head of at least one number, got shape {list(q.shape)}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def _finish(
    negative_entropy: Tensor, distance: Tensor, received: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics from the sums of p̄ ln p̄ and of p̄·distance over all queries and keys."""
    tokens = height * width
    # A single token: both sums are 0 (or NaN), and what they are divided by would be 0.
    uniform = math.log(tokens) if tokens > 1 else 1.0
    diagonal = math.hypot(height - 1, width - 1) if tokens > 1 else 1.0
    entropy = negative_entropy.mul(-1.0 / (tokens * uniform))
    return entropy.float(), (1.0 - distance / (tokens * diagonal)).float(), received


def _twin(q: Tensor, k: Tensor, height: int, width: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, height, width, scale)
    batch, heads, tokens, _ = q.shape
    samples = max(1, min(batch, _TWIN_ELEMENTS // (heads * tokens * tokens)))
    chunk = max(1, min(tokens, _TWIN_ELEMENTS // (samples * heads * tokens)))
    device = q.device
    sums = torch.zeros(2, batch, dtype=torch.float64, device=device)
    received = torch.zeros(batch, tokens, device=device)
    logits_buffer = torch.empty(samples * heads * chunk * tokens, device=device)
    mean_buffer, spare_buffer = torch.empty(2, samples * chunk * tokens, device=device)
    y, x = torch.arange(height, device=device).float(), torch.arange(width, device=device).float()

    for sample in range(0, batch, samples):
        q_here = q[sample : sample + samples]
        k_here = k[sample : sample + samples].float().flatten(0, 1).contiguous()
        count = q_here.shape[0]
        for start in range(0, tokens, chunk):
            q_chunk = q_here[:, :, start : start + chunk].float().flatten(0, 1)
            queries = q_chunk.shape[1]
            p = logits_buffer[: count * heads * queries * tokens].view(-1, queries, tokens)
            torch.baddbmm(p, q_chunk, k_here.transpose(1, 2), beta=0, alpha=scale, out=p)
            torch.softmax(p, -1, out=p)
            mean = mean_buffer[: count * queries * tokens].view(count, queries, tokens)
            torch.mean(p.view(count, heads, queries, tokens), 1, out=mean)
            received[sample : sample + count] += mean.sum(1)

            spare = spare_buffer[: mean.numel()].view_as(mean)
            torch.clamp(mean, min=torch.finfo(torch.float32).tiny, out=spare).log_().mul_(mean)
            sums[0, sample : sample + count] += spare.sum((1, 2))

            index = torch.arange(start, start + queries, device=device)
            dy = (index // width).view(-1, 1, 1) - y.view(1, -1, 1)
            dx = (index % width).view(-1, 1, 1) - x
            distance = spare_buffer[: queries * tokens].view(queries, height, width)
            torch.add(dy.square_(), dx.square_(), out=distance).sqrt_()
            mean.mul_(distance.view(queries, tokens))
            sums[1, sample : sample + count] += mean.sum((1, 2))
    return _finish(sums[0], sums[1], received, height, width)


@_jit.jit
def _columns(
    ptr, start, rows, stride, FROM: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    """[BLOCK, WIDTH]: columns FROM … FROM + WIDTH − 1 of rows start …, zero where there are none."""
    row = tl.arange(0, BLOCK)
    column = FROM + tl.arange(0, WIDTH)
    offsets = row[:, None] * stride + column[None, :]
    mask = (start + row < rows)[:, None]
    if FROM + WIDTH > D:
        mask = mask & (column < D)[None, :]
    return tl.load(ptr + stride.to(tl.int64) * start + offsets, mask=mask, other=0.0)


@_jit.jit
def _chunks(
    ptr, start, rows, stride, D: tl.constexpr, CHUNK: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr
):
    """All columns of rows start …, as a tuple of tiles [BLOCK, CHUNK] and one [BLOCK, REST] for what is left.

    Chunks and rest are powers of two, so that 40 columns are 32 + 16 and not 64.
    """
    tiles = ()
    # Triton unrolls it; its class has no __iter__.
    for first in tl.static_range(0, D // CHUNK * CHUNK, CHUNK):  # pyright: ignore[reportGeneralTypeIssues]
        tiles += (_columns(ptr, start, rows, stride, first, CHUNK, D, BLOCK),)
    if REST:
        tiles += (_columns(ptr, start, rows, stride, D // CHUNK * CHUNK, REST, D, BLOCK),)
    return tiles


@_jit.jit
def _products(q, k, PRECISION: tl.constexpr):
    """float32 [queries, keys]: q·kᵀ from their chunks."""
    products = tl.dot(q[0], tl.trans(k[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(q)):  # pyright: ignore[reportGeneralTypeIssues] - likewise
        products = tl.dot(q[i], tl.trans(k[i]), products, input_precision=PRECISION)
    return products


@_jit.jit(
    do_not_specialize=("heads", "tokens", "q_batch", "q_head", "q_token", "k_batch", "k_head", "k_token")
)
def _softmax_rows_kernel(
    largest_ptr,
    weight_ptr,
    q_ptr,
    k_ptr,
    scale,
    share,
    heads,
    tokens,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    REST: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x = q·k·scale, where scale includes log2 e;  largest = max_k x;  weight = share / Σ_k 2^(x − largest).

    largest, weight: float32 [B, heads, tokens]. share = 1/heads. q, k: [B, heads, tokens, D], their strides
    in units of ALIGN elements. The head size is cut into D // CHUNK chunks and a rest, which is padded with
    zeros to REST. A program owns BLOCK_Q queries of one head and sees all keys.
    """
    program = tl.program_id(0)
    tiles = (tokens - 1) // BLOCK_Q + 1
    sample_head = program // tiles
    start = (program - sample_head * tiles) * BLOCK_Q
    sample = (sample_head // heads).to(tl.int64)
    head = (sample_head % heads).to(tl.int64)
    q_ptr += (sample * q_batch + head * q_head) * ALIGN
    k_ptr += (sample * k_batch + head * k_head) * ALIGN
    q_token *= ALIGN
    k_token *= ALIGN

    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    q = _chunks(q_ptr, start, tokens, q_token, D, CHUNK, REST, BLOCK_Q)
    stages: tl.constexpr = _jit.stages_ahead(STAGES, PRECISION == "tf32")
    for key in tl.range(0, tokens, BLOCK_K, num_stages=stages):
        k = _chunks(k_ptr, key, tokens, k_token, D, CHUNK, REST, BLOCK_K)
        products = _products(q, k, PRECISION)
        logits = products * scale
        if RAGGED:
            there = (key + tl.arange(0, BLOCK_K) < tokens)[None, :]
            logits = tl.where(there, logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        # Fused as in the second pass: logits may be so large that their own rounding matters.
        terms = tl.exp2(tl.fma(products, scale, -larger[:, None]))
        if RAGGED:
            terms = tl.where(there, terms, 0.0)
        total = total * tl.exp2(largest - larger) + tl.sum(terms, 1)
        largest = larger
    query = start + tl.arange(0, BLOCK_Q)
    row = sample_head.to(tl.int64) * tokens + query
    tl.store(largest_ptr + row, largest, mask=query < tokens)
    tl.store(weight_ptr + row, share / total, mask=query < tokens)


@_jit.jit(
    do_not_specialize=(
        "heads",
        "tokens",
        "width",
        "q_batch",
        "q_head",
        "q_token",
        "k_batch",
        "k_head",
        "k_token",
    )
)
def _received_kernel(
    received_ptr,
    sums_ptr,
    largest_ptr,
    weight_ptr,
    q_ptr,
    k_ptr,
    scale,
    heads,
    tokens,
    width,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    REST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """p̄ = Σ_h weight·2^(q·k·scale − largest);  received = Σ_q p̄;  sums = (Σ p̄ ln p̄, Σ p̄·distance).

    received: float32 [B, tokens]. sums: float32 [2, B, tiles of keys].
    largest, weight: float32 [B, heads, tokens], from the first pass, which describes q, k, scale too.
    A program owns BLOCK_K keys of one sample and sees all queries and heads.
    """
    program = tl.program_id(0)
    tiles = (tokens - 1) // BLOCK_K + 1
    sample = program // tiles
    start = (program - sample * tiles) * BLOCK_K
    sample = sample.to(tl.int64)
    q_ptr += sample * q_batch * ALIGN
    k_ptr += sample * k_batch * ALIGN
    largest_ptr += sample * heads * tokens
    weight_ptr += sample * heads * tokens
    q_step = q_head.to(tl.int64) * ALIGN
    k_step = k_head.to(tl.int64) * ALIGN
    q_token *= ALIGN
    k_token *= ALIGN
    key = start + tl.arange(0, BLOCK_K)

    received = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    information = tl.zeros((BLOCK_Q,), tl.float32)
    moved = tl.zeros((BLOCK_Q,), tl.float32)
    stages: tl.constexpr = _jit.stages_ahead(STAGES, PRECISION == "tf32")
    for first in range(0, tokens, BLOCK_Q):
        query = first + tl.arange(0, BLOCK_Q)
        p = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        for head in tl.range(heads, num_stages=stages):
            q = _chunks(q_ptr + head * q_step, first, tokens, q_token, D, CHUNK, REST, BLOCK_Q)
            k = _chunks(k_ptr + head * k_step, start, tokens, k_token, D, CHUNK, REST, BLOCK_K)
            products = _products(q, k, PRECISION)
            row = tokens.to(tl.int64) * head + query
            # A query past the end has no weight.
            largest = tl.load(largest_ptr + row, mask=query < tokens, other=0.0)
            weight = tl.load(weight_ptr + row, mask=query < tokens, other=0.0)
            p += weight[:, None] * tl.exp2(tl.fma(products, scale, -largest[:, None]))
        p = tl.where((key < tokens)[None, :], p, 0.0)
        received += p
        # The smallest normal number makes 0·log 0 = 0; multiplied by p, a NaN stays visible.
        information += tl.sum(p * tl.log2(tl.maximum(p, 1.1754943508222875e-38)), 1)
        dy = (query // width)[:, None] - (key // width)[None, :]
        dx = (query % width)[:, None] - (key % width)[None, :]
        moved += tl.sum(p * tl.sqrt((dy * dy + dx * dx).to(tl.float32)), 1)

    tl.store(received_ptr + sample * tokens + key, tl.sum(received, 0), mask=key < tokens)
    tl.store(sums_ptr + program, tl.sum(information, 0) * 0.6931471805599453)
    tl.store(sums_ptr + tl.num_programs(0) + program, tl.sum(moved, 0))


def _common(q: Tensor, k: Tensor) -> tuple[dict[str, Any], tuple[int, ...]]:
    """What both kernels are compiled for, and the strides. Tiles were found by compiling: head sizes up to
    160 in multiples of 8 don't spill.
    """
    size = q.shape[3]
    strides = (*q.stride()[:3], *k.stride()[:3])
    align = math.gcd(8, *strides)
    if q.dtype == torch.float32:
        # Splitting float32 into three TF32 parts costs more than it saves in tiles this small.
        precision, chunk = "ieee", 32
    else:
        precision, chunk = "tf32", 64 if 64 <= size <= 144 else 32
    rest = size % chunk
    constants = {
        "ALIGN": align,
        "D": size,
        "CHUNK": chunk,
        "REST": max(16, 1 << (rest - 1).bit_length()) if rest else 0,
        "PRECISION": precision,
        "BLOCK_Q": 64,
        "num_warps": 4,
    }
    return constants, tuple(stride // align for stride in strides)


def rows_launch_of(largest: Tensor, weight: Tensor, q: Tensor, k: Tensor, scale: float) -> _jit.Launch:
    """The launch of the first pass. largest, weight: float32 [B, heads, N]."""
    _jit.load_triton()
    batch, heads, tokens, _ = q.shape
    constants, strides = _common(q, k)
    block_k = 32 if q.dtype == torch.float32 else 64
    constants |= {"RAGGED": tokens % block_k != 0, "BLOCK_K": block_k, "STAGES": 2}
    args = (largest, weight, q, k, scale * _LOG2_E, 1.0 / heads, heads, tokens, *strides)
    grid = _jit.blocks(tokens, batch * heads, constants["BLOCK_Q"])
    return _jit.Launch(_softmax_rows_kernel, grid, args, constants)


def received_launch_of(
    received: Tensor,
    sums: Tensor,
    largest: Tensor,
    weight: Tensor,
    q: Tensor,
    k: Tensor,
    width: int,
    scale: float,
) -> _jit.Launch:
    """The launch of the second pass. received: float32 [B, N]. sums: as `empty_sums` makes it."""
    _jit.load_triton()
    batch, heads, tokens, size = q.shape
    constants, strides = _common(q, k)
    stages = 2 if q.dtype != torch.float32 and size < 96 else 1
    constants |= {"BLOCK_K": _BLOCK_K, "STAGES": stages}
    args = (received, sums, largest, weight, q, k, scale * _LOG2_E, heads, tokens, width, *strides)
    return _jit.Launch(_received_kernel, _jit.blocks(tokens, batch, _BLOCK_K), args, constants)


def empty_sums(q: Tensor) -> Tensor:
    """float32 [2, B, tiles of keys] for the second pass: Σ p̄ ln p̄ and Σ p̄·distance of every tile."""
    return torch.empty(2, q.shape[0], -(-q.shape[2] // _BLOCK_K), device=q.device)


def _launch(q: Tensor, k: Tensor, height: int, width: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, height, width, scale)
    if q.shape[3] > _MAX_HEAD_SIZE:
        raise ValueError(
            f"q's head size {q.shape[3]} is above {_MAX_HEAD_SIZE}, the kernel's largest: "
            "backend='torch' serves it"
        )
    largest, weight = torch.empty(2, *q.shape[:3], device=q.device)
    received, sums = torch.empty(q.shape[::2], device=q.device), empty_sums(q)
    rows_launch_of(largest, weight, q, k, scale).run(q.device)
    received_launch_of(received, sums, largest, weight, q, k, width, scale).run(q.device)
    information, distance = sums.sum(-1, dtype=torch.float64)
    return _finish(information, distance, received, height, width)


def _fake(q: Tensor, k: Tensor, height: int, width: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, height, width, scale)
    batch, _, tokens, _ = q.shape
    entropy, locality, received = (
        q.new_empty(shape, dtype=torch.float32) for shape in ((batch,), (batch,), (batch, tokens))
    )
    return entropy, locality, received


_operator = Operator(
    "attention_statistics(Tensor q, Tensor k, SymInt height, SymInt width, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    twin=_twin,
    launch=_launch,
    fake=_fake,
)


def attention_statistics(
    q: Tensor,
    k: Tensor,
    height: int,
    width: int,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> AttentionStatistics:
    """Entropy, locality and received attention of one self-attention layer, in O(N) memory.

        p̄ = mean over heads of softmax(q·kᵀ·scale);  N = height·width tokens, row by row
        entropy = −(1/N)·Σ p̄ ln p̄ / ln N;  locality = 1 − (1/N)·Σ p̄·distance / diagonal;  received[k] = Σ_q p̄

    The sums run over all queries and keys; distances are between places on the grid, and the diagonal is
    the largest of them. A single token has entropy 0 and locality 1: all its attention stays where it is.

    q, k: [B, heads, N, head size], float32, float16 or bfloat16 alike, on one device. Their last dimension is
    contiguous and the others may have any strides, so views of [B, N, heads·head size] need no copy. On CUDA
    the head size is at most 160. scale: 1/√(head size) unless given. Computed in float32; the same tensors
    give the same bits. Returns float32 entropy [B], locality [B] and received [B, N], whose mean is 1. There
    is no derivative: a tensor that requires grad is an error outside torch.no_grad().
    """
    if scale is None:
        scale = 1.0 / math.sqrt(max(q.shape[-1], 1)) if q.ndim else 1.0
    return AttentionStatistics(*_operator.on(backend, q.device)(q, k, height, width, scale))


def combine_statistics(
    layers: Sequence[AttentionStatistics], sizes: Sequence[tuple[int, int]], map_size: int = 8
) -> tuple[Tensor, Tensor]:
    """One set of features from the statistics of several layers, as TinyFlux's Sol features are defined.

    layers: one AttentionStatistics a layer, all of the same batch. sizes: their (height, width).
    Returns (stats, spatial). stats: float32 [B, 3], the mean over layers of (locality, entropy, 1 − entropy).
    spatial: float32 [B, map_size, map_size], the received attention resized bilinearly (half-pixel centres,
    no antialiasing), averaged over layers and divided by its sum.
    """
    if not layers or len(layers) != len(sizes):
        raise ValueError(
            f"layers and sizes must be as many, and at least one: {len(layers)} and {len(sizes)}"
        )
    if map_size < 1:
        raise ValueError(f"map_size must be at least 1, got {map_size}")
    shape = layers[0].received.shape[:1]
    for i, (layer, (height, width)) in enumerate(zip(layers, sizes, strict=True)):
        if layer.received.shape != (*shape, height * width):
            raise ValueError(
                f"layers[{i}].received must have shape {[*shape, height * width]} for {height} × {width} "
                f"tokens, got {list(layer.received.shape)}"
            )
    locality = torch.stack([layer.locality for layer in layers]).mean(0)
    entropy = torch.stack([layer.entropy for layer in layers]).mean(0)
    maps = [
        F.interpolate(layer.received.view(-1, 1, *size), (map_size, map_size), mode="bilinear")
        for layer, size in zip(layers, sizes, strict=True)
    ]
    spatial = torch.stack(maps).mean(0)[:, 0]
    stats = torch.stack((locality, entropy, 1.0 - entropy), -1)
    return stats, spatial / spatial.sum((-2, -1), keepdim=True)
