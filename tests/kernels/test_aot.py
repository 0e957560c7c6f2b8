"""What Triton compiles, without a GPU: no spills, no stack, 128-bit accesses, once for all steps."""

import os

import pytest
import torch

from moe_sampler.kernels import ROW_WIDTH, conversions, noise, sampler_step

pytest.importorskip("triton", reason="Triton is not available on this platform")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted function is never compiled"
)
from moe_sampler.kernels import aot  # noqa: E402

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPE, TWICE = (2, 4, 64, 64), (4, 4, 64, 64)
RAGGED = (2, 3, 37, 11)


def empty(shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="meta")


def step_launch(
    dtype, *, shape=SHAPE, guided=False, experts=1, history=False, seeds=False, noise=False, nexts=0, step=3
):
    twice = (2 * shape[0], *shape[1:])
    outputs = [empty(twice if guided else shape, dtype) for _ in range(experts)] + [None]
    next_inputs = [empty(twice, dtype) for _ in range(nexts)] + [None, None]
    arguments = sampler_step.Step(
        empty(shape),
        outputs[0],
        outputs[1],
        empty((50, ROW_WIDTH)),
        step,
        empty(shape) if history else None,
        next_inputs[0],
        next_inputs[1],
        empty(shape[:1], torch.int64) if seeds else None,
        empty(shape) if noise else None,
    )
    return sampler_step.launch_of(arguments)


EVERYTHING = {"guided": True, "experts": 2, "history": True, "seeds": True, "nexts": 2}
# name: launch, whole tensors read and written by their item sizes, columns of the row read
STEPS = {
    "unguided": (step_launch(FP16), [4, 2], [4], 5),
    "guided, next input twice": (step_launch(BF16, guided=True, nexts=1), [4, 2, 2], [4, 2, 2], 7),
    "noise tensor, history": (step_launch(FP32, noise=True, history=True), [4, 4, 4, 4], [4, 4], 7),
    "everything, float32": (step_launch(FP32, **EVERYTHING), [4] * 6, [4] * 6, 12),
    "everything, float16": (step_launch(FP16, **EVERYTHING), [4, 4, 2, 2, 2, 2], [4, 4, 2, 2, 2, 2], 12),
    "everything, bfloat16": (step_launch(BF16, **EVERYTHING), [4, 4, 2, 2, 2, 2], [4, 4, 2, 2, 2, 2], 12),
}
OTHERS = {"shift_sigmas": (conversions.shift_launch_of(empty(1024), empty(1024), 3.0), [4], [4], 0)}
for dtype in (FP32, FP16, BF16):
    x, v, level, size = empty(SHAPE), empty(SHAPE, dtype), empty(SHAPE[:1]), dtype.itemsize
    OTHERS |= {
        f"velocity_to_epsilon, {dtype}": (
            conversions.epsilon_launch_of(v, v, x, level, level),
            [4, size],
            [size],
            2,
        ),
        f"euler_step_, {dtype}": (conversions.euler_launch_of(x, v, step_down=0.1), [4, size], [4], 0),
        f"philox_normal, {dtype}": (noise.launch_of(v, empty((2,), torch.int64), 0, 0), [], [size], 0),
    }


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
@pytest.mark.parametrize(
    "launch, reads, writes, scalars", list((STEPS | OTHERS).values()), ids=list(STEPS | OTHERS)
)
def test_compiled_code(launch, reads, writes, scalars, architecture):
    code = aot.compile_launch(launch, architecture)
    assert code.stack_bytes == 0 and code.spills == 0, str(code)
    assert code.registers <= 64, "more would keep fewer than 1024 threads on a multiprocessor"
    # A thread owns 8 elements: one 128-bit access for 2-byte items, two for 4-byte items.
    seeds = "seeds" in str(launch.kernel.arg_names) and any(
        isinstance(a, torch.Tensor) and a.dtype == torch.int64 for a in launch.args
    )
    expected_loads = {128: sum(reads) // 2, 64: int(seeds), 32: scalars}
    assert code.global_loads == {bits: count for bits, count in expected_loads.items() if count}, str(code)
    assert code.global_stores == {128: sum(writes) // 2}, str(code)
    assert "fma" in code.ptx and f"sm_{architecture}" in code.ptx


@pytest.mark.parametrize("launch", [step_launch(FP16, shape=RAGGED, **EVERYTHING)], ids=["ragged"])
def test_ragged_sizes_do_not_spill_either(launch):
    code = aot.compile_launch(launch, 80)
    assert code.stack_bytes == 0 and code.spills == 0, str(code)
    assert 128 not in code.global_loads, "a sample of odd length starts anywhere"


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_clipping_lets_nan_through(architecture):
    """The interpreter's minimum and maximum always do; the hardware's drop a NaN unless told not to."""
    code = aot.compile_launch(STEPS["unguided"][0], architecture)
    assert "min.NaN.f32" in code.ptx and "max.NaN.f32" in code.ptx
    assert "min.f32" not in code.ptx and "max.f32" not in code.ptx


@pytest.mark.parametrize("shape", [(3, 1), (1, 1 << 32)], ids=["one number a sample", "past 2³¹"])
def test_extreme_sizes_compile(shape):
    code = aot.compile_launch(step_launch(FP16, shape=shape, **EVERYTHING), 80)
    assert code.stack_bytes == 0 and code.spills == 0, str(code)


def compilations(kernel, launches):
    """How many times Triton compiles for these launches, asked through its own cache."""
    with aot.pretend_device(80) as device:
        kernel.device_caches.pop(device, None)
        for launch in launches:
            launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants)
        return len(kernel.device_caches[device][0])


def test_one_compilation_for_all_steps_and_batches():
    # Triton specialises integers on 1 and on divisibility by 16: each of these would be a trap.
    kernel = step_launch(FP16).kernel
    steps = [step_launch(FP16, step=step) for step in (0, 1, 2, 15, 16, 17, 48, 49)]
    batches = [step_launch(FP16, shape=(batch, *SHAPE[1:])) for batch in (1, 2, 3, 16)]
    assert compilations(kernel, steps + batches) == 1
    assert compilations(kernel, [*steps[:2], step_launch(FP16, guided=True)]) == 2, "the count counts"


def test_one_compilation_of_the_noise_for_all_steps():
    out, seeds = empty(SHAPE), empty((2,), torch.int64)
    launches = [noise.launch_of(out, seeds, step, stream) for step in (0, 1, 16, 17) for stream in (0, 1, 16)]
    assert compilations(launches[0].kernel, launches) == 1


def test_pretending_ends():
    from triton.runtime import driver

    before = driver._active
    with pytest.raises(RuntimeError, match="stop"), aot.pretend_device(90):
        raise RuntimeError("stop")
    assert driver._active is before
