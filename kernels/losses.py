"""The weighted mean squared error of a denoiser, forward and the residual for its gradient in one pass.

For each sample b over its elements i, of which there are n:

    L_b = (1/n)·Σ_i w_b·M_b(i)·(prediction_i − target_i)²      dL_b/dprediction_i = (2/n)·residual_i
    residual_i = w_b·M_b(i)·(prediction_i − target_i)          dL_b/dtarget_i    = −(2/n)·residual_i

w_b is a given weight times the min-SNR weight of the prediction type (`loss_weights`); M_b is a small map,
bilinearly interpolated to the pixels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_sampler.kernels import _jit, loss_weights
from moe_sampler.kernels._dispatch import (
    WITH_FLOAT64,
    Operator,
    check_tensor,
    differentiated_otherwise,
    undifferentiated,
)
from moe_sampler.kernels.loss_weights import MinSNR, check_min_snr, min_snr_weight

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK = 1024
_FLOAT32 = (torch.float32,)


class Loss(NamedTuple):
    """The operator's arguments: height and width count where there is a map, kind is min-SNR's prediction."""

    prediction: Tensor
    target: Tensor
    weight: Tensor | None
    weight_map: Tensor | None
    height: int
    width: int
    tokens: bool
    alpha: Tensor | None
    sigma: Tensor | None
    gamma: float
    kind: str
    wanted: bool


def _check(a: Loss) -> None:
    shape, device = a.prediction.shape, a.prediction.device
    check_tensor("prediction", a.prediction, device, WITH_FLOAT64)
    check_tensor("target", a.target, device, WITH_FLOAT64, shape)
    if len(shape) < 1 or 0 in shape[1:]:
        raise ValueError(f"prediction must be [B, ...] with an element a sample, got {list(shape)}")
    for name, tensor in (("weight", a.weight), ("min_snr's alpha", a.alpha), ("min_snr's sigma", a.sigma)):
        if tensor is not None:
            check_tensor(name, tensor, device, _FLOAT32, shape[:1])
    if a.weight_map is not None:
        check_tensor("weight_map", a.weight_map, device, _FLOAT32)
        if a.weight_map.ndim != 3 or a.weight_map.shape[0] != shape[0] or 0 in a.weight_map.shape[1:]:
            raise ValueError(f"weight_map must have shape [{shape[0]}, h, w], got {list(a.weight_map.shape)}")
        if math.prod(shape[1:]) > 2**31 - _BLOCK:
            raise ValueError("with a weight_map, prediction may have 2**31 - 1024 elements a sample at most")


def _precision(a: Loss) -> torch.dtype:
    return torch.float64 if torch.float64 in (a.prediction.dtype, a.target.dtype) else torch.float32


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *(1,) * (like.ndim - 1))


def _factor(a: Loss, precision: torch.dtype) -> Tensor | None:
    """w·M, to broadcast over the prediction; w joins the map while that is small."""
    weight, small, alpha, sigma = (
        None if t is None else t.to(precision) for t in (a.weight, a.weight_map, a.alpha, a.sigma)
    )
    if alpha is not None and sigma is not None:
        of_levels = min_snr_weight(alpha, sigma, a.gamma, a.kind)
        weight = of_levels if weight is None else weight * of_levels
    if small is None:
        return None if weight is None else _per_sample(weight, a.prediction)
    if weight is not None:
        small = small * _per_sample(weight, small)
    height, width = small.shape[1:]
    spread = _interpolation(height, a.height, small) @ small @ _interpolation(width, a.width, small).T
    return spread.view(len(small), -1, 1) if a.tokens else spread[:, None]


def _interpolation(size: int, pixels: int, like: Tensor) -> Tensor:
    """[pixels, size], which interpolates one axis: two products of small matrices beat F.interpolate."""
    texels = torch.eye(size, dtype=like.dtype, device=like.device)[None, None]
    return F.interpolate(texels, size=(pixels, size), mode="bilinear", align_corners=False)[0, 0]


def _sums_of_squares(difference: Tensor) -> Tensor:
    """[B] of [B, ...], in short runs to sum accurately, and without a temporary where a length allows it."""
    batch, numel = len(difference), math.prod(difference.shape[1:])
    run = math.gcd(numel, 1024)
    if run < 64:
        return difference.square().view(batch, numel).sum(1)
    norms = torch.linalg.vector_norm(difference.view(batch, numel // run, run), dim=2)
    return norms.square_().sum(1)


def _twin(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = Loss(*arguments)
    _check(a)
    precision = _precision(a)
    if a.prediction.dtype == a.target.dtype == precision:
        difference = a.prediction - a.target
    else:
        difference = a.prediction.to(precision, copy=True).sub_(a.target)
    batch, numel = len(difference), math.prod(difference.shape[1:])
    factor = _factor(a, precision)
    if a.weight_map is None or factor is None:
        loss = _sums_of_squares(difference)
        if factor is not None:
            loss *= factor.view(batch)
            difference = difference.mul_(factor) if a.wanted else difference
        residual = difference
    else:
        residual = difference * factor
        loss = difference.mul_(residual).view(batch, numel).sum(1)
    return loss / numel, residual.to(a.prediction.dtype) if a.wanted else a.prediction.new_empty(0)


def _formula(a: Loss) -> Tensor:
    """What the operator computes, [B], as torch can differentiate it in any way."""
    names = ("prediction", "target", "weight", "weight_map", "alpha", "sigma")
    values = undifferentiated(*(getattr(a, name) for name in names))
    _check(a._replace(**dict(zip(names, values, strict=True))))
    precision = _precision(a)
    square = (a.prediction.to(precision) - a.target.to(precision)).square()
    factor = _factor(a, precision)
    return (square if factor is None else square * factor).flatten(1).mean(1)


@_jit.jit
def _weighted_mse_kernel(
    partial_ptr,
    residual_ptr,
    prediction_ptr,
    target_ptr,
    weight_ptr,
    map_ptr,
    alpha_ptr,
    sigma_ptr,
    gamma,
    share,
    numel,
    channels,
    height,
    width,
    map_height,
    map_width,
    scale_y,
    scale_x,
    PREDICTION: tl.constexpr,
    TOKENS: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """residual = w·M·(prediction − target);  partial = (1/n)·Σ residual·(prediction − target) over a block.

    prediction, target, residual: [batch, numel]. partial: float32 [batch, blocks of a sample]. weight, alpha,
    sigma: float32 [batch]. map: float32 [batch, map_height, map_width]. Absent pointers are None. share: 1/n.
    A program owns BLOCK consecutive elements of one sample.
    """
    sample, base, start, inside, mask = _jit.sample_offsets(numel, BLOCK)
    here = base + inside
    prediction = tl.load(prediction_ptr + here, mask=mask, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + here, mask=mask, other=0.0).to(tl.float32)
    difference = prediction - target
    residual = difference
    if map_ptr is not None:
        corner = map_ptr + sample * map_height * map_width
        first = start.to(tl.int32) + tl.arange(0, BLOCK // RUN) * RUN
        # Past the end of the last tokens a pixel is repeated, so that the map is read where it counts alone.
        pixel = tl.minimum(first // channels, height * width - 1) if TOKENS else first % (height * width)
        y = pixel // width
        x = pixel - y * width
        value = loss_weights.bilinear(corner, y, x, map_height, map_width, scale_y, scale_x)
        residual *= tl.reshape(tl.broadcast_to(value[:, None], (BLOCK // RUN, RUN)), (BLOCK,))
    if weight_ptr is not None:
        residual *= tl.load(weight_ptr + sample)
    if alpha_ptr is not None:
        alpha = tl.load(alpha_ptr + sample)
        residual *= loss_weights.weight_of_levels(alpha, tl.load(sigma_ptr + sample), gamma, PREDICTION)
    tl.store(partial_ptr + tl.program_id(0), share * tl.sum(residual * difference))
    if residual_ptr is not None:
        tl.store(residual_ptr + here, residual.to(residual_ptr.dtype.element_ty), mask=mask)


def partials(prediction: Tensor) -> int:
    """Blocks of a sample, each of which leaves one partial sum."""
    return -(-math.prod(prediction.shape[1:]) // _BLOCK)


def launch_of(a: Loss, partial: Tensor, residual: Tensor | None) -> _jit.Launch:
    """The kernel launch for these arguments, which are not checked again.

    partial: float32 [B, partials(prediction)]. residual: like the prediction, or None if nobody wants it.
    """
    _jit.load_triton()
    batch, channels = a.prediction.shape[0], a.prediction.shape[-1]
    numel = math.prod(a.prediction.shape[1:])
    map_height, map_width = (1, 1) if a.weight_map is None else a.weight_map.shape[1:]
    pointers = (partial, residual, a.prediction, a.target, a.weight, a.weight_map, a.alpha, a.sigma)
    sizes = (channels, a.height, a.width, map_height, map_width)
    scales = (map_height / max(a.height, 1), map_width / max(a.width, 1))
    run = 8 if a.tokens and channels % 8 == 0 else 1  # elements that share a pixel
    constants = {"PREDICTION": a.kind, "TOKENS": a.tokens, "RUN": run, "BLOCK": _BLOCK}
    args = (*pointers, a.gamma, 1 / numel, numel, *sizes, *scales)
    return _jit.Launch(_weighted_mse_kernel, _jit.blocks(numel, batch, _BLOCK), args, constants)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = Loss(*arguments)
    _check(a)
    loss = a.prediction.new_empty(a.prediction.shape[:1], dtype=_precision(a))
    return loss, torch.empty_like(a.prediction) if a.wanted else a.prediction.new_empty(0)


def _refuse_float64(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float64:
            raise TypeError(
                f"{name} must be float32, float16 or bfloat16, got float64: backend='torch' serves it"
            )


def _launch(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = Loss(*arguments)
    _refuse_float64(prediction=a.prediction, target=a.target)
    _check(a)
    batch = len(a.prediction)
    partial = a.prediction.new_empty((batch, partials(a.prediction)), dtype=torch.float32)
    residual = torch.empty_like(a.prediction) if a.wanted else None
    launch_of(a, partial, residual).run(partial.device)
    return partial.sum(1), a.prediction.new_empty(0) if residual is None else residual


def _save(ctx, inputs, output) -> None:
    a, (_, residual) = Loss(*inputs), output
    ctx.set_materialize_grads(False)
    ctx.dtypes = a.prediction.dtype, a.target.dtype
    if a.wanted:
        ctx.save_for_backward(residual)


def _backward(ctx, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(Loss._fields)
    if gradient is None:
        return nothing
    (residual,) = ctx.saved_tensors
    dtypes = [dtype if ctx.needs_input_grad[i] else None for i, dtype in enumerate(ctx.dtypes)]
    run = _backward_operator.on(ctx.backend, residual.device)
    slopes = run(residual, gradient.contiguous(), *dtypes)
    return (*(s if dtype else None for s, dtype in zip(slopes, dtypes, strict=True)), *nothing[2:])


_operator = Operator(
    "weighted_mse(Tensor prediction, Tensor target, Tensor? weight, Tensor? weight_map, SymInt height, "
    "SymInt width, bool tokens, Tensor? alpha, Tensor? sigma, float gamma, str kind, bool wanted) "
    "-> (Tensor, Tensor)",
    twin=_twin,
    launch=_launch,
    fake=_fake,
    autograd=(_save, _backward),
)


# The gradient: operators over (residual, gradient of the loss, dtypes of prediction and target where wanted).


def _check_backward(residual: Tensor, gradient: Tensor) -> None:
    check_tensor("residual", residual, residual.device, WITH_FLOAT64)
    check_tensor("gradient", gradient, residual.device, (torch.float32, torch.float64), residual.shape[:1])


def _backward_fake(residual: Tensor, gradient: Tensor, *dtypes: torch.dtype | None) -> tuple[Tensor, ...]:
    nothing = residual.new_empty
    return tuple(torch.empty_like(residual, dtype=dtype) if dtype else nothing(0) for dtype in dtypes)


def _backward_twin(residual: Tensor, gradient: Tensor, *dtypes: torch.dtype | None) -> tuple[Tensor, ...]:
    _check_backward(residual, gradient)
    scale = _per_sample(gradient * (2 / math.prod(residual.shape[1:])), residual)
    return tuple(
        (residual * signed).to(dtype) if dtype else residual.new_empty(0)
        for signed, dtype in zip((scale, -scale), dtypes, strict=True)
    )


@_jit.jit
def _weighted_mse_backward_kernel(
    prediction_ptr, target_ptr, residual_ptr, gradient_ptr, twice_share, numel, BLOCK: tl.constexpr
):
    """prediction = (2/n)·gradient·residual;  target = −prediction.

    prediction, target, residual: [batch, numel]; one of the first two may be None. gradient: float32 [batch].
    twice_share: 2/n. A program owns BLOCK consecutive elements of one sample.
    """
    sample, base, _, inside, mask = _jit.sample_offsets(numel, BLOCK)
    here = base + inside
    scale = twice_share * tl.load(gradient_ptr + sample)
    slope = scale * tl.load(residual_ptr + here, mask=mask, other=0.0).to(tl.float32)
    if prediction_ptr is not None:
        tl.store(prediction_ptr + here, slope.to(prediction_ptr.dtype.element_ty), mask=mask)
    if target_ptr is not None:
        tl.store(target_ptr + here, (-slope).to(target_ptr.dtype.element_ty), mask=mask)


def backward_launch_of(
    prediction: Tensor | None, target: Tensor | None, residual: Tensor, gradient: Tensor
) -> _jit.Launch:
    """The kernel launch that writes the gradients of prediction and target, those that are not None."""
    _jit.load_triton()
    numel = math.prod(residual.shape[1:])
    args = (prediction, target, residual, gradient, 2 / numel, numel)
    grid = _jit.blocks(numel, residual.shape[0], _BLOCK)
    return _jit.Launch(_weighted_mse_backward_kernel, grid, args, {"BLOCK": _BLOCK})


def _backward_launch(residual: Tensor, gradient: Tensor, *dtypes: torch.dtype | None) -> tuple[Tensor, ...]:
    _refuse_float64(residual=residual, gradient=gradient)
    _check_backward(residual, gradient)
    slopes = _backward_fake(residual, gradient, *dtypes)
    prediction, target = (slope if dtype else None for slope, dtype in zip(slopes, dtypes, strict=True))
    if any(dtypes):
        backward_launch_of(prediction, target, residual, gradient).run(residual.device)
    return slopes


_backward_operator = Operator(
    "weighted_mse_backward(Tensor residual, Tensor gradient, ScalarType? prediction_dtype, "
    "ScalarType? target_dtype) -> (Tensor, Tensor)",
    twin=_backward_twin,
    launch=_backward_launch,
    fake=_backward_fake,
)


def weighted_mse(
    prediction: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    weight_map: Tensor | None = None,
    size: tuple[int, int] | None = None,
    min_snr: MinSNR | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """The mean of w·M·(prediction − target)² over each sample's elements, then over the samples.

    prediction, target: [B, ...] (or, with a map, images [B, C, H, W] or tokens [B, H·W, C] with their size),
    float32, float16 or bfloat16 each; both have a derivative. weight: float32 [B]. weight_map: float32
    [B, h, w], M after bilinear interpolation to H×W (align_corners=False, no antialiasing). size: (H, W) of
    tokens. min_snr: multiplies w by `min_snr_weight`. Weights, map and levels have no derivative. reduction:
    "mean" or "none". Computed in float32; backend="torch" also takes float64.

    Returns a float32 scalar, or float32 [B] for "none". The residual w·M·(prediction − target), in the
    prediction's dtype, is all that is kept for the gradient, and only if one is wanted. Forward-mode
    derivatives and torch.func are served by the formula in plain torch.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    gamma, alpha, sigma, kind = (1.0, None, None, "") if min_snr is None else min_snr
    if min_snr is not None:
        check_min_snr(gamma, kind)
    for name, tensor in (("weight", weight), ("weight_map", weight_map), ("alpha", alpha), ("sigma", sigma)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires grad, which only prediction and target may: detach it")
    height, width = _size(prediction, size) if size is not None or weight_map is not None else (0, 0)
    wanted = torch.is_grad_enabled() and (prediction.requires_grad or target.requires_grad)
    levels = (alpha, sigma, float(gamma), kind)
    a = Loss(prediction, target, weight, weight_map, height, width, size is not None, *levels, wanted)
    if differentiated_otherwise(backend, prediction, target, weight, weight_map, alpha, sigma):
        loss = _formula(a)
    else:
        loss, _ = _operator.on(backend, prediction.device)(*a)
    return loss.mean() if reduction == "mean" else loss


def _size(prediction: Tensor, size: tuple[int, int] | None) -> tuple[int, int]:
    shape = list(prediction.shape)
    if size is None:
        if len(shape) != 4:
            raise ValueError(
                f"a weight_map needs prediction [B, C, H, W], or tokens and their size: got {shape}"
            )
        return shape[2], shape[3]
    height, width = size
    if len(shape) != 3 or height < 1 or width < 1 or shape[1] != height * width:
        raise ValueError(f"size {height}×{width} is that of tokens [B, {height * width}, C], got {shape}")
    return height, width
