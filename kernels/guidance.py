"""Guidance that depends on the sample itself, from a model's doubled output.

A launch reads a sample twice, once for its sums and, out of the cache, once for the result.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_sampler.kernels import _jit
from moe_sampler.kernels._dispatch import FLOATS, Operator, check_no_overlap, check_tensor

if TYPE_CHECKING:
    import triton.language as tl

_TILE: dict[str, Any] = {"BLOCK": 2048, "num_warps": 8}
_EPS = 1e-8
"""Of CFG-Zero*'s division, as its authors' code has it."""


def _check_output(output: Tensor) -> None:
    check_tensor("output", output, output.device, FLOATS)
    if output.ndim < 1 or output.shape[0] % 2:
        raise ValueError(f"output must be [2B, ...], unconditional half first, got {list(output.shape)}")


def _check_finite(**numbers: float) -> None:
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def _guided_like(output: Tensor) -> Tensor:
    batch, *rest = output.shape
    return output.new_empty((batch // 2, *rest), dtype=torch.float32)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """[B] float64: each sample's inner product, added up in the same order alone and in any batch."""
    each = [(one.double() * other.double()).sum() for one, other in zip(a, b, strict=True)]
    return torch.stack(each) if each else a.new_empty(0, dtype=torch.float64)


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    return value.float().view(-1, *(1,) * (like.ndim - 1))


def _grid(output: Tensor) -> tuple[int, tuple[int]]:
    """Elements of a sample, and one program for each."""
    samples = output.shape[0] // 2
    return output.numel() // max(output.shape[0], 1), (samples if output.numel() else 0,)


# zero_star_guidance


def _zero_star_twin(output: Tensor, scale: float) -> Tensor:
    _check_output(output)
    uncond, cond = output.chunk(2)
    share = _inner(cond, uncond) / (_inner(uncond, uncond) + _EPS)
    return torch.mul(uncond, _per_sample((1.0 - scale) * share, uncond)).add_(cond, alpha=scale)


@_jit.jit(do_not_specialize=("batch",))
def _zero_star_guidance_kernel(guided_ptr, output_ptr, scale, eps, numel, batch, BLOCK: tl.constexpr):
    """s = ⟨c, u⟩/(⟨u, u⟩ + ε);  guided = s·u + scale·(c − s·u).

    guided: float32 [batch, numel]. output: [2·batch, numel], u first. A program owns a sample.
    """
    uncond_ptr, cond_ptr = _halves(output_ptr, numel, batch)
    along = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, numel, BLOCK):
        inside = start + tl.arange(0, BLOCK).to(tl.int64)
        uncond, cond = _both(uncond_ptr, cond_ptr, inside, inside < numel)
        along += cond * uncond
        square += uncond * uncond
    share = tl.div_rn(tl.sum(along, axis=0), tl.sum(square, axis=0) + eps)
    guided_ptr += tl.program_id(0).to(tl.int64) * numel
    for start in range(0, numel, BLOCK):
        inside = start + tl.arange(0, BLOCK).to(tl.int64)
        uncond, cond = _both(uncond_ptr, cond_ptr, inside, inside < numel)
        tl.store(guided_ptr + inside, (1.0 - scale) * share * uncond + scale * cond, mask=inside < numel)


@_jit.jit
def _halves(output_ptr, numel, batch):
    """(the sample's unconditional prediction, its conditional one)"""
    uncond_ptr = output_ptr + tl.program_id(0).to(tl.int64) * numel
    return uncond_ptr, uncond_ptr + batch.to(tl.int64) * numel


@_jit.jit
def _both(uncond_ptr, cond_ptr, inside, mask):
    uncond = tl.load(uncond_ptr + inside, mask=mask, other=0.0).to(tl.float32)
    return uncond, tl.load(cond_ptr + inside, mask=mask, other=0.0).to(tl.float32)


def zero_star_launch_of(guided: Tensor, output: Tensor, scale: float) -> _jit.Launch:
    """The kernel launch, which writes `guided`."""
    _jit.load_triton()
    numel, grid = _grid(output)
    args = (guided, output, scale, _EPS, numel, output.shape[0] // 2)
    return _jit.Launch(_zero_star_guidance_kernel, grid, args, _TILE)


def _zero_star_launch(output: Tensor, scale: float) -> Tensor:
    _check_output(output)
    guided = _guided_like(output)
    zero_star_launch_of(guided, output, scale).run(output.device)
    return guided


_zero_star = Operator(
    "zero_star_guidance(Tensor output, float scale) -> Tensor",
    twin=_zero_star_twin,
    launch=_zero_star_launch,
    fake=lambda output, scale: _guided_like(output),
)


def zero_star_guidance(output: Tensor, scale: float, *, backend: str | None = None) -> Tensor:
    """CFG-Zero*'s guidance (arXiv:2503.18886): the unconditional prediction is first scaled to fit the
    conditional one, sample by sample.

        s = ⟨cond, uncond⟩/(⟨uncond, uncond⟩ + 1e-8);  guided = s·uncond + scale·(cond − s·uncond)

    output: [2B, ...], first half unconditional, as a model returns it; float32, float16 or bfloat16.
    scale: of the guidance. Returns float32 [B, ...]; a sample's is the same alone and in any batch.
    """
    _check_finite(scale=scale)
    return _zero_star.on(backend, output.device)(output, scale)


# projected_guidance


def _check_projected(output: Tensor, x: Tensor, running: Tensor | None) -> None:
    _check_output(output)
    shape = (output.shape[0] // 2, *output.shape[1:])
    check_tensor("x", x, output.device, (torch.float32,), shape)
    if running is not None:
        check_tensor("running", running, output.device, (torch.float32,), shape)
        check_no_overlap((("running", running),), (("output", output), ("x", x)))


def _projected_twin(
    output: Tensor,
    x: Tensor,
    running: Tensor | None,
    p: float,
    q: float,
    scale: float,
    eta: float,
    norm_threshold: float,
    momentum: float,
) -> Tensor:
    _check_projected(output, x, running)
    uncond, cond = (half.float() for half in output.chunk(2))
    change = (cond - uncond).mul_(q)
    if running is not None:
        if momentum != 0.0:
            change.add_(running, alpha=momentum)
        running.copy_(change)
    x0 = torch.mul(x, p).add_(cond, alpha=q)
    square = _inner(x0, x0)
    along = torch.where(square > 0, _inner(change, x0) / square, 0.0)
    gain = torch.full_like(along, (scale - 1.0) / q)
    if norm_threshold > 0:
        gain *= (norm_threshold / _inner(change, change).sqrt()).clamp(max=1.0)
    guided = torch.add(cond, change.mul_(_per_sample(gain, x)))
    return guided.sub_(x0.mul_(_per_sample((1.0 - eta) * gain * along, x)))


@_jit.jit(do_not_specialize=("batch",))
def _projected_guidance_kernel(
    guided_ptr,
    output_ptr,
    x_ptr,
    running_ptr,
    p,
    q,
    strength,
    one_less_eta,
    norm_threshold,
    momentum,
    numel,
    batch,
    BLOCK: tl.constexpr,
):
    """D = p·x + q·c;  r ← q·(c − u) + momentum·r;  guided = c + g·(r − (1 − eta)·⟨r, D⟩/⟨D, D⟩·D)
    with g = (scale − 1)/q·min(1, norm_threshold/‖r‖).

    guided, x, running: float32 [batch, numel], running may be None. output: [2·batch, numel], u first.
    strength = (scale − 1)/q. A program owns a sample.
    """
    uncond_ptr, cond_ptr = _halves(output_ptr, numel, batch)
    base = tl.program_id(0).to(tl.int64) * numel
    x_ptr += base
    guided_ptr += base
    if running_ptr is not None:
        running_ptr += base
    change_square = tl.zeros((BLOCK,), tl.float32)
    along = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, numel, BLOCK):
        inside = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = inside < numel
        uncond, cond = _both(uncond_ptr, cond_ptr, inside, mask)
        change = q * (cond - uncond)
        if running_ptr is not None:
            # Before its first use the buffer may hold anything; momentum = 0 leaves it unread.
            used = inside < tl.where(momentum != 0.0, numel, 0)
            change += momentum * tl.load(running_ptr + inside, mask=used, other=0.0)
            # Beside half precision a thread loads eight numbers and stores four: not the same ones.
            tl.debug_barrier()
            tl.store(running_ptr + inside, change, mask=mask)
        x0 = p * tl.load(x_ptr + inside, mask=mask, other=0.0) + q * cond
        change_square += change * change
        along += change * x0
        square += x0 * x0
    square_sum = tl.sum(square, axis=0)
    share = tl.where(square_sum > 0.0, tl.div_rn(tl.sum(along, axis=0), square_sum), 0.0)
    gain = strength
    if norm_threshold > 0.0:
        norm = tl.sqrt_rn(tl.sum(change_square, axis=0))
        gain *= tl.minimum(tl.div_rn(norm_threshold, norm), 1.0)
    against = one_less_eta * gain * share
    if running_ptr is not None:
        tl.debug_barrier()  # what other threads stored is read now
    for start in range(0, numel, BLOCK):
        inside = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = inside < numel
        uncond, cond = _both(uncond_ptr, cond_ptr, inside, mask)
        if running_ptr is not None:
            change = tl.load(running_ptr + inside, mask=mask, other=0.0)
        else:
            change = q * (cond - uncond)
        x0 = p * tl.load(x_ptr + inside, mask=mask, other=0.0) + q * cond
        tl.store(guided_ptr + inside, cond + gain * change - against * x0, mask=mask)


def projected_launch_of(
    guided: Tensor,
    output: Tensor,
    x: Tensor,
    running: Tensor | None,
    p: float,
    q: float,
    scale: float,
    eta: float,
    norm_threshold: float,
    momentum: float,
) -> _jit.Launch:
    """The kernel launch, which writes `guided` and `running`."""
    _jit.load_triton()
    numel, grid = _grid(output)
    numbers = (p, q, (scale - 1.0) / q, 1.0 - eta, norm_threshold, momentum)
    args = (guided, output, x, running, *numbers, numel, output.shape[0] // 2)
    return _jit.Launch(_projected_guidance_kernel, grid, args, _TILE)


def _projected_launch(output: Tensor, x: Tensor, running: Tensor | None, *numbers: float) -> Tensor:
    _check_projected(output, x, running)
    guided = _guided_like(output)
    projected_launch_of(guided, output, x, running, *numbers).run(output.device)
    return guided


_projected = Operator(
    "projected_guidance(Tensor output, Tensor x, Tensor(a!)? running, float p, float q, float scale, "
    "float eta, float norm_threshold, float momentum) -> Tensor",
    twin=_projected_twin,
    launch=_projected_launch,
    fake=lambda output, *others: _guided_like(output),
)


def projected_guidance(
    output: Tensor,
    x: Tensor,
    p: float,
    q: float,
    scale: float,
    *,
    eta: float = 0.0,
    norm_threshold: float = 0.0,
    running: Tensor | None = None,
    momentum: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Adaptive projected guidance: the part of the guidance that only enlarges the prediction of x0 counts
    less (arXiv:2410.02416, algorithm 1).

        x0 = p·x + q·cond;  r = q·(cond − uncond) + momentum·running, and running ← r
        r ← r·min(1, norm_threshold/‖r‖), parted into r∥ along x0 and r⊥
        guided = cond + (scale − 1)·(r⊥ + eta·r∥)/q, so that p·x + q·guided is the paper's guided x0

    output: [2B, ...], first half unconditional; float32, float16 or bfloat16. x: float32 [B, ...], the state.
    p, q: from state and output to x0; q ≠ 0. scale: of the guidance. eta: 1 leaves the parallel part.
    norm_threshold: of a sample's r, in units of x0; 0 is none. running: float32 [B, ...], which an expert
    keeps from step to step, with a momentum below 0; where that is 0 it is only written. Returns float32
    [B, ...], in the output's units; a sample's is the same alone and in any batch.
    """
    _check_finite(p=p, q=q, scale=scale, eta=eta, norm_threshold=norm_threshold, momentum=momentum)
    if q == 0 or norm_threshold < 0:
        raise ValueError(f"q must not be 0, nor norm_threshold negative, got {q} and {norm_threshold}")
    if momentum != 0 and running is None:
        raise ValueError("momentum needs running, [B, ...] float32")
    body = _projected.on(backend, output.device)
    return body(output, x, running, p, q, scale, eta, norm_threshold, momentum)
