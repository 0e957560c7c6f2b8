"""One solver step in one pass, from one row of a plan's table (the columns are in `rows`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moe_sampler.kernels import _jit
from moe_sampler.kernels._dispatch import FLOATS, Operator, check_no_overlap, check_tensor, unobserved
from moe_sampler.kernels.noise import check_counter, fill_normal
from moe_sampler.kernels.rows import COLUMNS, ROW_WIDTH, check_row

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK = 1024
_FLOAT32 = (torch.float32,)


class Step(NamedTuple):
    """The operator's arguments, as `sampler_step_` describes them."""

    x: Tensor
    output_0: Tensor
    output_1: Tensor | None
    table: Tensor
    step: int
    x0_prev: Tensor | None = None
    next_0: Tensor | None = None
    next_1: Tensor | None = None
    seeds: Tensor | None = None
    noise: Tensor | None = None
    stream: int = 0
    nonfinite: Tensor | None = None


def _check(s: Step) -> None:
    if s.x.ndim < 1:
        raise ValueError("x must be [B, ...] with the batch first")
    device, shape = s.x.device, s.x.shape
    doubled = (2 * shape[0], *shape[1:])
    check_tensor("x", s.x, device, _FLOAT32)
    check_tensor("outputs[0]", s.output_0, device, FLOATS, shape, doubled)
    if s.output_1 is not None:
        check_tensor("outputs[1]", s.output_1, device, FLOATS, shape, doubled)
    check_tensor("table", s.table, device, _FLOAT32)
    if s.table.ndim != 2 or s.table.shape[1] != ROW_WIDTH:
        raise ValueError(f"table must have shape [steps, {ROW_WIDTH}], got {list(s.table.shape)}")
    if not 0 <= s.step < s.table.shape[0]:
        raise ValueError(f"step {s.step} is outside the table, which has {s.table.shape[0]} rows")
    if s.x0_prev is not None:
        check_tensor("x0_prev", s.x0_prev, device, _FLOAT32, shape)
    if s.next_0 is not None:
        check_tensor("next_inputs[0]", s.next_0, device, FLOATS, shape, doubled)
    if s.next_1 is not None:
        check_tensor("next_inputs[1]", s.next_1, device, FLOATS, shape, doubled)
    if s.seeds is not None:
        if s.noise is not None:
            raise ValueError("give either seeds or noise, not both")
        check_tensor("seeds", s.seeds, device, (torch.int64,), shape[:1])
        check_counter(s.step, s.stream)
    if s.noise is not None:
        check_tensor("noise", s.noise, device, _FLOAT32, shape)
    if s.nonfinite is not None:
        check_tensor("nonfinite", s.nonfinite, device, (torch.int32,), s.table.shape[:1])


def _check_memory(s: Step) -> None:
    check_no_overlap(
        written=(
            ("x", s.x),
            ("x0_prev", s.x0_prev),
            ("next_inputs[0]", s.next_0),
            ("next_inputs[1]", s.next_1),
        ),
        read=(("outputs[0]", s.output_0), ("outputs[1]", s.output_1), ("noise", s.noise)),
    )


def _add_output(x: Tensor, output: Tensor | None, cond: float, uncond: float) -> None:
    if output is None:
        return
    if output.shape[0] == x.shape[0]:
        x.add_(output, alpha=cond)
    else:
        first, second = output.chunk(2)
        x.add_(first, alpha=uncond).add_(second, alpha=cond)


def _write_next(buffer: Tensor | None, x: Tensor, scale: float) -> None:
    if buffer is None:
        return
    scaled = x if scale == 1.0 else x * scale
    if buffer.shape[0] == x.shape[0]:
        buffer.copy_(scaled)
    else:
        torch.cat((scaled, scaled), out=buffer)


def _twin(*arguments: Any) -> None:
    s = Step(*arguments)
    _check(s)
    _check_memory(s)
    row = s.table[s.step].tolist()[: len(COLUMNS)]
    check_row(row)
    p, a, b, d, n, clip, cond_0, uncond_0, cond_1, uncond_1, scale_0, scale_1 = row
    if n != 0.0 and s.seeds is None and s.noise is None:
        raise ValueError(f"row {s.step} adds noise (n = {n:g}): give seeds or noise")
    x = s.x
    if s.x0_prev is None and clip == math.inf:
        # Nobody sees x0, so its coefficients fold into the update: half the passes over memory.
        change = a + b * p - 1.0
        if abs(change) > 2.0**-24:  # else none, but for the rounding of a and b: an Euler step of a flow
            x.add_(x, alpha=change)  # x.mul_ would make a tensor of its factor first
        _add_output(x, s.output_0, b * cond_0, b * uncond_0)
        _add_output(x, s.output_1, b * cond_1, b * uncond_1)
    else:
        x0 = x * p
        _add_output(x0, s.output_0, cond_0, uncond_0)
        _add_output(x0, s.output_1, cond_1, uncond_1)
        if clip != math.inf:
            x0.clamp_(-clip, clip)
        x.mul_(a).add_(x0, alpha=b)
        if s.x0_prev is not None:
            if d != 0.0:
                x.add_(s.x0_prev, alpha=d)
            s.x0_prev.copy_(x0)
    if n != 0.0 and s.noise is not None:
        x.add_(s.noise, alpha=n)
    elif n != 0.0 and s.seeds is not None:
        x.add_(fill_normal(torch.empty_like(x), s.seeds, s.step, s.stream), alpha=n)
    # NaN and infinities survive a sum, which is a fraction of the work of asking every element.
    if s.nonfinite is not None and not math.isfinite(x.sum().item()):
        s.nonfinite[s.step] = 1
    _write_next(s.next_0, x, scale_0)
    _write_next(s.next_1, x, scale_1)


@_jit.jit(do_not_specialize=("batch", "step", "stream"))
def _sampler_step_kernel(
    x_ptr,
    output_0_ptr,
    output_1_ptr,
    table_ptr,
    x0_prev_ptr,
    next_0_ptr,
    next_1_ptr,
    seeds_ptr,
    noise_ptr,
    nonfinite_ptr,
    numel,
    batch,
    step,
    stream,
    OUTPUT_0_GUIDED: tl.constexpr,
    OUTPUT_1_GUIDED: tl.constexpr,
    NEXT_0_TWICE: tl.constexpr,
    NEXT_1_TWICE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_WIDTH: tl.constexpr,
):
    """x0 = clamp(p·x + Σ_e q_cond_e·cond_e + q_uncond_e·uncond_e);  x ← a·x + b·x0 + d·x0_prev + n·z.

    x, x0_prev, noise: float32 [batch, numel]. output_e, next_e: [batch, numel], or [2·batch, numel] where
    GUIDED or TWICE. table: float32 [steps, ROW_WIDTH]. seeds: int64 [batch]. nonfinite: int32 [steps]. Absent
    pointers are None.
    A program owns BLOCK consecutive elements of one sample.
    """
    sample, base, start, inside, mask = _jit.sample_offsets(numel, BLOCK)
    here = base + inside
    half = batch.to(tl.int64) * numel
    row = table_ptr + step.to(tl.int64) * ROW_WIDTH
    a = tl.load(row + 1)
    b = tl.load(row + 2)
    n = tl.load(row + 4)
    clip = tl.load(row + 5)

    x = tl.load(x_ptr + here, mask=mask, other=0.0)
    x0 = tl.load(row + 0) * x
    x0 += _weighted_output(output_0_ptr, row + 6, here, half, mask, OUTPUT_0_GUIDED)
    if output_1_ptr is not None:
        x0 += _weighted_output(output_1_ptr, row + 8, here, half, mask, OUTPUT_1_GUIDED)
    # A NaN from a model must stay visible, also through an infinite clip.
    x0 = tl.maximum(x0, -clip, propagate_nan=tl.PropagateNan.ALL)
    x0 = tl.minimum(x0, clip, propagate_nan=tl.PropagateNan.ALL)
    x = a * x + b * x0
    if x0_prev_ptr is not None:
        # Before the first step the buffer may hold anything; d = 0 leaves it unread.
        d = tl.load(row + 3)
        used = inside < tl.where(d != 0.0, numel, 0)
        x += d * tl.load(x0_prev_ptr + here, mask=used, other=0.0)
        # Beside half-precision outputs a thread loads eight numbers here and stores four: not the same ones.
        tl.debug_barrier()
        tl.store(x0_prev_ptr + here, x0, mask=mask)
    if noise_ptr is not None:
        used = inside < tl.where(n != 0.0, numel, 0)
        x += n * tl.load(noise_ptr + here, mask=used, other=0.0)
    if seeds_ptr is not None:  # noqa: SIM102 - known when compiling, the inner condition is not
        if n != 0.0:
            x += n * _jit.normal(tl.load(seeds_ptr + sample), step, stream, start, BLOCK)
    tl.store(x_ptr + here, x, mask=mask)
    if nonfinite_ptr is not None:
        # Whoever finds one writes the same; nobody writes in a run that stays finite.
        bad = mask & ((x != x) | (tl.abs(x) == float("inf")))
        tl.store(nonfinite_ptr + (inside * 0 + step), 1, mask=bad)
    if next_0_ptr is not None:
        _store_next(next_0_ptr, x, row + 10, here, half, mask, NEXT_0_TWICE)
    if next_1_ptr is not None:
        _store_next(next_1_ptr, x, row + 11, here, half, mask, NEXT_1_TWICE)


@_jit.jit
def _weighted_output(output_ptr, weights_ptr, here, half, mask, GUIDED: tl.constexpr):
    """q_cond·cond (+ q_uncond·uncond), the weights lying at weights_ptr in this order."""
    if GUIDED:
        uncond = tl.load(output_ptr + here, mask=mask, other=0.0).to(tl.float32)
        cond = tl.load(output_ptr + (half + here), mask=mask, other=0.0).to(tl.float32)
        return tl.load(weights_ptr) * cond + tl.load(weights_ptr + 1) * uncond
    else:
        return tl.load(weights_ptr) * tl.load(output_ptr + here, mask=mask, other=0.0).to(tl.float32)


@_jit.jit
def _store_next(next_ptr, x, scale_ptr, here, half, mask, TWICE: tl.constexpr):
    value = (tl.load(scale_ptr) * x).to(next_ptr.dtype.element_ty)
    tl.store(next_ptr + here, value, mask=mask)
    if TWICE:
        tl.store(next_ptr + (half + here), value, mask=mask)


def launch_of(s: Step) -> _jit.Launch:
    """The kernel launch for these arguments, which are not checked again."""
    _jit.load_triton()
    batch = s.x.shape[0]
    numel = s.x.numel() // max(batch, 1)

    def doubled(tensor: Tensor | None) -> bool:
        return tensor is not None and tensor.shape[0] != batch

    pointers = (
        s.x,
        s.output_0,
        s.output_1,
        s.table,
        s.x0_prev,
        s.next_0,
        s.next_1,
        s.seeds,
        s.noise,
        s.nonfinite,
    )
    constants = {
        "OUTPUT_0_GUIDED": doubled(s.output_0),
        "OUTPUT_1_GUIDED": doubled(s.output_1),
        "NEXT_0_TWICE": doubled(s.next_0),
        "NEXT_1_TWICE": doubled(s.next_1),
        "BLOCK": _BLOCK,
        "ROW_WIDTH": ROW_WIDTH,
    }
    grid = _jit.blocks(numel, batch, _BLOCK)
    return _jit.Launch(_sampler_step_kernel, grid, (*pointers, numel, batch, s.step, s.stream), constants)


def _launch(*arguments: Any) -> None:
    s = Step(*arguments)
    _check(s)
    _check_memory(s)
    launch_of(s).run(s.x.device)


_operator = Operator(
    "sampler_step_(Tensor(a!) x, Tensor output_0, Tensor? output_1, Tensor table, SymInt step, "
    "Tensor(b!)? x0_prev, Tensor(c!)? next_0, Tensor(d!)? next_1, "
    "Tensor? seeds, Tensor? noise, SymInt stream, Tensor(e!)? nonfinite=None) -> ()",
    twin=_twin,
    launch=_launch,
    fake=lambda *arguments: _check(Step(*arguments)),
)


def sampler_step_(
    x: Tensor,
    outputs: Sequence[Tensor],
    table: Tensor,
    step: int,
    *,
    x0_prev: Tensor | None = None,
    next_inputs: Sequence[Tensor] = (),
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    stream: int = 0,
    nonfinite: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Advance the state by row `step` of the table, in place, and return it.

        x0 = p·x + Σ_e (q_cond_e·output_e_cond + q_uncond_e·output_e_uncond), clamped to [−clip, clip]
        x ← a·x + b·x0 + d·x0_prev + n·z;   x0_prev ← x0;   next_inputs[e] ← scale_e·x

    Everything is computed in float32, whatever the dtypes of the models. All tensors are contiguous, on one
    device, and none that is written shares memory with another.

    x: float32 [B, ...]. outputs: one or two model outputs, each [B, ...] (multiplied by q_cond alone) or
    [2B, ...] (guided: first half unconditional, second half conditional), float32, float16 or bfloat16.
    table: float32 [steps, ROW_WIDTH]. x0_prev: float32 [B, ...], read where d ≠ 0, then overwritten.
    next_inputs: up to two buffers, each [B, ...] or [2B, ...] (x written twice, for guidance), float32,
    float16 or bfloat16; they belong to the next step's models, so they need not resemble `outputs`.
    seeds: int64 [B] for z = philox_normal(x.shape, seeds, step, stream=stream), made inside the kernel; or
    noise: float32 [B, ...]; where n = 0 neither is touched. Without both the noise term is absent: for a row
    with n ≠ 0 this is an error on the CPU, and goes unnoticed on CUDA, where the row cannot be read without
    waiting for the device; so it is with a coefficient that is not finite, which `make_row` refuses to write.
    nonfinite: int32 [steps], whose element `step` becomes 1 if x holds NaN or an infinity afterwards, and is
    left alone otherwise.
    backend: None picks Triton for CUDA tensors and torch for CPU tensors.
    """
    if isinstance(outputs, Tensor) or not 1 <= len(outputs) <= 2:
        raise ValueError("outputs must be a list of one or two tensors")
    if isinstance(next_inputs, Tensor) or len(next_inputs) > 2:
        raise ValueError("next_inputs must be a list of at most two tensors")
    second = outputs[1] if len(outputs) == 2 else None
    next_0 = next_inputs[0] if next_inputs else None
    next_1 = next_inputs[1] if len(next_inputs) == 2 else None
    run = _twin if backend is None and unobserved(x) else _operator.on(backend, x.device)
    run(x, outputs[0], second, table, step, x0_prev, next_0, next_1, seeds, noise, stream, nonfinite)
    return x
