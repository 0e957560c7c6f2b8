"""What a self-attention layer looks at, without its attention matrix: Sol's features, layer by layer.

With p_h = softmax(q_h·k_hᵀ·scale) over the keys and p̄ = mean over heads of p_h, for N tokens on a grid:

    entropy     = −mean over queries of Σ_k p̄ ln p̄, over ln N
    locality    = 1 − mean over queries of Σ_k p̄·|place of query − place of key|, over the grid's diagonal
    received[k] = Σ over queries of p̄, the attention a key receives

Memory is O(N): `attention_kernels` streams over queries and keys, and the twin takes queries in chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_sampler.kernels._dispatch import FLOATS, Operator, check_tensor
from moe_sampler.kernels.attention_launches import (
    empty_parts,
    end_launch_of,
    received_launch_of,
    rows_launch_of,
)

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


def _factors(height: int, width: int) -> tuple[float, float]:
    """What the sums of p̄ ln p̄ and of p̄·distance over all queries and keys are multiplied by: this makes the
    entropy and, to be added to 1, the locality."""
    tokens = height * width
    # A single token: both sums are 0 (or NaN), and what they are divided by would be 0.
    uniform = math.log(tokens) if tokens > 1 else 1.0
    diagonal = math.hypot(height - 1, width - 1) if tokens > 1 else 1.0
    return -1.0 / (tokens * uniform), -1.0 / (tokens * diagonal)


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
    of_entropy, of_distance = _factors(height, width)
    return (sums[0] * of_entropy).float(), (1.0 + sums[1] * of_distance).float(), received


def _launch(q: Tensor, k: Tensor, height: int, width: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Three launches."""
    entropy, locality, received = _fake(q, k, height, width, scale)
    if q.shape[3] > _MAX_HEAD_SIZE:
        raise ValueError(
            f"q's head size {q.shape[3]} is above {_MAX_HEAD_SIZE}, the kernel's largest: "
            "backend='torch' serves it"
        )
    largest, weight = torch.empty(2, *q.shape[:3], device=q.device)
    parts, sums = empty_parts(q)
    rows_launch_of(largest, weight, q, k, scale).run(q.device)
    received_launch_of(parts, sums, largest, weight, q, k, width, scale).run(q.device)
    end_launch_of(entropy, locality, received, parts, sums, _factors(height, width)).run(q.device)
    return entropy, locality, received


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
