"""Rotary position embedding of queries and keys, with a modulation per token, head and sample.

Su et al. (2021), on interleaved pairs: with c = cos[n, i] and s = sin[n, i], token n's pair i becomes

    (x_2i, x_2i+1) → μ·(x_2i·c − x_2i+1·s,  x_2i·s + x_2i+1·c),        y = μ·R·x

where μ = modulation[b, h, n], or 1. R is linear, so with r = Rᵀ·dy, the pairs turned back by −s,

    dx = μ·r,        dμ = Σ r_q·q + Σ r_k·k over the head's dimensions.

Both directions are one kernel: turning (q, k) forwards, or (dq, dk) back while summing dμ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

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

MAX_HEAD = 1024  # a program holds whole tokens of a head

_BLOCK = 1024


def _check(
    dtypes: tuple[torch.dtype, ...],
    cos: Tensor,
    sin: Tensor,
    modulation: Tensor | None,
    q_name: str,
    q: Tensor,
    /,
    **others: Tensor | None,
) -> None:
    if q.dtype == torch.float64 and torch.float64 not in dtypes:
        raise TypeError("the kernel computes in float32; backend='torch' serves float64")
    if q.ndim != 4:
        raise ValueError(f"{q_name} must have shape [B, H, N, D], got {list(q.shape)}")
    batch, heads, tokens, width = q.shape
    if width % 2 or not 2 <= width <= MAX_HEAD:
        raise ValueError(
            f"the last dimension of {q_name} must be even and lie in [2, {MAX_HEAD}], got {width}"
        )
    check_tensor(q_name, q, q.device, dtypes, strided=True)
    for name, tensor in others.items():
        if tensor is not None:
            check_tensor(name, tensor, q.device, (q.dtype,), q.shape, strided=True)
    exact = (compute_dtype(q),)
    check_tensor("cos", cos, q.device, exact, (tokens, width // 2))
    check_tensor("sin", sin, q.device, exact, (tokens, width // 2))
    if modulation is not None:
        check_tensor("modulation", modulation, q.device, exact, (batch, heads, tokens))


def _pairs(x: Tensor) -> Tensor:
    """x: [..., D] as complex numbers [..., D/2], without a copy where the strides allow it."""
    if x.storage_offset() % 2 or any(stride % 2 for stride in x.stride()[:-1]):
        x = x.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(x.unflatten(-1, (x.shape[-1] // 2, 2)))


def _turn(x: Tensor, turns: Tensor) -> Tensor:
    """x: [B, H, N, D], turns: complex [N, D/2] → contiguous, in the precision of `turns`."""
    x = x.to(turns.real.dtype)
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(_pairs(x), turns, out=_pairs(turned))
    return turned


def _twin(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, modulation: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(WITH_FLOAT64, cos, sin, modulation, "q", q, k=k)
    turns = torch.complex(cos, sin)
    turned = _turn(q, turns), _turn(k, turns)
    if modulation is not None:
        for x in turned:
            x.mul_(modulation[..., None])
    return turned[0].to(q.dtype), turned[1].to(q.dtype)


def _formula(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, modulation: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the operator computes, as torch can differentiate it in any way."""
    values = undifferentiated(cos, sin, modulation, q, k)
    _check(WITH_FLOAT64, values[0], values[1], values[2], "q", values[3], k=values[4])

    def turned(x: Tensor) -> Tensor:
        x_0, x_1 = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        y = torch.stack((x_0 * cos - x_1 * sin, x_0 * sin + x_1 * cos), -1).flatten(-2)
        return (y if modulation is None else y * modulation[..., None]).to(x.dtype)

    return turned(q), turned(k)


class Backward(NamedTuple):
    """The backward operator's arguments; with q and k, the modulation's gradient is wanted too."""

    grad_q: Tensor
    grad_k: Tensor
    cos: Tensor
    sin: Tensor
    modulation: Tensor | None
    q: Tensor | None
    k: Tensor | None


def _backward_twin(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = Backward(*arguments)
    _check_backward(WITH_FLOAT64, a)
    turns = torch.complex(a.cos, -a.sin)
    back_q, back_k = _turn(a.grad_q, turns), _turn(a.grad_k, turns)
    dmodulation = a.cos.new_empty(0)
    if a.q is not None and a.k is not None:
        product = torch.mul(back_q, a.q).addcmul_(back_k, a.k.to(back_k.dtype))
        dmodulation = product.sum(-1)
    if a.modulation is not None:
        back_q.mul_(a.modulation[..., None])
        back_k.mul_(a.modulation[..., None])
    return back_q.to(a.grad_q.dtype), back_k.to(a.grad_q.dtype), dmodulation


@_jit.jit(
    do_not_specialize=(
        "heads",
        "tokens",
        *(f"{x}_stride_{axis}" for x in ("in_q", "in_k", "q", "k") for axis in ("b", "h", "n")),
    )
)
def _rope_qk_kernel(
    out_q_ptr,
    out_k_ptr,
    dmodulation_ptr,
    in_q_ptr,
    in_k_ptr,
    cos_ptr,
    sin_ptr,
    modulation_ptr,
    q_ptr,
    k_ptr,
    in_q_stride_b,
    in_q_stride_h,
    in_q_stride_n,
    in_k_stride_b,
    in_k_stride_h,
    in_k_stride_n,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    heads,
    tokens,
    BACK: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = μ·R·in, or where BACK out = μ·Rᵀ·in and dmodulation = Σ (Rᵀ·in)·x, over D and both q and k.

    out_q, out_k: [batch, heads, tokens, WIDTH]. in_q, in_k, q, k: the same shape, strided, in units of UNIT
    elements. cos, sin: float32 [tokens, WIDTH/2]. modulation, dmodulation: float32 [batch, heads, tokens].
    modulation may be None, and so may dmodulation, q and k together.
    A program owns TOKENS consecutive tokens of one head of one sample.
    """
    program = tl.program_id(0)
    head = program % heads  # the heads of a token lie side by side in a projection's output
    per_sample = (tokens - 1) // TOKENS + 1
    sample = (program // heads // per_sample).to(tl.int64)
    first = (program // heads % per_sample) * TOKENS
    token = first + tl.arange(0, TOKENS)
    is_token = token < tokens
    pair = tl.arange(0, BLOCK // 2)
    column = tl.arange(0, BLOCK)[None, :]
    inside = is_token[:, None] & (column < WIDTH)

    turn = token[:, None] * (WIDTH // 2) + pair[None, :]
    turn_inside = is_token[:, None] & (pair[None, :] < WIDTH // 2)
    cos = tl.load(cos_ptr + turn, mask=turn_inside, other=1.0)
    sin = tl.load(sin_ptr + turn, mask=turn_inside, other=0.0)
    if BACK:
        sin = -sin
    row = (sample * heads + head) * tokens + first
    here = row * WIDTH + (tl.arange(0, TOKENS)[:, None] * WIDTH + column)
    row += tl.arange(0, TOKENS)

    in_q = sample * in_q_stride_b + head * in_q_stride_h.to(tl.int64) + token * in_q_stride_n.to(tl.int64)
    in_k = sample * in_k_stride_b + head * in_k_stride_h.to(tl.int64) + token * in_k_stride_n.to(tl.int64)
    turned_q = _turned(in_q_ptr + in_q[:, None] * UNIT + column, inside, cos, sin, TOKENS, BLOCK)
    turned_k = _turned(in_k_ptr + in_k[:, None] * UNIT + column, inside, cos, sin, TOKENS, BLOCK)
    if dmodulation_ptr is not None:
        at_q = sample * q_stride_b + head * q_stride_h.to(tl.int64) + token * q_stride_n.to(tl.int64)
        at_k = sample * k_stride_b + head * k_stride_h.to(tl.int64) + token * k_stride_n.to(tl.int64)
        q = tl.load(q_ptr + at_q[:, None] * UNIT + column, mask=inside, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + at_k[:, None] * UNIT + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dmodulation_ptr + row, tl.sum(turned_q * q + turned_k * k, axis=1), mask=is_token)
    if modulation_ptr is not None:
        modulation = tl.load(modulation_ptr + row, mask=is_token, other=0.0)[:, None]
        turned_q *= modulation
        turned_k *= modulation
    tl.store(out_q_ptr + here, turned_q.to(out_q_ptr.dtype.element_ty), mask=inside)
    tl.store(out_k_ptr + here, turned_k.to(out_k_ptr.dtype.element_ty), mask=inside)


@_jit.jit
def _turned(pointers, inside, cos, sin, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """R·x in float32 [TOKENS, BLOCK]; a thread keeps both numbers of a pair."""
    x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    x_0, x_1 = tl.split(tl.reshape(x, (TOKENS, BLOCK // 2, 2)))
    return tl.reshape(tl.join(x_0 * cos - x_1 * sin, x_0 * sin + x_1 * cos), (TOKENS, BLOCK))


def launch_of(
    out_q: Tensor,
    out_k: Tensor,
    in_q: Tensor,
    in_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    modulation: Tensor | None,
    *,
    back: bool = False,
    dmodulation: Tensor | None = None,
    q: Tensor | None = None,
    k: Tensor | None = None,
) -> _jit.Launch:
    """The kernel launch: forwards from q and k, or back from their gradients (and q, k for dmodulation).

    out_q, out_k: contiguous [B, H, N, D]; dmodulation: float32 [B, H, N] or None.
    """
    _jit.load_triton()
    batch, heads, tokens, width = in_q.shape
    strides = [s for x in (in_q, in_k, q, k) for s in ((0, 0, 0) if x is None else x.stride()[:3])]
    # 8 elements are 128 bits or more: saying that all rows start at a multiple keeps accesses that wide.
    unit = 1 if width % 8 or any(s % 8 for s in strides) else 8
    block = 1 << (width - 1).bit_length()
    rows = max(_BLOCK // block, 1)
    args = (out_q, out_k, dmodulation, in_q, in_k, cos, sin, modulation, q, k)
    constants = {"BACK": back, "WIDTH": width, "UNIT": unit, "TOKENS": rows, "BLOCK": block}
    grid = _jit.blocks(tokens, batch * heads, rows)
    return _jit.Launch(
        _rope_qk_kernel, grid, (*args, *(s // unit for s in strides), heads, tokens), constants
    )


def _launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, modulation: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check(FLOATS, cos, sin, modulation, "q", q, k=k)
    out = q.new_empty(q.shape), q.new_empty(q.shape)
    launch_of(*out, q, k, cos, sin, modulation).run(q.device)
    return out


def _check_backward(dtypes: tuple[torch.dtype, ...], a: Backward) -> None:
    if (a.q is None) != (a.k is None):
        raise ValueError("the gradient of modulation needs both q and k")
    _check(dtypes, a.cos, a.sin, a.modulation, "grad_q", a.grad_q, grad_k=a.grad_k, q=a.q, k=a.k)


def _backward_launch(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = Backward(*arguments)
    _check_backward(FLOATS, a)
    dq, dk, dmodulation = _backward_fake(*arguments)
    wanted = None if a.q is None else dmodulation
    options = {"back": True, "dmodulation": wanted, "q": a.q, "k": a.k}
    launch_of(dq, dk, *a[:5], **options).run(a.grad_q.device)
    return dq, dk, dmodulation


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    a, shape = Backward(*arguments), arguments[0].shape
    dmodulation = a.cos.new_empty(0 if a.q is None else shape[:3])
    return a.grad_q.new_empty(shape), a.grad_q.new_empty(shape), dmodulation


_backward_operator = Operator(
    "rope_qk_backward(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin, Tensor? modulation, "
    "Tensor? q, Tensor? k) -> (Tensor, Tensor, Tensor)",
    twin=_backward_twin,
    launch=_backward_launch,
    fake=_backward_fake,
)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, cos, sin, modulation = inputs
    pair = (q, k) if ctx.needs_input_grad[4] else (None, None)
    ctx.save_for_backward(cos, sin, modulation, *pair)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple:
    cos, sin, modulation, q, k = ctx.saved_tensors
    grad_q, grad_k = (g if g.stride(-1) == 1 else g.contiguous() for g in (grad_q, grad_k))
    dq, dk, dmodulation = _backward_operator.on(ctx.backend, cos.device)(
        grad_q, grad_k, cos, sin, modulation, q, k
    )
    return dq, dk, None, None, None if q is None else dmodulation


_operator = Operator(
    "rope_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? modulation) -> (Tensor, Tensor)",
    twin=_twin,
    launch=_launch,
    fake=lambda q, k, cos, sin, modulation: (q.new_empty(q.shape), q.new_empty(q.shape)),
    autograd=(_save, _backward),
)


def rope_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    modulation: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate the pairs (x_2i, x_2i+1) of q and k by each token's angles, then multiply by the modulation.

    Differentiable in q, k and modulation. Tokens that keep their place take cos = 1, sin = 0, which is exact.

    q, k: [B, H, N, D], float32, float16 or bfloat16, alike, D even and at most 1024; only D must be
    contiguous, so views of a fused projection [B, N, 3, H, D] are read in place. cos, sin: float32 [N, D/2].
    modulation: float32 [B, H, N]. Computed in float32; returns (q, k), contiguous, in the dtype of q, k.
    float64 (of everything) is for the torch backend alone. Forward-mode derivatives and torch.func are served
    by the formula in plain torch.
    Raises TypeError for a wrong dtype; ValueError for a wrong shape, device or layout, or a cos or sin that
    requires grad.
    """
    for name, table in (("cos", cos), ("sin", sin)):
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad, and has no derivative here: use {name}.detach()")
    if differentiated_otherwise(backend, q, k, cos, sin, modulation):
        return _formula(q, k, cos, sin, modulation)
    return _operator.on(backend, q.device)(q, k, cos, sin, modulation)
