"""Uses of the training kernels, at the student's sizes (hidden size 512, 4 heads of 128, 1024 tokens)
and Stable Diffusion's (8 heads of 40, 4096 tokens)."""

from __future__ import annotations

import torch

from bench.cases.case import DTYPES, Built, Case, Tensors, using
from moe_sampler.kernels import losses, modulation, rotary, training_pairs
from moe_sampler.kernels.attention_launches import (
    empty_parts,
    end_launch_of,
    received_launch_of,
    rows_launch_of,
)

TOKENS, SMALL_TOKENS = (16, 1024, 512), (2, 64, 512)
HEADS, SMALL_HEADS = (16, 4, 1024, 128), (2, 2, 64, 128)
ATTENTION, SMALL_ATTENTION = (4, 8, 4096, 40), (2, 2, 144, 40)
LATENT_TOKENS, SMALL_LATENT_TOKENS = (32, 4096, 16), (2, 1024, 16)


def _pair(make: Tensors, shape: tuple[int, ...], dtype: torch.dtype, *, flow: bool, drawn: bool) -> Built:
    batch = shape[:1]
    x0, noisy, target = make(shape, dtype), make(shape, dtype), make(shape, dtype)
    seeds, noise = (make(batch, torch.int64), None) if drawn else (None, make(shape, dtype))
    if flow:
        levels, timestep = (make(batch),), make(batch)
        settings = (*levels, None, None), (3.0, "flow_prediction")
    else:
        levels, timestep = (make(batch, torch.int64), make((1000,)), make((1000,))), None
        settings = levels, (1.0, "v_prediction")
    pair = training_pairs.Pair(x0, *settings[0], seeds, noise, 3, 0, *settings[1], 1000.0, dtype)
    read = (x0,) if noise is None else (x0, noise)
    written = (noisy, target) if timestep is None else (noisy, target, timestep)
    cached = levels if seeds is None else (*levels, seeds)
    return Built(training_pairs.launch_of(pair, noisy, target, timestep), read, written, cached)


def _loss(
    make: Tensors,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    min_snr: bool = False,
    mapped: bool = False,
    wanted: bool = True,
) -> Built:
    batch, tokens = shape[:1], len(shape) == 3
    prediction, target = make(shape, dtype), make(shape, dtype)
    partial = make((*batch, losses.partials(prediction)))
    residual = make(shape, dtype) if wanted else None
    weight, alpha, sigma = (make(batch), make(batch), make(batch)) if min_snr else (None, None, None)
    weight_map = make((*batch, 8, 8)) if mapped else None
    side = round(shape[1] ** 0.5) if tokens else 0
    height, width = ((side, side) if tokens else shape[-2:]) if mapped else (0, 0)
    kind = "flow_prediction" if min_snr else ""
    loss = losses.Loss(
        prediction, target, weight, weight_map, height, width, tokens, alpha, sigma, 5.0, kind, wanted
    )
    cached = tuple(t for t in (weight, alpha, sigma, weight_map) if t is not None)
    written = (partial,) if residual is None else (partial, residual)
    return Built(losses.launch_of(loss, partial, residual), (prediction, target), written, cached)


def _loss_backward(make: Tensors, shape: tuple[int, ...], dtype: torch.dtype) -> Built:
    residual, gradient, slope = make(shape, dtype), make(shape[:1]), make(shape, dtype)
    launch = losses.backward_launch_of(slope, None, residual, gradient)
    return Built(launch, (residual,), (slope,), (gradient,))


def _modulation(make: Tensors, shape: tuple[int, ...], dtype: torch.dtype) -> Built:
    batch, tokens, width = shape
    x, y, rstd = make(shape, dtype), make(shape, dtype), make((batch, tokens))
    weight, scale, shift = make((width,), dtype), make((batch, width), dtype), make((batch, width), dtype)
    launch = modulation.launch_of(y, rstd, x, weight, scale, shift, 1e-6)
    return Built(launch, (x,), (y, rstd), (weight, scale, shift))


def _modulation_backward(make: Tensors, shape: tuple[int, ...], dtype: torch.dtype) -> Built:
    batch, tokens, width = shape
    x, grad, dx, rstd = make(shape, dtype), make(shape, dtype), make(shape, dtype), make((batch, tokens))
    weight, scale = make((width,), dtype), make((batch, width), dtype)
    along, dshift = (make((batch, modulation.chunks_of(tokens), width)) for _ in range(2))
    launch = modulation.backward_launch_of(dx, along, dshift, grad, x, rstd, weight, scale)
    return Built(launch, (x, grad, rstd), (dx, along, dshift), (weight, scale), loops=True)


def _modulation_sums(make: Tensors, shape: tuple[int, ...], dtype: torch.dtype) -> Built:
    batch, tokens, width = shape
    dweight, dscale, dshift = make((width,), dtype), make((batch, width), dtype), make((batch, width), dtype)
    along, along_shift = (make((batch, modulation.chunks_of(tokens), width)) for _ in range(2))
    weight, scale = make((width,), dtype), make((batch, width), dtype)
    launch = modulation.sums_launch_of(dweight, dscale, dshift, along, along_shift, weight, scale)
    read, written = (along, along_shift, weight, scale), (dweight, dscale, dshift)
    return Built(launch, read, written, loops=True)


def _rotary(make: Tensors, shape: tuple[int, ...], dtype: torch.dtype, *, back: bool = False) -> Built:
    batch, heads, tokens, width = shape
    q, k, out_q, out_k = (make(shape, dtype) for _ in range(4))
    cos, sin = make((tokens, width // 2)), make((tokens, width // 2))
    factor = make((batch, heads, tokens))
    if not back:
        launch = rotary.launch_of(out_q, out_k, q, k, cos, sin, factor)
        return Built(launch, (q, k, factor), (out_q, out_k), (cos, sin))
    grad_q, grad_k, slope = make(shape, dtype), make(shape, dtype), make((batch, heads, tokens))
    launch = rotary.launch_of(
        out_q, out_k, grad_q, grad_k, cos, sin, factor, back=True, dmodulation=slope, q=q, k=k
    )
    return Built(launch, (grad_q, grad_k, q, k, factor), (out_q, out_k, slope), (cos, sin))


def _attention(make: Tensors, shape: tuple[int, ...], dtype: torch.dtype, *, received: bool) -> Built:
    batch, heads, tokens, size = shape
    width = round(tokens**0.5)
    q, k = (make((batch, tokens, heads, size), dtype).transpose(1, 2) for _ in range(2))
    largest, weight = make((batch, heads, tokens)), make((batch, heads, tokens))
    work = {"loops": True, "flops": 2 * batch * heads * tokens**2 * size, "exps": batch * heads * tokens**2}
    # Every tile of queries reads all keys; in the second pass every tile of keys also reads all queries.
    if not received:
        launch = rows_launch_of(largest, weight, q, k, 0.1)
        again = -(-tokens // launch.constants["BLOCK_Q"]) * k.nbytes
        return Built(launch, (q,), (largest, weight), (k,), asked=again, **work)
    parts, sums = empty_parts(q)
    launch = received_launch_of(parts, sums, largest, weight, q, k, width, 0.1)
    query_tiles, key_tiles = (-(-tokens // launch.constants[name]) for name in ("BLOCK_Q", "BLOCK_K"))
    again = query_tiles * k.nbytes + key_tiles * (q.nbytes + largest.nbytes + weight.nbytes)
    return Built(launch, (), (parts, sums), (q, k, largest, weight), asked=again, **work)


def _attention_end(make: Tensors, shape: tuple[int, ...], dtype: torch.dtype) -> Built:
    batch, heads, tokens, size = shape
    parts, sums = empty_parts(make((batch, heads, tokens, size), dtype))
    entropy, locality, received = make((batch,)), make((batch,)), make((batch, tokens))
    launch = end_launch_of(entropy, locality, received, parts, sums, (-0.1, -0.1))
    return Built(launch, (parts, sums), (entropy, locality, received), loops=True)


def training_cases() -> list[Case]:
    """Pairs, losses, and the student's own operations, forward and backward."""
    images = [
        ("training_pair", "flow, noise in the kernel", using(_pair, flow=True, drawn=True)),
        ("training_pair", "flow, noise tensor", using(_pair, flow=True, drawn=False)),
        ("training_pair", "DDPM, noise in the kernel", using(_pair, flow=False, drawn=True)),
        ("weighted_mse", "plain", _loss),
        ("weighted_mse", "weight, min-SNR", using(_loss, min_snr=True)),
        ("weighted_mse", "map of an image, weight, min-SNR", using(_loss, min_snr=True, mapped=True)),
        ("weighted_mse", "no gradient", using(_loss, wanted=False)),
        ("weighted_mse_backward", "", _loss_backward),
    ]
    found = [Case(name, variant, dtype, make) for name, variant, make in images for dtype in DTYPES]
    attention = (ATTENTION, SMALL_ATTENTION)
    tokens = (LATENT_TOKENS, SMALL_LATENT_TOKENS)
    for name, variant, make, sizes in (
        ("weighted_mse", "map of tokens", using(_loss, mapped=True), tokens),
        ("rms_norm_modulate", "", _modulation, (TOKENS, SMALL_TOKENS)),
        ("rms_norm_modulate_backward", "", _modulation_backward, (TOKENS, SMALL_TOKENS)),
        ("rms_norm_modulate_backward", "sums over tokens", _modulation_sums, (TOKENS, SMALL_TOKENS)),
        ("rope_qk", "modulated", _rotary, (HEADS, SMALL_HEADS)),
        ("attention_statistics", "softmax rows", using(_attention, received=False), attention),
        ("attention_statistics", "received", using(_attention, received=True), attention),
        ("attention_statistics", "sums over parts", _attention_end, attention),
        ("rope_qk_backward", "modulated", using(_rotary, back=True), (HEADS, SMALL_HEADS)),
    ):
        found += [Case(name, variant, dtype, make, *sizes) for dtype in DTYPES]
    return found
