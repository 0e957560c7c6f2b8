"""The training operations, forward and backward, beside eager torch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import COMPILED, DEVICE, OURS, Call, Comparison
from moe_sampler.kernels import flow_training_pair, philox_normal, rms_norm_modulate, rope_qk, weighted_mse
from moe_sampler.kernels.shift import shift_sigma

SUITE = "training"
DTYPES = (torch.float32, torch.bfloat16)
LATENTS, TOKENS, HEADS = (16, 4, 64, 64), (8, 320, 256), (8, 4, 320, 64)
SHIFT = 3.0


def _randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    return tensor.requires_grad_(grad)


def _forward_and_backward(forward: Callable[..., Tensor], *inputs: Tensor) -> Call:
    """A call that computes the output and every input's gradient."""
    wanted = [t for t in inputs if t.requires_grad]
    with torch.no_grad():
        slope = torch.ones_like(forward(*inputs))

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(*inputs), wanted, slope)

    return step


# Training pairs


def _pair_eager(x0: Tensor, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sigma = shift_sigma(sigma, SHIFT)
    s = sigma.view(-1, 1, 1, 1).to(x0.dtype)
    return (1 - s) * x0 + s * noise, noise - x0, 1000 * sigma


def _pairs(dtype: torch.dtype, drawn: bool) -> Comparison:
    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        x0, sigma = _randn(*LATENTS, dtype=dtype), torch.linspace(0, 1, LATENTS[0], device=DEVICE)
        return x0, sigma, _randn(*LATENTS, dtype=dtype, seed=1)

    def ours() -> Call:
        x0, sigma, noise = inputs()
        seeds = torch.arange(len(x0), device=DEVICE)
        if drawn:
            return lambda: flow_training_pair(x0, sigma, shift=SHIFT, seeds=seeds)
        return lambda: flow_training_pair(x0, sigma, shift=SHIFT, noise=noise)

    def theirs(pair: Callable) -> Callable[[], Call]:
        def make() -> Call:
            x0, sigma, noise = inputs()
            return lambda: pair(x0, sigma, torch.randn_like(x0) if drawn else noise)

        return make

    def reproducible() -> Call:
        x0, sigma, _ = inputs()
        seeds = torch.arange(len(x0), device=DEVICE)
        return lambda: _pair_eager(x0, sigma, philox_normal(x0.shape, seeds, dtype=dtype))

    providers = {
        OURS: ours,
        "eager": theirs(_pair_eager),
        COMPILED: theirs(torch.compile(_pair_eager, dynamic=False)),
    }
    if drawn:
        providers["eager, reproducible noise"] = reproducible
    variant = "noise drawn" if drawn else "noise given"
    return _comparison("flow pair", variant, LATENTS, dtype, providers)


# Losses


def _loss_eager(prediction: Tensor, target: Tensor, weight: Tensor, weight_map: Tensor) -> Tensor:
    spread = F.interpolate(weight_map[:, None], size=prediction.shape[-2:], mode="bilinear")
    squared = (prediction.float() - target.float()).square()
    return (squared * spread * weight.view(-1, 1, 1, 1)).mean()


def _plain_loss_eager(prediction: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(prediction.float(), target.float())


def _losses(dtype: torch.dtype, weighted: bool) -> Comparison:
    def inputs() -> tuple[Tensor, ...]:
        pair = _randn(*LATENTS, dtype=dtype, grad=True), _randn(*LATENTS, dtype=dtype, seed=1)
        if not weighted:
            return pair
        return *pair, _randn(LATENTS[0], seed=2).abs(), _randn(LATENTS[0], 8, 8, seed=3).abs()

    def ours(prediction: Tensor, target: Tensor, *weights: Tensor) -> Tensor:
        return weighted_mse(prediction, target, **dict(zip(("weight", "weight_map"), weights, strict=False)))

    eager = _loss_eager if weighted else _plain_loss_eager
    return _differentiated("weighted MSE" if weighted else "MSE", LATENTS, dtype, inputs, ours, eager)


# Modulated RMSNorm


def _modulate_eager(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    wide = x.float()
    normed = (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype) * weight
    return normed * (1 + scale[:, None]) + shift[:, None]


def _modulated(dtype: torch.dtype) -> Comparison:
    batch, _, width = TOKENS

    def inputs() -> tuple[Tensor, ...]:
        rows = (_randn(batch, width, dtype=dtype, grad=True, seed=seed) for seed in (2, 3))
        return _randn(*TOKENS, dtype=dtype, grad=True), _randn(width, dtype=dtype, grad=True, seed=1), *rows

    return _differentiated("modulated RMSNorm", TOKENS, dtype, inputs, rms_norm_modulate, _modulate_eager)


# Rotary embedding


def _rope_eager(qkv: Tensor, cos: Tensor, sin: Tensor, factor: Tensor) -> Tensor:
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def turn(x: Tensor) -> Tensor:
        pairs = x.float().unflatten(-1, (-1, 2))
        first, second = pairs[..., 0], pairs[..., 1]
        turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)
        return turned.to(x.dtype) * factor[..., None].to(x.dtype)

    return torch.stack([turn(q), turn(k)])


def _rope_ours(qkv: Tensor, cos: Tensor, sin: Tensor, factor: Tensor) -> Tensor:
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return torch.stack(rope_qk(q, k, cos, sin, factor))


def _rotary(dtype: torch.dtype) -> Comparison:
    batch, heads, tokens, width = HEADS

    def inputs() -> tuple[Tensor, ...]:
        rates = torch.logspace(0, -4, width // 2, device=DEVICE)
        angles = torch.arange(tokens, device=DEVICE)[:, None] * rates
        qkv = _randn(batch, tokens, 3, heads, width, dtype=dtype, grad=True)
        return qkv, angles.cos(), angles.sin(), _randn(batch, heads, tokens, grad=True, seed=1)

    return _differentiated("rotary q, k", HEADS, dtype, inputs, _rope_ours, _rope_eager)


def _differentiated(
    operation: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    inputs: Callable[[], tuple[Tensor, ...]],
    ours: Callable[..., Tensor],
    eager: Callable[..., Tensor],
) -> Comparison:
    providers = {
        OURS: lambda: _forward_and_backward(ours, *inputs()),
        "eager": lambda: _forward_and_backward(eager, *inputs()),
        COMPILED: lambda: _forward_and_backward(torch.compile(eager, dynamic=False), *inputs()),
    }
    return _comparison(operation, "forward and backward", shape, dtype, providers)


def _comparison(
    operation: str, variant: str, shape: tuple[int, ...], dtype: torch.dtype, providers: dict
) -> Comparison:
    case = {
        "operation": operation,
        "variant": variant,
        "shape": "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
    }
    return Comparison(SUITE, case, providers, memory=True)


def comparisons() -> Iterator[Comparison]:
    for dtype in DTYPES:
        yield _pairs(dtype, drawn=False)
        yield _pairs(dtype, drawn=True)
        yield _losses(dtype, weighted=False)
        yield _losses(dtype, weighted=True)
        yield _modulated(dtype)
        yield _rotary(dtype)
