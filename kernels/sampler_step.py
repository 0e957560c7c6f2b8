"""One solver step in one pass, from one row of a plan's table (the columns are in `rows`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moe_sampler.kernels import _jit
from moe_sampler.kernels._dispatch import (
    FLOATS,
    Operator,
    all_apart,
    check_no_overlap,
    check_tensor,
    unobserved,
)
from moe_sampler.kernels.noise import check_counter, fill_normal
from moe_sampler.kernels.rows import INDEX, MOST_EXPERTS, MOST_MEMORIES, ROW_WIDTH, check_row

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK = 1024
_FLOAT32 = (torch.float32,)
_DECAYS, _KEEPS, _WEIGHTS = INDEX["d_0"], INDEX["keep_x"], INDEX["q_cond_0"]
_SCALES, _CLIP = INDEX["scale_0"], INDEX["clip"]
_OUTPUT_NAMES = tuple(f"outputs[{slot}]" for slot in range(MOST_EXPERTS))
_NEXT_NAMES = tuple(f"next_inputs[{slot}]" for slot in range(MOST_EXPERTS))
_MEMORY_NAMES = tuple(f"memories[{age}]" for age in range(MOST_MEMORIES))


class Step(NamedTuple):
    """The operator's arguments, as `sampler_step_` describes them."""

    x: Tensor
    outputs: Sequence[Tensor]
    table: Tensor
    step: int
    memories: Sequence[Tensor] = ()
    x0: Tensor | None = None
    next_inputs: Sequence[Tensor] = ()
    seeds: Tensor | None = None
    noise: Tensor | None = None
    stream: int = 0
    nonfinite: Tensor | None = None
    position: Tensor | None = None
    timesteps: Tensor | None = None
    next_timestep: Tensor | None = None


def _check(s: Step) -> None:
    x, outputs, table, step, memories, x0, next_inputs, seeds, noise, stream, nonfinite, *_ = s
    shape, device = x.shape, x.device
    if not shape:
        raise ValueError("x must be [B, ...] with the batch first")
    doubled = (2 * shape[0], *shape[1:])
    check_tensor("x", x, device, _FLOAT32)
    for at, output in enumerate(outputs):
        check_tensor(_OUTPUT_NAMES[at], output, device, FLOATS, shape, doubled)
    check_tensor("table", table, device, _FLOAT32)
    rows = table.shape
    if len(rows) != 2 or rows[1] != ROW_WIDTH:
        raise ValueError(f"table must have shape [steps, {ROW_WIDTH}], got {list(rows)}")
    if not 0 <= step < rows[0]:
        raise ValueError(f"step {step} is outside the table, which has {rows[0]} rows")
    for at, memory in enumerate(memories):
        check_tensor(_MEMORY_NAMES[at], memory, device, _FLOAT32, shape)
    if x0 is not None:
        check_tensor("x0", x0, device, _FLOAT32, shape)
    for at, buffer in enumerate(next_inputs):
        check_tensor(_NEXT_NAMES[at], buffer, device, FLOATS, shape, doubled)
    if seeds is not None:
        if noise is not None:
            raise ValueError("give either seeds or noise, not both")
        check_tensor("seeds", seeds, device, (torch.int64,), shape[:1])
        check_counter(step, stream)
    if noise is not None:
        check_tensor("noise", noise, device, _FLOAT32, shape)
    if nonfinite is not None:
        check_tensor("nonfinite", nonfinite, device, (torch.int32,), rows[:1])
    if s.position is not None or s.timesteps is not None or s.next_timestep is not None:
        _check_moving(s)


def _check_moving(s: Step) -> None:
    device = s.x.device
    if s.position is None or (s.timesteps is None) != (s.next_timestep is None):
        raise ValueError("timesteps and next_timestep go together, and with position")
    if s.step != 0:
        raise ValueError(f"position says the row: leave step at 0, got {s.step}")
    check_tensor("position", s.position, device, (torch.int32,), (2,))
    if s.timesteps is not None and s.next_timestep is not None:
        check_tensor("timesteps", s.timesteps, device, _FLOAT32, s.table.shape[:1])
        check_tensor("next_timestep", s.next_timestep, device, (torch.int64, torch.float32), ())


def _check_memory(s: Step) -> None:
    x, outputs, memories, x0, next_inputs, noise = s.x, s.outputs, s.memories, s.x0, s.next_inputs, s.noise
    if all_apart((x, *outputs, *memories, *next_inputs, x0, noise)):
        return
    # There are names for as many tensors as there may be.
    written, read = [("x", x)], list(zip(_OUTPUT_NAMES, outputs, strict=False))
    if memories:
        written += zip(_MEMORY_NAMES, memories, strict=False)
    if x0 is not None:
        written.append(("x0", x0))
    if next_inputs:
        written += zip(_NEXT_NAMES, next_inputs, strict=False)
    if noise is not None:
        read.append(("noise", noise))
    check_no_overlap(written, read)


def _add_output(x: Tensor, output: Tensor, cond: float, uncond: float) -> None:
    if output.shape[0] == x.shape[0]:
        x.add_(output, alpha=cond)
    else:
        first, second = output.chunk(2)
        x.add_(first, alpha=uncond).add_(second, alpha=cond)


def _write_next(buffer: Tensor, x: Tensor, scale: float) -> None:
    scaled = x if scale == 1.0 else x * scale
    if buffer.shape[0] == x.shape[0]:
        buffer.copy_(scaled)
    else:
        torch.cat((scaled, scaled), out=buffer)


def _row_at(s: Step) -> int:
    """Where the position says that the table is."""
    assert s.position is not None
    step = int(s.position[0])
    if not 0 <= step < len(s.table):
        raise ValueError(f"position {step} is outside the table, which has {len(s.table)} rows")
    return step


def _move_on(s: Step, step: int) -> None:
    assert s.position is not None
    s.position[0] += 1
    if s.timesteps is not None and s.next_timestep is not None:
        s.next_timestep.copy_(s.timesteps[min(step + 1, len(s.table) - 1)])


def _memories_of(s: Step, step: int, row: Sequence[float]) -> tuple[Sequence[float], Sequence[float] | None]:
    """A row's d of the memories, newest first, and what it keeps, if anything.

    Raises a ValueError for memories that aren't given.
    """
    decays, keeps = row[_DECAYS:_KEEPS], row[_KEEPS:_WEIGHTS]
    if any(decays[len(s.memories) :]) or (any(keeps) and not s.memories):
        raise ValueError(f"row {step} reads or keeps more memories than the {len(s.memories)} given")
    return decays, keeps if any(keeps) else None


def _kept(x: Tensor, x0: Tensor, noise: Tensor | None, weights: Sequence[float]) -> Tensor:
    """keep_x·x + keep_x0·x0 + keep_n·z, in new memory unless it is x0 itself."""
    of_x, of_x0, of_noise = weights
    kept = x0 if of_x0 == 1.0 else x0 * of_x0
    if of_x != 0.0:
        kept = torch.add(kept, x, alpha=of_x)
    if of_noise != 0.0 and noise is not None:
        kept = torch.add(kept, noise, alpha=of_noise)
    return kept


def _twin(*arguments: Any) -> None:
    s = Step(*arguments)
    _check(s)
    _check_memory(s)
    x, outputs, table, step, memories, x0_out, next_inputs, seeds, noise, stream, nonfinite, position, *_ = s
    if position is not None:
        step = _row_at(s)
    row = table[step].tolist()
    check_row(row)
    p, a, b, n = row[:_DECAYS]
    clip = row[_CLIP]
    decays = keeps = None
    if any(row[_DECAYS:_WEIGHTS]):
        decays, keeps = _memories_of(s, step, row)
    if n == 0.0:
        noise = None
    elif seeds is not None:
        noise = fill_normal(torch.empty_like(x), seeds, step, stream)
    elif noise is None:
        raise ValueError(f"row {step} adds noise (n = {n:g}): give seeds or noise")
    if x0_out is None and keeps is None and clip == math.inf:
        # Nobody sees x0, so its coefficients fold into the update: half the passes over memory.
        change = a + b * p - 1.0
        if abs(change) > 2.0**-24:  # else none, but for the rounding of a and b: an Euler step of a flow
            x.add_(x, alpha=change)  # x.mul_ would make a tensor of its factor first
        at = _WEIGHTS
        for output in outputs:
            _add_output(x, output, b * row[at], b * row[at + 1])
            at += 2
        kept = None
    else:
        x0 = torch.mul(x, p, out=x0_out)
        at = _WEIGHTS
        for output in outputs:
            _add_output(x0, output, row[at], row[at + 1])
            at += 2
        if clip != math.inf:
            x0.clamp_(-clip, clip)
        kept = None if keeps is None else _kept(x, x0, noise, keeps)
        x.mul_(a).add_(x0, alpha=b)
    if decays is not None:
        for memory, decay in zip(memories, decays):  # noqa: B905 - said so, it takes longer
            if decay != 0.0:
                x.add_(memory, alpha=decay)
    if kept is not None:
        memories[-1].copy_(kept)
    if noise is not None:
        x.add_(noise, alpha=n)
    # NaN and infinities survive a sum, which is a fraction of the work of asking every element.
    if nonfinite is not None and not math.isfinite(x.sum().item()):
        nonfinite[step] = 1
    for at, buffer in enumerate(next_inputs, _SCALES):
        _write_next(buffer, x, row[at])
    if position is not None:
        _move_on(s, step)


@_jit.jit(do_not_specialize=("batch", "step", "stream", "rows"))
def _sampler_step_kernel(
    x_ptr,
    output_0_ptr,
    output_1_ptr,
    output_2_ptr,
    output_3_ptr,
    table_ptr,
    memory_0_ptr,
    memory_1_ptr,
    memory_2_ptr,
    x0_ptr,
    next_0_ptr,
    next_1_ptr,
    next_2_ptr,
    next_3_ptr,
    seeds_ptr,
    noise_ptr,
    nonfinite_ptr,
    position_ptr,
    timesteps_ptr,
    next_timestep_ptr,
    numel,
    batch,
    step,
    stream,
    rows,
    OUTPUT_0_GUIDED: tl.constexpr,
    OUTPUT_1_GUIDED: tl.constexpr,
    OUTPUT_2_GUIDED: tl.constexpr,
    OUTPUT_3_GUIDED: tl.constexpr,
    NEXT_0_TWICE: tl.constexpr,
    NEXT_1_TWICE: tl.constexpr,
    NEXT_2_TWICE: tl.constexpr,
    NEXT_3_TWICE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_WIDTH: tl.constexpr,
):
    """x0 = clamp(p·x + Σ_e q_cond_e·cond_e + q_uncond_e·uncond_e);  x ← a·x + b·x0 + Σ_k d_k·memory_k + n·z.

    x, memory_k, x0, noise: float32 [batch, numel]. output_e, next_e: [batch, numel], or [2·batch, numel]
    where GUIDED or TWICE. table: float32 [rows, ROW_WIDTH]. seeds: int64 [batch]. nonfinite: int32 [rows].
    position: int32 [2], the row, instead of step, and how many programs are done with it. timesteps: float32
    [rows]. next_timestep: one number.
    Absent pointers are None; of outputs, memories and next inputs the first ones are given. What the row
    keeps goes to the last memory given.
    A program owns BLOCK consecutive elements of one sample.
    """
    sample, base, start, inside, mask = _jit.sample_offsets(numel, BLOCK)
    here = base + inside
    half = batch.to(tl.int64) * numel
    if position_ptr is not None:
        step = tl.minimum(tl.load(position_ptr), rows - 1)
    row = table_ptr + step.to(tl.int64) * ROW_WIDTH
    a = tl.load(row + 1)
    b = tl.load(row + 2)
    n = tl.load(row + 3)
    clip = tl.load(row + 22)

    x = tl.load(x_ptr + here, mask=mask, other=0.0)
    x0 = tl.load(row + 0) * x
    x0 += _weighted_output(output_0_ptr, row + 10, here, half, mask, OUTPUT_0_GUIDED)
    if output_1_ptr is not None:
        x0 += _weighted_output(output_1_ptr, row + 12, here, half, mask, OUTPUT_1_GUIDED)
    if output_2_ptr is not None:
        x0 += _weighted_output(output_2_ptr, row + 14, here, half, mask, OUTPUT_2_GUIDED)
    if output_3_ptr is not None:
        x0 += _weighted_output(output_3_ptr, row + 16, here, half, mask, OUTPUT_3_GUIDED)
    # A NaN from a model must stay visible, also through an infinite clip.
    x0 = tl.maximum(x0, -clip, propagate_nan=tl.PropagateNan.ALL)
    x0 = tl.minimum(x0, clip, propagate_nan=tl.PropagateNan.ALL)
    if x0_ptr is not None:
        tl.store(x0_ptr + here, x0, mask=mask)
    kept = x
    if memory_0_ptr is not None:
        kept = tl.load(row + 7) * x + tl.load(row + 8) * x0
    x = a * x + b * x0
    if memory_0_ptr is not None:
        x += _remembered(memory_0_ptr, row + 4, here, inside, numel)
    if memory_1_ptr is not None:
        x += _remembered(memory_1_ptr, row + 5, here, inside, numel)
    if memory_2_ptr is not None:
        x += _remembered(memory_2_ptr, row + 6, here, inside, numel)
    if noise_ptr is not None:
        used = inside < tl.where(n != 0.0, numel, 0)
        z = tl.load(noise_ptr + here, mask=used, other=0.0)
        x += n * z
        if memory_0_ptr is not None:
            kept += tl.load(row + 9) * z
    if seeds_ptr is not None:  # noqa: SIM102 - known when compiling, the inner condition is not
        if n != 0.0:
            z = _jit.normal(tl.load(seeds_ptr + sample), step, stream, start, BLOCK)
            x += n * z
            if memory_0_ptr is not None:
                kept += tl.load(row + 9) * z
    tl.store(x_ptr + here, x, mask=mask)
    if memory_0_ptr is not None:
        # Beside half-precision outputs a thread loads eight numbers here and stores four: not the same ones.
        tl.debug_barrier()
        keeps = (tl.load(row + 7) != 0.0) | (tl.load(row + 8) != 0.0) | (tl.load(row + 9) != 0.0)
        changed = inside < tl.where(keeps, numel, 0)
        if memory_2_ptr is not None:
            tl.store(memory_2_ptr + here, kept, mask=changed)
        elif memory_1_ptr is not None:
            tl.store(memory_1_ptr + here, kept, mask=changed)
        else:
            tl.store(memory_0_ptr + here, kept, mask=changed)
    if nonfinite_ptr is not None:
        # Whoever finds one writes the same; nobody writes in a run that stays finite.
        bad = mask & ((x != x) | (tl.abs(x) == float("inf")))
        tl.store(nonfinite_ptr + (inside * 0 + step), 1, mask=bad)
    if next_0_ptr is not None:
        _store_next(next_0_ptr, x, row + 18, here, half, mask, NEXT_0_TWICE)
    if next_1_ptr is not None:
        _store_next(next_1_ptr, x, row + 19, here, half, mask, NEXT_1_TWICE)
    if next_2_ptr is not None:
        _store_next(next_2_ptr, x, row + 20, here, half, mask, NEXT_2_TWICE)
    if next_3_ptr is not None:
        _store_next(next_3_ptr, x, row + 21, here, half, mask, NEXT_3_TWICE)
    if position_ptr is not None:
        # Whoever is done last moves on: by then no thread of any program has the position yet to read.
        tl.debug_barrier()
        before = tl.atomic_add(position_ptr + 1, 1)
        if before == tl.num_programs(0) - 1:
            tl.store(position_ptr, step + 1)
            tl.store(position_ptr + 1, 0)
            if timesteps_ptr is not None:
                timestep = tl.load(timesteps_ptr + tl.minimum(step + 1, rows - 1))
                tl.store(next_timestep_ptr, timestep.to(next_timestep_ptr.dtype.element_ty))


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
def _remembered(memory_ptr, weight_ptr, here, inside, numel):
    """d·memory. Before it was kept the buffer may hold anything; d = 0 leaves it unread."""
    d = tl.load(weight_ptr)
    used = inside < tl.where(d != 0.0, numel, 0)
    return d * tl.load(memory_ptr + here, mask=used, other=0.0)


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
    outputs = _padded(s.outputs, MOST_EXPERTS)
    next_inputs = _padded(s.next_inputs, MOST_EXPERTS)

    def doubled(tensor: Tensor | None) -> bool:
        return tensor is not None and tensor.shape[0] != batch

    pointers = (
        s.x,
        *outputs,
        s.table,
        *_padded(s.memories, MOST_MEMORIES),
        s.x0,
        *next_inputs,
        s.seeds,
        s.noise,
        s.nonfinite,
        s.position,
        s.timesteps,
        s.next_timestep,
    )
    constants = {
        **{f"OUTPUT_{i}_GUIDED": doubled(output) for i, output in enumerate(outputs)},
        **{f"NEXT_{i}_TWICE": doubled(buffer) for i, buffer in enumerate(next_inputs)},
        "BLOCK": _BLOCK,
        "ROW_WIDTH": ROW_WIDTH,
    }
    grid = _jit.blocks(numel, batch, _BLOCK)
    return _jit.Launch(
        _sampler_step_kernel, grid, (*pointers, numel, batch, s.step, s.stream, len(s.table)), constants
    )


def _padded(tensors: Sequence[Tensor], count: int) -> list[Tensor | None]:
    return [*tensors, *[None] * (count - len(tensors))]


def _launch(*arguments: Any) -> None:
    s = Step(*arguments)
    _check(s)
    _check_memory(s)
    launch_of(s).run(s.x.device)


_operator = Operator(
    "sampler_step_(Tensor(a!) x, Tensor[] outputs, Tensor table, SymInt step, Tensor(b!)[] memories, "
    "Tensor(c!)? x0, Tensor(d!)[] next_inputs, Tensor? seeds, Tensor? noise, SymInt stream, "
    "Tensor(e!)? nonfinite=None, Tensor(f!)? position=None, Tensor? timesteps=None, "
    "Tensor(g!)? next_timestep=None) -> ()",
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
    memories: Sequence[Tensor] = (),
    x0: Tensor | None = None,
    next_inputs: Sequence[Tensor] = (),
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    stream: int = 0,
    nonfinite: Tensor | None = None,
    position: Tensor | None = None,
    timesteps: Tensor | None = None,
    next_timestep: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Advance the state by row `step` of the table, in place, and return it.

        x0 = p·x + Σ_e (q_cond_e·output_e_cond + q_uncond_e·output_e_uncond), clamped to [−clip, clip]
        x ← a·x + b·x0 + Σ_k d_k·memories[k] + n·z;   next_inputs[e] ← scale_e·x
        memories[-1] ← keep_x·x + keep_x0·x0 + keep_n·z, of the x before, where one of the three is not 0

    Everything is computed in float32, whatever the dtypes of the models. All tensors are contiguous, on one
    device, and none that is written shares memory with another.

    x: float32 [B, ...]. outputs: one to four model outputs, each [B, ...] (multiplied by q_cond alone) or
    [2B, ...] (guided: first half unconditional, second half conditional), float32, float16 or bfloat16.
    table: float32 [steps, ROW_WIDTH]. memories: up to three, float32 [B, ...], newest first, each read where
    its d ≠ 0; then what the row keeps is written over the last of them, which so becomes the newest:
    `[*memories[-1:], *memories[:-1]]` is what the next row takes. x0: float32 [B, ...], overwritten with it.
    next_inputs: up to four buffers, each [B, ...] or [2B, ...] (x written twice, for guidance), float32,
    float16 or bfloat16; they belong to the next step's models, so they need not resemble `outputs`.
    seeds: int64 [B] for z = philox_normal(x.shape, seeds, step, stream=stream), made inside the kernel; or
    noise: float32 [B, ...]; where n = 0 neither is touched, and keep_n counts for nothing. Without both the
    noise term is absent: for a row with n ≠ 0 this is an error on the CPU, and goes unnoticed on CUDA, where
    the row cannot be read without waiting for the device; so it is with memories that are missing, and with a
    coefficient that is not finite, which `make_row` refuses to write.
    nonfinite: int32 [steps], whose element `step` becomes 1 if x holds NaN or an infinity afterwards, and is
    left alone otherwise.
    position: int32 [2], zeros for the first row: the row is `position[0]`, on the device, in place of `step`,
    which is 0, and the launch moves it on by one. So one recorded launch takes every step of a run.
    position[1] is 0 between launches. Beyond the table is an error on the CPU, and its last row on CUDA.
    timesteps: float32 [steps], what the model is told at each row; next_timestep: int64 or float32, 0-d,
    becomes the next row's (the last row's own there).
    backend: None picks Triton for CUDA tensors and torch for CPU tensors.
    """
    # A tensor has a length, too; to ask whether it is one takes longer.
    if not isinstance(outputs, (list, tuple)) or not 1 <= len(outputs) <= MOST_EXPERTS:
        raise ValueError(f"outputs must be a list of 1 to {MOST_EXPERTS} tensors")
    if not isinstance(memories, (list, tuple)) or len(memories) > MOST_MEMORIES:
        raise ValueError(f"memories must be a list of 0 to {MOST_MEMORIES} tensors")
    if not isinstance(next_inputs, (list, tuple)) or len(next_inputs) > MOST_EXPERTS:
        raise ValueError(f"next_inputs must be a list of 0 to {MOST_EXPERTS} tensors")
    run = _twin if backend is None and unobserved(x) else _operator.on(backend, x.device)
    moving = (position, timesteps, next_timestep)
    run(x, outputs, table, step, memories, x0, next_inputs, seeds, noise, stream, nonfinite, *moving)
    return x
