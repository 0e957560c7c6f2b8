"""The device code of `attention_statistics`: two streaming passes over queries and keys, and their end.

p̄ ln p̄ needs the mean over heads first, so the softmax's largest logit and sum come from a pass of their own;
the second pass makes p̄ tile by tile from logits computed again. A program owns keys and sees a part of the
queries, so that there are programs enough; what the parts found is added up last, in their order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_sampler.kernels import _jit

if TYPE_CHECKING:
    import triton.language as tl


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
def softmax_rows_kernel(
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
    stages: tl.constexpr = _jit.stages_ahead(STAGES, PRECISION != "ieee")
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
        "parts",
        "q_batch",
        "q_head",
        "q_token",
        "k_batch",
        "k_head",
        "k_token",
    )
)
def received_kernel(
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
    parts,
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

    received: float32 [B, parts, tokens]. sums: float32 [2, B, parts, tiles of keys].
    largest, weight: float32 [B, heads, tokens], from the first pass, which describes q, k, scale too.
    A program owns BLOCK_K keys of one sample and sees one part of its queries, with all heads.
    """
    program = tl.program_id(0)
    key_tiles = (tokens - 1) // BLOCK_K + 1
    query_tiles = (tokens - 1) // BLOCK_Q + 1
    start = (program % key_tiles) * BLOCK_K
    part = program // key_tiles % parts
    sample = (program // key_tiles // parts).to(tl.int64)
    q_ptr += sample * q_batch * ALIGN
    k_ptr += sample * k_batch * ALIGN
    largest_ptr += sample * heads * tokens
    weight_ptr += sample * heads * tokens
    q_step = q_head.to(tl.int64) * ALIGN
    k_step = k_head.to(tl.int64) * ALIGN
    q_token *= ALIGN
    k_token *= ALIGN
    key = start + tl.arange(0, BLOCK_K)

    received = tl.zeros((BLOCK_K,), tl.float32)
    information = tl.zeros((BLOCK_Q,), tl.float32)
    moved = tl.zeros((BLOCK_Q,), tl.float32)
    stages: tl.constexpr = _jit.stages_ahead(STAGES, PRECISION != "ieee")
    for tile in range(query_tiles * part // parts, query_tiles * (part + 1) // parts):
        query = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        p = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        for head in tl.range(heads, num_stages=stages):
            q = _chunks(q_ptr + head * q_step, tile * BLOCK_Q, tokens, q_token, D, CHUNK, REST, BLOCK_Q)
            k = _chunks(k_ptr + head * k_step, start, tokens, k_token, D, CHUNK, REST, BLOCK_K)
            products = _products(q, k, PRECISION)
            row = tokens.to(tl.int64) * head + query
            # A query past the end has no weight.
            largest = tl.load(largest_ptr + row, mask=query < tokens, other=0.0)
            weight = tl.load(weight_ptr + row, mask=query < tokens, other=0.0)
            p += weight[:, None] * tl.exp2(tl.fma(products, scale, -largest[:, None]))
        p = tl.where((key < tokens)[None, :], p, 0.0)
        received += tl.sum(p, 0)
        # The smallest normal number makes 0·log 0 = 0; multiplied by p, a NaN stays visible.
        information += tl.sum(p * tl.log2(tl.maximum(p, 1.1754943508222875e-38)), 1)
        dy = (query // width)[:, None] - (key // width)[None, :]
        dx = (query % width)[:, None] - (key % width)[None, :]
        moved += tl.sum(p * tl.sqrt((dy * dy + dx * dx).to(tl.float32)), 1)

    tl.store(received_ptr + (sample * parts + part) * tokens + key, received, mask=key < tokens)
    tl.store(sums_ptr + program, tl.sum(information, 0) * 0.6931471805599453)
    tl.store(sums_ptr + tl.num_programs(0) + program, tl.sum(moved, 0))


@_jit.jit(do_not_specialize=("parts", "partials"))
def end_kernel(
    entropy_ptr,
    locality_ptr,
    received_ptr,
    received_parts_ptr,
    sums_ptr,
    of_entropy,
    of_distance,
    tokens,
    parts,
    partials,
    BLOCK: tl.constexpr,
):
    """received = Σ received_parts;  entropy = of_entropy·Σ p̄ ln p̄,  locality = 1 + of_distance·Σ p̄·distance.

    entropy, locality: float32 [B]. received: float32 [B, tokens]. received_parts: float32
    [B, parts, tokens]. sums: float32 [2, B, partials]. A program owns BLOCK keys of one sample, and a
    sample's first program its two numbers.
    """
    program = tl.program_id(0)
    tiles = (tokens - 1) // BLOCK + 1
    sample = (program // tiles).to(tl.int64)
    key = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    received = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, parts):
        received += tl.load(
            received_parts_ptr + (sample * parts + part) * tokens + key, mask=key < tokens, other=0.0
        )
    tl.store(received_ptr + sample * tokens + key, received, mask=key < tokens)
    if program % tiles == 0:
        information = tl.zeros((BLOCK,), tl.float32)
        moved = tl.zeros((BLOCK,), tl.float32)
        samples = tl.num_programs(0) // tiles
        for first in range(0, partials, BLOCK):
            here = first + tl.arange(0, BLOCK)
            at = sums_ptr + sample * partials + here
            information += tl.load(at, mask=here < partials, other=0.0)
            moved += tl.load(at + samples.to(tl.int64) * partials, mask=here < partials, other=0.0)
        tl.store(entropy_ptr + sample, of_entropy * tl.sum(information, 0))
        tl.store(locality_ptr + sample, 1.0 + of_distance * tl.sum(moved, 0))
