"""Triton, imported when the first kernel is launched, and the device functions that kernels share.

The device functions do no I/O. `load_triton` turns every function marked with `jit` into a Triton function
and gives its module the name `tl`, so that `import moe_sampler.kernels` needs no Triton.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    import triton.language as tl

_marked: list[tuple[Callable, dict[str, Any] | None]] = []


def jit(fn: Callable | None = None, **options: Any) -> Callable:
    """Mark a device function; `options` are those of `triton.jit`."""

    def mark(fn: Callable) -> Callable:
        _marked.append((fn, options))
        return fn

    return mark if fn is None else mark(fn)


def constexpr(fn: Callable) -> Callable:
    """Mark a Python function that kernels call while they are compiled, on constants."""
    _marked.append((fn, None))
    return fn


def load_triton() -> None:
    """Import Triton and make every function marked so far a Triton function, in its own module."""
    if not _marked:
        return
    try:
        import triton
        import triton.language
    except ImportError as error:
        raise RuntimeError(
            "CUDA tensors need Triton here: pip install triton, or ask for backend='torch'"
        ) from error

    while _marked:
        fn, options = _marked.pop()
        fn.__globals__["tl"] = triton.language
        wrapped = triton.constexpr_function(fn) if options is None else triton.jit(fn, **options)
        fn.__globals__[fn.__name__] = wrapped


def require_triton(device: torch.device) -> None:
    """Raise a ValueError that says what to do if Triton cannot run kernels on `device`."""
    if find_spec("triton") is None:
        raise ValueError("backend='triton' needs Triton: pip install triton, or use backend='torch'")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' needs CUDA tensors, these are on {device}: move them to a GPU, "
            "use backend='torch', or set TRITON_INTERPRET=1 before starting Python for Triton's interpreter"
        )


class Launch(NamedTuple):
    """One kernel launch as data: to run, or to compile and look at (`aot`)."""

    kernel: Any
    grid: tuple[int]
    args: tuple
    constants: dict[str, Any]

    def run(self, device: torch.device) -> None:
        if self.grid[0] == 0:
            return
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.kernel[self.grid](*self.args, **self.constants)
        else:
            self.kernel[self.grid](*self.args, **self.constants)


def blocks(numel: int, samples: int, size: int) -> tuple[int]:
    """The grid of `samples` runs of blocks, each run covering one sample: `sample_offsets` reads it."""
    return (-(-numel // size) * samples,)


@constexpr
def stages_ahead(stages, tensor_cores):
    """`num_stages` of a loop that loads operands of products: `stages`, or 1 where copying ahead is unsafe.

    From Hopper on, tensor cores read shared memory by a way of their own, and what was copied there must be
    fenced off before. Triton below 3.7.1 leaves the fence out on Hopper; on Blackwell 3.7.1 still does, where
    a head size has a rest. With one stage nothing is copied asynchronously. Other loops may copy freely.
    """
    unfenced = 9 if triton_version() < (3, 7, 1) else 10
    return 1 if tensor_cores and tl.target_info.cuda_capability_geq(unfenced) else stages


@constexpr
def triton_version():
    """The first three numbers of the version of the Triton that compiles."""
    from re import findall

    from triton import __version__

    return tuple(int(number) for number in findall("[0-9]+", __version__)[:3])


@jit
def sample_offsets(numel, BLOCK: tl.constexpr):
    """(sample, its first element, the block's first element within it, the block's elements, their mask).

    One grid axis counts the blocks of all samples, because the other axes end at 65535.
    A length that is a multiple of 16 keeps the mask from splitting 128-bit accesses: Triton compiles such
    lengths apart from ragged ones.
    """
    program = tl.program_id(0)
    per_sample = (numel - 1) // BLOCK + 1  # numel + BLOCK could pass 2³¹
    sample = program // per_sample
    start = (program - sample * per_sample).to(tl.int64) * BLOCK
    inside = start + tl.arange(0, BLOCK)
    sample = sample.to(tl.int64)
    return sample, sample * numel, start, inside, inside < numel


@jit
def shift_sigma(sigma, shift):
    """k·s / (1 + (k − 1)·s), as `conversions.shift_sigma`."""
    return tl.div_rn(shift * sigma, 1.0 + (shift - 1.0) * sigma)


@jit
def log(u):
    """Natural logarithm of a normal float32 > 0, to about one unit in the last place (Cephes' logf).

    Triton's own is a rounded base-2 approximation, which has few correct bits near u = 1.
    """
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    y = 7.0376836292e-2 * f - 1.1514610310e-1
    y = y * f + 1.1676998740e-1
    y = y * f - 1.2420140846e-1
    y = y * f + 1.4249322787e-1
    y = y * f - 1.6668057665e-1
    y = y * f + 2.0000714765e-1
    y = y * f - 2.4999993993e-1
    y = y * f + 3.3333331174e-1
    square = f * f
    y = y * f * square - 2.12194440e-4 * e - 0.5 * square
    return (f + y) + 0.693359375 * e


@jit
def sin_turns(turns):
    """sin(2π·turns) for |turns| ≤ ¼: a minimax polynomial, relative error below 2 units in the last place."""
    y = turns * turns
    p = 39.71091842651367 * y - 76.57498931884766
    p = p * y + 81.60223388671875
    p = p * y - 41.341678619384766
    p = p * y + 6.2831854820251465
    return p * turns


@jit
def quarter_minus_abs(angle):
    """(¼ − |angle|) turns as a float, for an int32 angle in units of 2⁻³² turns."""
    return (0x40000000 - tl.abs(angle)).to(tl.float32) * 2.3283064365386963e-10


@jit
def normal(seed, step, stream, start, BLOCK: tl.constexpr):
    """float32 [BLOCK]: elements start … start + BLOCK − 1 of a sample's noise, as defined in `noise`.

    One Philox block of four words makes eight consecutive elements, and one thread keeps them.
    start is a multiple of 8.
    """
    block = start // 8 + tl.arange(0, BLOCK // 8) + 1
    counter_1 = tl.full((1,), 0, tl.uint64) + step.to(tl.uint64)
    counter_2 = tl.full((1,), 0, tl.uint64) + stream.to(tl.uint64)
    w0, w1, w2, w3 = tl.philox(  # pyright: ignore[reportGeneralTypeIssues] - a device function, typed for the host
        seed.to(tl.uint64), block.to(tl.uint64), counter_1, counter_2, tl.full((1,), 0, tl.uint64)
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    angle = words.to(tl.uint32).to(tl.int32, bitcast=True)
    uniform = (words >> 32).to(tl.uint32).to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt(-2.0 * log(uniform))
    cosine = sin_turns(quarter_minus_abs(angle))
    sine = sin_turns(quarter_minus_abs(angle - 0x40000000))
    return tl.reshape(tl.join(radius * cosine, radius * sine), (BLOCK,))
