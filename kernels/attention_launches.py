"""The launches of `attention_statistics`: which tiles and how many programs its three kernels take."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moe_sampler.kernels import _jit, attention_kernels

_LOG2_E = math.log2(math.e)
_PROGRAMS = 256  # that the second pass of one sample is split into, where there are queries enough
_END_BLOCK = 512
_SPLIT, _NARROW, _WIDE = 48, 64, 96  # head sizes up to which tiles take other shapes
_REGISTERS = 255  # without a limit the assembler makes up one of its own, and spills to keep it


def _common(q: Tensor, k: Tensor) -> tuple[dict[str, Any], tuple[int, ...]]:
    """What both passes are compiled for, and the strides. Tiles were found by compiling: head sizes up to 160
    in multiples of 8 don't spill."""
    size = q.shape[3]
    strides = (*q.stride()[:3], *k.stride()[:3])
    align = math.gcd(8, *strides)
    if q.dtype != torch.float32:
        precision, chunk = "tf32", 64 if 64 <= size <= 144 else 32
    elif size <= _SPLIT:
        # Each factor in parts of TF32: as exact as float32's own products, and several times as fast.
        precision, chunk = "tf32x3", 32
    else:
        precision, chunk = "ieee", 32
    rest = size % chunk
    constants = {
        "ALIGN": align,
        "D": size,
        "CHUNK": chunk,
        "REST": max(16, 1 << (rest - 1).bit_length()) if rest else 0,
        "PRECISION": precision,
    }
    return constants, tuple(stride // align for stride in strides)


def rows_launch_of(largest: Tensor, weight: Tensor, q: Tensor, k: Tensor, scale: float) -> _jit.Launch:
    """The launch of the first pass. largest, weight: float32 [B, heads, N]."""
    _jit.load_triton()
    batch, heads, tokens, _ = q.shape
    constants, strides = _common(q, k)
    block_k = 32 if constants["PRECISION"] == "ieee" else 64
    constants |= {"RAGGED": tokens % block_k != 0, "BLOCK_Q": 64, "BLOCK_K": block_k, "STAGES": 2}
    args = (largest, weight, q, k, scale * _LOG2_E, 1.0 / heads, heads, tokens, *strides)
    grid = _jit.blocks(tokens, batch * heads, constants["BLOCK_Q"])
    return _jit.Launch(attention_kernels.softmax_rows_kernel, grid, args, constants)


def _tile(q: Tensor) -> tuple[int, int, int, int]:
    """Queries, keys, warps and registers a thread of a program of the second pass.

    Measured on an H200: two or three times as many programs at once hide more than larger tiles save.
    """
    size = q.shape[3]
    if math.gcd(8, *q.stride()[:3]) < 8:
        return 64, 32, 4, _REGISTERS  # each element has an address of its own
    if q.dtype == torch.float32:
        return (64, 32, 4, _REGISTERS) if size <= _SPLIT else (64, 64, 8, _REGISTERS)
    return 64, 32, 4, 128 if size <= _NARROW else 168 if size <= _WIDE else _REGISTERS


def empty_parts(q: Tensor) -> tuple[Tensor, Tensor]:
    """What the second pass writes: received, float32 [B, parts, N], and the sums of p̄ ln p̄ and of p̄·distance
    of every tile of keys and part of the queries, float32 [2, B, parts·tiles].

    The parts depend on one sample's size alone, so that its statistics do not depend on its batch.
    """
    batch, _, tokens, _ = q.shape
    block_q, block_k, *_ = _tile(q)
    key_tiles, query_tiles = -(-tokens // block_k), -(-tokens // block_q)
    parts = max(min(_PROGRAMS // max(key_tiles, 1), query_tiles), 1)
    received = torch.empty(batch, parts, tokens, device=q.device)
    return received, torch.empty(2, batch, parts * key_tiles, device=q.device)


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
    """The launch of the second pass. received, sums: as `empty_parts` makes them."""
    _jit.load_triton()
    batch, heads, tokens, size = q.shape
    parts = received.shape[1]
    constants, strides = _common(q, k)
    stages = 2 if q.dtype != torch.float32 and size <= _WIDE else 1
    block_q, block_k, warps, registers = _tile(q)
    constants |= {"BLOCK_Q": block_q, "BLOCK_K": block_k, "STAGES": stages, "num_warps": warps}
    constants["maxnreg"] = registers
    args = (received, sums, largest, weight, q, k, scale * _LOG2_E, heads, tokens, width, parts, *strides)
    grid = _jit.blocks(tokens, batch * parts, block_k)
    return _jit.Launch(attention_kernels.received_kernel, grid, args, constants)


def end_launch_of(
    entropy: Tensor,
    locality: Tensor,
    received: Tensor,
    parts: Tensor,
    sums: Tensor,
    factors: tuple[float, float],
) -> _jit.Launch:
    """The launch that adds up what the second pass wrote into parts and sums.

    entropy, locality: float32 [B]. received: float32 [B, N]. factors: what the sums are multiplied by.
    """
    _jit.load_triton()
    batch, count, tokens = parts.shape
    args = (entropy, locality, received, parts, sums, *factors, tokens, count, sums.shape[2])
    grid = _jit.blocks(tokens, batch, _END_BLOCK)
    return _jit.Launch(attention_kernels.end_kernel, grid, args, {"BLOCK": _END_BLOCK})
