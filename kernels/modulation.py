"""RMS normalisation with the scale and shift of an AdaLN-Zero block, per sample.

RMSNorm is Zhang and Sennrich's (2019), the modulation that of Peebles and Xie's DiT (2023):

    x̂ = x·rstd,  rstd = 1/√(mean(x²) + ε),        y = x̂·m + shift,  m = weight·(1 + scale)

With A = Σ_n dy·x̂, a row of D numbers per sample, the gradients are

    dx = rstd·(dy·m − x̂·mean(dy·m·x̂))             dshift = Σ_n dy
    dscale = weight·A                              dweight = Σ_b (1 + scale)·A
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_sampler.kernels import _jit
from moe_sampler.kernels._dispatch import (
    FLOATS,
    WITH_FLOAT64,
    Operator,
    check_tensor,
    compute_dtype,
    differentiated_otherwise,
    undifferentiated,
)

if TYPE_CHECKING:
    import triton.language as tl

MAX_WIDTH = 4096  # a program holds whole rows; twice that spills registers on sm_100

_CHUNK = 32  # rows that one program of the backward kernel sums
_COLUMNS = 16  # whose sums one program ends
_SAMPLES = 8  # that it takes at once


def _check(
    x: Tensor, weight: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float = 0.0
) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must have shape [B, N, D], got {list(x.shape)}")
    check_tensor("x", x, x.device, WITH_FLOAT64)
    batch, _, width = x.shape
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"the last dimension of x must lie in [1, {MAX_WIDTH}], got {width}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    # Under autocast a float32 stream meets the 16-bit modulation of a Linear.
    dtypes = FLOATS if x.dtype == torch.float32 else (x.dtype, torch.float32)
    if weight is not None:
        check_tensor("weight", weight, x.device, dtypes, (width,))
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor is not None:
            check_tensor(name, tensor, x.device, dtypes, (batch, width), strided=True)


def _formula(
    x: Tensor, weight: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float
) -> Tensor:
    """What the operator computes, as torch can differentiate it in any way."""
    x_value, weight_value, scale_value, shift_value = undifferentiated(x, weight, scale, shift)
    _check(x_value, weight_value, scale_value, shift_value, eps)
    dtype = compute_dtype(x)
    y = x.to(dtype)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(dtype)
    if scale is not None:
        y = y * (1 + scale.to(dtype))[:, None]
    if shift is not None:
        y = y + shift.to(dtype)[:, None]
    return y.to(x.dtype)


def _refuse_float64(x: Tensor) -> None:
    if x.dtype == torch.float64:
        raise TypeError("the kernel computes in float32; backend='torch' serves float64")


def _multiplier(weight: Tensor | None, scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """m, [B, 1, D] or [1, 1, D]; None where it is 1."""
    if scale is None:
        return None if weight is None else weight.to(dtype)[None, None]
    m = scale.to(dtype) + 1
    if weight is not None:
        m.mul_(weight)
    return m[:, None]


def _twin(
    x: Tensor, weight: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float, keep_rstd: bool
) -> tuple[Tensor, Tensor]:
    _check(x, weight, scale, shift, eps)
    dtype = compute_dtype(x)
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = torch.mul(x, rstd[..., None])
    m = _multiplier(weight, scale, dtype)
    if shift is not None:
        offset = shift.to(dtype)[:, None]
        y = y.add_(offset) if m is None else torch.addcmul(offset, y, m, out=y)
    elif m is not None:
        y.mul_(m)
    return y.to(x.dtype), rstd if keep_rstd else rstd.new_empty(0)


@_jit.jit(do_not_specialize=("tokens",))
def _rms_norm_modulate_kernel(
    y_ptr,
    rstd_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    scale_stride,
    shift_stride,
    tokens,
    width,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """rstd = 1/√(mean(x²) + ε);  y = x·rstd·weight·(1 + scale) + shift.

    y, x: [batch, tokens, width]. rstd: float32 [batch, tokens]. weight: [width]. scale, shift:
    [batch, width], rows scale_stride and shift_stride apart. rstd, weight, scale and shift may be None.
    A program owns ROWS consecutive rows of one sample.
    """
    sample, start = _first_row(tokens, ROWS)
    row = tl.arange(0, ROWS)
    row_inside = start + row < tokens
    column = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], (ROWS, BLOCK))
    inside = row_inside[:, None] & (column < width)
    first = sample * tokens + start
    here = first * width + (row[:, None] * width + column)
    x = tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    y = x * rstd[:, None] * _load_multiplier(weight_ptr, scale_ptr, sample * scale_stride, column, width)
    if shift_ptr is not None:
        y += _load_row(shift_ptr + sample * shift_stride, column, width)
    tl.store(y_ptr + here, y.to(y_ptr.dtype.element_ty), mask=inside)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + (first + row), rstd, mask=row_inside)


@_jit.jit
def _first_row(tokens, COUNT: tl.constexpr):
    """(sample, the first of the COUNT rows of that sample that this program owns), the sample in int64."""
    program = tl.program_id(0)
    per_sample = (tokens - 1) // COUNT + 1
    sample = program // per_sample
    return sample.to(tl.int64), (program - sample * per_sample) * COUNT


@_jit.jit
def _load_row(row_ptr, column, width):
    """A row of the modulation for every row of a tile, so that it lies in registers just as the tile does."""
    return tl.load(row_ptr + column, mask=column < width, other=0.0).to(tl.float32)


@_jit.jit
def _load_multiplier(weight_ptr, scale_ptr, scale_offset, column, width):
    """m = weight·(1 + scale)"""
    m = 1.0
    if scale_ptr is not None:
        m += _load_row(scale_ptr + scale_offset, column, width)
    if weight_ptr is not None:
        m *= _load_row(weight_ptr, column, width)
    return m


def _tile(width: int) -> dict[str, Any]:
    """Whole rows, 8 elements a thread."""
    block = 1 << (width - 1).bit_length()
    rows = min(max(1024 // block, 1), _CHUNK)
    # Without a limit the assembler makes up one of its own, and spills to keep it.
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(4, block // 256), "maxnreg": 128}


def launch_of(
    y: Tensor,
    rstd: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> _jit.Launch:
    """The forward launch: y: [B, N, D] like x; rstd: float32 [B, N] or None."""
    _jit.load_triton()
    batch, tokens, width = x.shape
    tile = _tile(width)
    strides = (0 if scale is None else scale.stride(0), 0 if shift is None else shift.stride(0))
    args = (y, rstd, x, weight, scale, shift, *strides, tokens, width, eps)
    return _jit.Launch(_rms_norm_modulate_kernel, _jit.blocks(tokens, batch, tile["ROWS"]), args, tile)


def _launch(
    x: Tensor, weight: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float, keep_rstd: bool
) -> tuple[Tensor, Tensor]:
    _refuse_float64(x)
    _check(x, weight, scale, shift, eps)
    y = torch.empty_like(x)
    rstd = x.new_empty(x.shape[:2] if keep_rstd else (0,), dtype=torch.float32)
    launch_of(y, rstd if keep_rstd else None, x, weight, scale, shift, eps).run(x.device)
    return y, rstd


def _fake(
    x: Tensor, weight: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float, keep_rstd: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:2] if keep_rstd else (0,), dtype=compute_dtype(x))


# Backward


def _check_backward(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, scale: Tensor | None
) -> None:
    _check(x, weight, scale, None)
    check_tensor("grad", grad, x.device, (x.dtype,), x.shape)
    check_tensor("rstd", rstd, x.device, (compute_dtype(x),), x.shape[:2])


def _backward_twin(
    grad: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    needs: Sequence[bool],
    shift_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_backward(grad, x, rstd, weight, scale)
    need_x, need_weight, need_scale, need_shift = needs
    dx, dweight, dscale, dshift = (x.new_empty(0, dtype=d) for d in _dtypes(x, weight, scale, shift_dtype))
    dtype = compute_dtype(x)
    dy, xs = grad.to(dtype), x.to(dtype)
    if need_shift:
        dshift = dy.sum(1).to(shift_dtype)
    if need_x or need_weight or need_scale:
        product = (dy * xs).mul_(rstd[..., None])
        along = product.sum(1) if need_weight or need_scale else product
        if weight is not None and need_weight:
            summed = along if scale is None else torch.addcmul(along, along, scale.to(dtype))
            dweight = summed.sum(0).to(weight.dtype)
        if scale is not None and need_scale:
            dscale = (along.clone() if weight is None else along * weight).to(scale.dtype)
        if need_x:
            m = _multiplier(weight, scale, dtype)
            total = product.sum(-1, keepdim=True) if m is None else torch.matmul(product, m.transpose(1, 2))
            factor = total.mul_(rstd[..., None]).div_(-x.shape[-1])
            # The product has served; its memory becomes dx.
            product = product.copy_(dy) if m is None else torch.mul(dy, m, out=product)
            dx = product.addcmul_(xs, factor).mul_(rstd[..., None]).to(x.dtype)
    return dx, dweight, dscale, dshift


def _dtypes(
    x: Tensor, weight: Tensor | None, scale: Tensor | None, shift_dtype: torch.dtype
) -> tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]:
    """Those of the gradients, which are those of the inputs."""
    of_weight, of_scale = (x.dtype if t is None else t.dtype for t in (weight, scale))
    return x.dtype, of_weight, of_scale, shift_dtype


@_jit.jit(do_not_specialize=("tokens",))
def _rms_norm_modulate_backward_kernel(
    dx_ptr,
    along_ptr,
    dshift_ptr,
    dy_ptr,
    x_ptr,
    rstd_ptr,
    weight_ptr,
    scale_ptr,
    scale_stride,
    tokens,
    width,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = rstd·(dy·m − x̂·mean(dy·m·x̂));  along = Σ dy·x̂ and dshift = Σ dy over the rows of a program.

    dx, dy, x: [batch, tokens, width]. rstd: float32 [batch, tokens]. along, dshift: float32
    [programs, width]. weight: [width]. scale: [batch, width], rows scale_stride apart. dx, along, dshift,
    weight and scale may be None. A program owns CHUNK consecutive rows of one sample, ROWS at a time.
    """
    sample, start = _first_row(tokens, CHUNK)
    row = tl.arange(0, ROWS)
    column = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], (ROWS, BLOCK))
    within = row[:, None] * width + column
    m = _load_multiplier(weight_ptr, scale_ptr, sample * scale_stride, column, width)
    along = tl.zeros((ROWS, BLOCK), tl.float32)
    dshift = tl.zeros((ROWS, BLOCK), tl.float32)
    for done in range(0, tl.minimum(CHUNK, tokens - start), ROWS):
        row_inside = start + done + row < tokens
        inside = row_inside[:, None] & (column < width)
        first = sample * tokens + (start + done)
        here = first * width + within
        dy = tl.load(dy_ptr + here, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + (first + row), mask=row_inside, other=0.0)[:, None]
        x_hat = x * rstd
        along += dy * x_hat
        dshift += dy
        if dx_ptr is not None:
            g = dy * m
            mean = tl.sum(g * x_hat, axis=1) / width
            dx = rstd * (g - x_hat * mean[:, None])
            tl.store(dx_ptr + here, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    column = tl.arange(0, BLOCK)
    mine = tl.program_id(0).to(tl.int64) * width + column
    if along_ptr is not None:
        tl.store(along_ptr + mine, tl.sum(along, axis=0), mask=column < width)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + mine, tl.sum(dshift, axis=0), mask=column < width)


def chunks_of(tokens: int) -> int:
    """The rows of partial sums that the backward launch writes for each sample."""
    return -(-tokens // _CHUNK)


def backward_launch_of(
    dx: Tensor | None,
    along: Tensor | None,
    dshift: Tensor | None,
    grad: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
) -> _jit.Launch:
    """The backward launch: dx: [B, N, D] or None; along and dshift: float32 [B, chunks_of(N), D] or None."""
    _jit.load_triton()
    batch, tokens, width = x.shape
    stride = 0 if scale is None else scale.stride(0)
    args = (dx, along, dshift, grad, x, rstd, weight, scale, stride, tokens, width)
    grid = _jit.blocks(tokens, batch, _CHUNK)
    return _jit.Launch(_rms_norm_modulate_backward_kernel, grid, args, {"CHUNK": _CHUNK, **_tile(width)})


@_jit.jit(do_not_specialize=("batch", "chunks"))
def _rms_norm_modulate_sums_kernel(
    dweight_ptr,
    dscale_ptr,
    dshift_ptr,
    along_ptr,
    along_shift_ptr,
    weight_ptr,
    scale_ptr,
    scale_stride,
    batch,
    chunks,
    width,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A = Σ along:  dweight = Σ_b (1 + scale)·A,  dscale = weight·A;  dshift = Σ along_shift.

    along, along_shift: float32 [batch, chunks, width], from the backward kernel. dweight, weight: [width].
    dscale, dshift: [batch, width]. scale: [batch, width], rows scale_stride apart. dweight, dscale and along
    may be None, and so may dshift and along_shift, weight and scale. A program owns BLOCK columns and adds
    up in one order, so the same gradients have the same bits. It has SAMPLES samples' rows on their way at
    once: one after another they would take as long as the backward launch itself.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    dweight = tl.zeros((BLOCK,), tl.float32)
    weight = tl.full((1, BLOCK), 1.0, tl.float32)
    if weight_ptr is not None:
        weight = _load_row(weight_ptr, column[None, :], width)
    for first in range(0, batch, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)
        own = sample.to(tl.int64)[:, None]
        mask = (sample < batch)[:, None] & inside[None, :]
        if along_ptr is not None:
            total = _column_sums(along_ptr, own, column, mask, chunks, width, SAMPLES, ROWS, BLOCK)
            if dscale_ptr is not None:
                dscale = (weight * total).to(dscale_ptr.dtype.element_ty)
                tl.store(dscale_ptr + own * width + column[None, :], dscale, mask=mask)
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + own * scale_stride + column[None, :], mask=mask, other=0.0)
                total += total * scale.to(tl.float32)
            dweight += tl.sum(total, axis=0)
        if dshift_ptr is not None:
            total = _column_sums(along_shift_ptr, own, column, mask, chunks, width, SAMPLES, ROWS, BLOCK)
            dshift = total.to(dshift_ptr.dtype.element_ty)
            tl.store(dshift_ptr + own * width + column[None, :], dshift, mask=mask)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + column, dweight.to(dweight_ptr.dtype.element_ty), mask=inside)


@_jit.jit
def _column_sums(
    ptr, sample, column, mask, chunks, width, SAMPLES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """[SAMPLES, BLOCK]: the sums of each sample's `chunks` rows, where `mask` has any.

    sample: int64 [SAMPLES, 1]. mask: [SAMPLES, BLOCK].
    """
    row = tl.arange(0, ROWS)[None, :, None]
    first = (sample * chunks)[:, :, None]
    here = mask[:, None, :]
    total = tl.zeros((SAMPLES, ROWS, BLOCK), tl.float32)
    for done in range(0, chunks, ROWS):
        rows = done + row
        at = ptr + (first + rows) * width + column[None, None, :]
        total += tl.load(at, mask=here & (rows < chunks), other=0.0)
    return tl.sum(total, axis=1)


def sums_launch_of(
    dweight: Tensor | None,
    dscale: Tensor | None,
    dshift: Tensor | None,
    along: Tensor | None,
    along_shift: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
) -> _jit.Launch:
    """The launch that ends the backward: dweight: [D], dscale and dshift: [B, D], from the partial sums
    along and along_shift: float32 [B, chunks_of(N), D]; what is not wanted, and its sums, are None."""
    _jit.load_triton()
    batch, chunks, width = next(t for t in (along, along_shift) if t is not None).shape
    stride = 0 if scale is None else scale.stride(0)
    args = (dweight, dscale, dshift, along, along_shift, weight, scale, stride, batch, chunks, width)
    grid = _jit.blocks(width, 1, _COLUMNS)
    # For maxnreg see _tile.
    constants = {"SAMPLES": _SAMPLES, "ROWS": 32, "BLOCK": _COLUMNS, "num_warps": 8, "maxnreg": 128}
    return _jit.Launch(_rms_norm_modulate_sums_kernel, grid, args, constants)


def _backward_launch(
    grad: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    needs: Sequence[bool],
    shift_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One launch, and a second one where sums are wanted."""
    _refuse_float64(x)
    _check_backward(grad, x, rstd, weight, scale)
    gradients = _backward_fake(grad, x, rstd, weight, scale, needs, shift_dtype)
    dx, dweight, dscale, dshift = (g if need else None for g, need in zip(gradients, needs, strict=True))
    partial = rstd.new_empty((2, len(x), chunks_of(x.shape[1]), x.shape[2]))
    along = None if dweight is None and dscale is None else partial[0]
    along_shift = None if dshift is None else partial[1]
    backward_launch_of(dx, along, along_shift, grad, x, rstd, weight, scale).run(x.device)
    if any(needs[1:]):
        sums_launch_of(dweight, dscale, dshift, along, along_shift, weight, scale).run(x.device)
    return gradients


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    needs: Sequence[bool],
    shift_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, width = x.shape
    shapes = (x.shape, (width,), (batch, width), (batch, width))
    dtypes = _dtypes(x, weight, scale, shift_dtype)
    dx, dweight, dscale, dshift = (
        x.new_empty(shape if need else (0,), dtype=dtype)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )
    return dx, dweight, dscale, dshift


_backward_operator = Operator(
    "rms_norm_modulate_backward(Tensor grad, Tensor x, Tensor rstd, Tensor? weight, Tensor? scale, "
    "bool[4] needs, ScalarType shift_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    twin=_backward_twin,
    launch=_backward_launch,
    fake=_backward_fake,
)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, scale, shift, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], weight, scale)
    ctx.shift_dtype = x.dtype if shift is None else shift.dtype


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple:
    if grad is None:
        return (None,) * 6
    x, rstd, weight, scale = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    run = _backward_operator.on(ctx.backend, x.device)
    gradients = run(grad.contiguous(), x, rstd, weight, scale, needs, ctx.shift_dtype)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None


_operator = Operator(
    "rms_norm_modulate(Tensor x, Tensor? weight, Tensor? scale, Tensor? shift, float eps, bool keep_rstd) "
    "-> (Tensor, Tensor)",
    twin=_twin,
    launch=_launch,
    fake=_fake,
    autograd=(_save, _backward),
)


def rms_norm_modulate(
    x: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """x·rsqrt(mean(x², last) + eps)·weight·(1 + scale) + shift, differentiable in all four tensors.

    Without scale and shift this is RMSNorm; each of weight, scale and shift may be left out.

    x: [B, N, D], float32, float16 or bfloat16, contiguous, D at most 4096. weight: [D]. scale, shift: [B, D],
    rows of any stride, so chunks of one Linear's output are read in place. weight, scale and shift are
    float32 or in x's dtype; beside a float32 x, as autocast makes it, float16 or bfloat16 too. Computed in
    float32 and returned in x's dtype, [B, N, D]; each gradient has the dtype of its input. float64 is for the
    torch backend alone, which then computes in float64. Forward-mode derivatives and torch.func are served by
    the formula in plain torch.
    Raises TypeError for a wrong dtype; ValueError for a wrong shape, device, layout or eps.
    """
    if differentiated_otherwise(backend, x, weight, scale, shift):
        return _formula(x, weight, scale, shift, eps)
    wanted = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, scale, shift)
    )
    return _operator.on(backend, x.device)(x, weight, scale, shift, eps, wanted)[0]
