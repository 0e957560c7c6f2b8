"""N(0, 1) noise that is a function of (seed of the sample, step, stream, element) alone.

Words come from Philox 4×64 with ten rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
2011) under the key [seed, 0] and the counter [block + 1, step, stream, 0]: the same integers as
`numpy.random.Philox(key=[seed, 0], counter=[0, step, stream, 0])`. Elements 2i and 2i + 1 of a sample, in
row-major order, come from its word i by Box-Muller:

    u = (high 32 bits + ½)·2⁻³² in (0, 1]        r = √(−2 ln u)
    t = (low 32 bits)·2⁻³² turns                 z_2i = r·cos 2πt,  z_2i+1 = r·sin 2πt

u is rounded to float32, in which the rest is computed. The angle stays an integer until it lies within a
quarter turn of zero, by cos 2πt = sin 2π(¼ − |t|) and sin 2πt = cos 2π(t − ¼), so the reduction is exact and
no slow path for large angles is needed. Twin and kernel both stay within 5 units in the last place of this.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moe_sampler.kernels import _jit
from moe_sampler.kernels._dispatch import FLOATS, Operator, check_tensor

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK = 1024
_UINT64 = (1 << 64) - 1
_CHUNK = 1 << 16  # elements at a time: many, as calls cost more than a cache that overflows
_DRAWN = 1 << 14  # elements drawn at once: the memory of larger arrays would be mapped anew each time
_VECTOR = 256  # a multiple of what any vectorised loop does at once

# Arrays without dimensions cost a call less than scalars do.
_QUARTER_TURN = np.array(1 << 30, dtype=np.int32)
_TURNS_TO_RADIANS = np.array(2.0 * math.pi * 2.0**-32, dtype=np.float32)
_UNIT, _HALF_UNIT = np.array(2.0**-32, dtype=np.float32), np.array(2.0**-33, dtype=np.float32)
_MINUS_TWO = np.array(-2.0, dtype=np.float32)


class _Workspace(threading.local):
    """What one thread keeps: a fresh generator and fresh arrays would cost as much as the arithmetic."""

    def __init__(self) -> None:
        self._philox = np.random.Philox(0)
        self._state = self._philox.state  # a copy, with no words buffered
        self.radii = np.empty(_CHUNK // 2, dtype=np.float32)
        self.units = np.empty(_CHUNK, dtype=np.float32)

    def philox(self, seed: int, step: int, stream: int, block: int) -> np.random.Philox:
        """The generator at the first word of a sample's block; a negative seed counts modulo 2⁶⁴."""
        key, counter = self._state["state"]["key"], self._state["state"]["counter"]
        key[0], key[1] = seed & _UINT64, 0
        counter[0], counter[1], counter[2], counter[3] = block, step, stream, 0
        self._philox.state = self._state
        return self._philox


_workspace = _Workspace()


def box_muller(words: np.ndarray, out: np.ndarray) -> None:
    """words: uint64 [count], count ≤ _CHUNK/2 → out: float32 [2·count], contiguous."""
    _box_muller([words], out)


def _box_muller(arrays: Sequence[np.ndarray], out: np.ndarray) -> None:
    """The numbers of several arrays of words, one after the other."""
    count = len(out) // 2
    radius, unit = _workspace.radii[:count], _workspace.units[: 2 * count]
    angle = out.view(np.int32)  # first in the memory of the result, so that everything stays in the cache
    done = 0
    for words in arrays:
        own = slice(done, done + len(words))
        np.copyto(angle[own], words.view(np.int32)[0::2])  # little-endian
        np.copyto(radius[own], words.view(np.uint32)[1::2])
        done += len(words)
    # Integers wrap modulo one turn, as the angle does.
    np.subtract(angle[:count], _QUARTER_TURN, angle[count:])
    np.abs(angle, angle)
    np.subtract(_QUARTER_TURN, angle, angle)
    np.copyto(unit, angle)
    np.multiply(unit, _TURNS_TO_RADIANS, unit)
    np.sin(unit, unit)
    np.multiply(radius, _UNIT, radius)
    np.add(radius, _HALF_UNIT, radius)
    np.log(radius, radius)
    np.multiply(radius, _MINUS_TWO, radius)
    np.sqrt(radius, radius)
    np.multiply(unit[:count], radius, out[0::2])
    np.multiply(unit[count:], radius, out[1::2])


def _parts(samples: int, numel: int) -> Iterator[tuple[range, range]]:
    """(samples, their elements) of parts of at most _CHUNK elements, for `samples` of `numel` elements each.

    Vectorised loops treat the ends of an array apart, and a sample must not notice where in a batch it lies.
    So a sample is cut, and samples share a part, only where no vector is cut.
    """
    if numel % _VECTOR == 0 and 2 * numel <= _CHUNK:
        together = _CHUNK // numel
        for first in range(0, samples, together):
            yield range(first, min(first + together, samples)), range(numel)
        return
    for sample in range(samples):
        for start in range(0, numel, _CHUNK):
            yield range(sample, sample + 1), range(start, min(start + _CHUNK, numel))


def fill_normal(out: Tensor, seeds: Tensor, step: int, stream: int) -> Tensor:
    """Fill out: [B, ...], any float dtype and device, from seeds: int64 [B]; reads the seeds on the host."""
    direct = out.dtype == torch.float32 and out.device.type == "cpu"
    normals = out if direct else torch.empty(out.shape, dtype=torch.float32)
    _fill(normals, [(seed, step) for seed in seeds.tolist()], stream)
    return out if direct else out.copy_(normals)


def normal_of_steps(shape: Sequence[int], seeds: Tensor, steps: Sequence[int], stream: int = 0) -> Tensor:
    """float32 [len(steps), *shape] on the CPU: `philox_normal` of every step, to the last bit, at once."""
    out = torch.empty(len(steps), *shape)
    each = seeds.tolist()
    _fill(out.flatten(0, 1), [(seed, step) for step in steps for seed in each], stream)
    return out


def _fill(out: Tensor, keys: Sequence[tuple[int, int]], stream: int) -> None:
    """Fill out: float32 [N, ...] on the CPU, a sample from each of N pairs of seed and step."""
    if out.numel() == 0:
        return
    flat = out.numpy().reshape(out.shape[0], -1)
    for samples, elements in _parts(*flat.shape):
        count = len(elements)
        words = [
            _workspace.philox(*keys[sample], stream, start // 8).random_raw(
                (min(_DRAWN, elements.stop - start) + 1) // 2
            )
            for sample in samples
            for start in range(elements.start, elements.stop, _DRAWN)
        ]
        part = flat[samples.start : samples.stop, elements.start : elements.stop]
        if count % 2:
            padded = np.empty(count + 1, dtype=np.float32)
            _box_muller(words, padded)
            part[0] = padded[:-1]
        else:
            _box_muller(words, part.reshape(-1))


def check_counter(step: int, stream: int) -> None:
    for name, value in (("step", step), ("stream", stream)):
        if not 0 <= value < 1 << 63:
            raise ValueError(f"{name} must lie in [0, 2**63), got {value}")


def _check(shape: Sequence[int], seeds: Tensor, step: int, stream: int, dtype: torch.dtype) -> None:
    if len(shape) < 1:
        raise ValueError("shape must be [B, ...] with the batch first")
    if dtype not in FLOATS:
        raise TypeError(
            f"dtype must be float32, float16 or bfloat16, got {str(dtype).removeprefix('torch.')}"
        )
    check_tensor("seeds", seeds, seeds.device, (torch.int64,), (shape[0],))
    check_counter(step, stream)


def _twin(shape: Sequence[int], seeds: Tensor, step: int, stream: int, dtype: torch.dtype) -> Tensor:
    _check(shape, seeds, step, stream, dtype)
    return fill_normal(torch.empty(shape, dtype=dtype, device=seeds.device), seeds, step, stream)


@_jit.jit(do_not_specialize=("step", "stream"))
def _philox_normal_kernel(out_ptr, seeds_ptr, numel, step, stream, BLOCK: tl.constexpr):
    """z of the module's docstring. out: [batch, numel], seeds: int64 [batch].

    A program owns BLOCK consecutive elements of one sample.
    """
    sample, base, start, inside, mask = _jit.sample_offsets(numel, BLOCK)
    z = _jit.normal(tl.load(seeds_ptr + sample), step, stream, start, BLOCK)
    tl.store(out_ptr + (base + inside), z.to(out_ptr.dtype.element_ty), mask=mask)


def launch_of(out: Tensor, seeds: Tensor, step: int, stream: int) -> _jit.Launch:
    """The kernel launch that fills out: [B, ...] from seeds: int64 [B]."""
    _jit.load_triton()
    batch = out.shape[0]
    numel = out.numel() // max(batch, 1)
    grid = _jit.blocks(numel, batch, _BLOCK)
    return _jit.Launch(_philox_normal_kernel, grid, (out, seeds, numel, step, stream), {"BLOCK": _BLOCK})


def _launch(shape: Sequence[int], seeds: Tensor, step: int, stream: int, dtype: torch.dtype) -> Tensor:
    _check(shape, seeds, step, stream, dtype)
    out = torch.empty(shape, dtype=dtype, device=seeds.device)
    launch_of(out, seeds, step, stream).run(out.device)
    return out


def _fake(shape: Sequence[int], seeds: Tensor, step: int, stream: int, dtype: torch.dtype) -> Tensor:
    return seeds.new_empty(shape, dtype=dtype)


_operator = Operator(
    "philox_normal(SymInt[] shape, Tensor seeds, SymInt step, SymInt stream, ScalarType dtype) -> Tensor",
    twin=_twin,
    launch=_launch,
    fake=_fake,
)


def seeds_tensor(seeds: Tensor | Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Seeds as int64 [B] on `device`; integers in [−2⁶³, 2⁶⁴) count modulo 2⁶⁴."""
    if isinstance(seeds, Tensor):
        return seeds if device is None else seeds.to(device)
    for seed in seeds:
        if not -(1 << 63) <= seed < 1 << 64:
            raise ValueError(f"a seed must lie in [-2**63, 2**64), got {seed}")
    return torch.tensor(
        [s - (1 << 64) if s >= 1 << 63 else s for s in seeds], dtype=torch.int64, device=device
    )


def philox_normal(
    shape: Sequence[int],
    seeds: Tensor | Sequence[int],
    step: int = 0,
    *,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Standard normal noise of `shape` = [B, ...] from one seed per sample.

    A sample's noise depends on its seed, `step`, `stream` and its own shape, and on nothing else: not on the
    batch, not on the device beyond the last bits of a float, not on any global generator.

    seeds: int64 [B] tensor, or B integers (modulo 2⁶⁴). step, stream: counters in [0, 2⁶³) that select
    independent noise. dtype: float32, float16 or bfloat16; computed in float32. device: where the seeds
    are, by default. Returns a tensor of `shape`.
    """
    seeds = seeds_tensor(seeds, device)
    return _operator.on(backend, seeds.device)(shape, seeds, step, stream, dtype)
