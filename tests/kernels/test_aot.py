"""What Triton compiles, without a GPU: no spills, no stack, 128-bit accesses, once for all steps."""

import math
import re

import pytest
import torch
from aot_helpers import aot, compilations, compiled_code, skip_unless_tuned

from bench import cases
from bench.ordering import accesses_in_order, unfenced_reads
from moe_sampler import kernels
from moe_sampler.kernels import ROW_WIDTH, _jit, noise, sampler_step

pytestmark = compiled_code

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPE, TWICE = (2, 4, 64, 64), (4, 4, 64, 64)
RAGGED = (2, 3, 37, 11)


def empty(shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="meta")


def step_launch(
    dtype,
    *,
    shape=SHAPE,
    guided=False,
    experts=1,
    memories=0,
    seeds=False,
    noise=False,
    x0=False,
    nexts=0,
    step=3,
    flags=False,
    moving=False,
):
    twice = (2 * shape[0], *shape[1:])
    outputs = [empty(twice if guided else shape, dtype) for _ in range(experts)]
    arguments = sampler_step.Step(
        empty(shape),
        outputs,
        empty((50, ROW_WIDTH)),
        step,
        [empty(shape) for _ in range(memories)],
        empty(shape) if x0 else None,
        [empty(twice, dtype) for _ in range(nexts)],
        empty(shape[:1], torch.int64) if seeds else None,
        empty(shape) if noise else None,
        nonfinite=empty((50,), torch.int32) if flags else None,
        position=empty((2,), torch.int32) if moving else None,
        timesteps=empty((50,)) if moving else None,
        next_timestep=empty((), torch.int64) if moving else None,
    )
    return sampler_step.launch_of(arguments)


EVERYTHING = {"guided": True, "experts": 4, "memories": 3, "x0": True, "seeds": True, "nexts": 4}
BUILT = [(case, case.build(case.shape, "meta")) for case in cases.cases()]


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
@pytest.mark.parametrize("case, built", BUILT, ids=[str(case) for case, _ in BUILT])
def test_compiled_code(case, built, architecture):
    code = aot.compile_launch(built.launch, architecture)
    assert f"sm_{architecture}" in code.ptx
    assert not unfenced_reads(code.ptx), "tensor cores may read what is still being copied"
    skip_unless_tuned()
    assert code.stack_bytes == 0 and code.spills == 0, str(code)
    assert code.registers <= (255 if built.flops else 128), "fewer than 512 threads at work"
    # Whatever is streamed goes in accesses of 128 bits; the rest are numbers by row, sample or block. That no
    # element is read twice shows in the interpreter (test_traffic).
    threads = math.prod(built.launch.grid) * code.warps * 32
    streamed = (sum(t.nbytes for t in ts if t.numel() >= 4 * threads) for ts in (built.read, built.written))
    for accesses, size in zip((code.global_loads, code.global_stores), streamed, strict=True):
        wide = accesses.get(128, 0) * 16 * threads
        if built.loops:  # the code does not say how often
            assert wide or not size, str(code)
        elif accesses is code.global_stores or not built.cached:
            assert wide == size, str(code)
        else:  # weights by column go as wide
            assert wide >= size, str(code)


def test_every_operation_has_cases():
    for name in kernels.__all__:
        getattr(kernels, name)  # imported when it is asked for, and registered then
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    operations = {name.removeprefix("moe_sampler::") for name in names if name.startswith("moe_sampler::")}
    no_kernels = {"side_by_side"}  # a product that pipelines/projections.py registers
    assert {case.operation for case, _ in BUILT} == operations - no_kernels


@pytest.mark.parametrize("launch", [step_launch(FP16, shape=RAGGED, **EVERYTHING)], ids=["ragged"])
def test_ragged_sizes_do_not_spill_either(launch):
    code = aot.compile_launch(launch, 80)
    assert code.stack_bytes == 0 and code.spills == 0, str(code)
    assert 128 not in code.global_loads, "a sample of odd length starts anywhere"


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_a_flag_for_nan_is_a_store_that_a_finite_step_skips(architecture):
    """Whatever else a step does: no more loads, no stack, the same wide accesses."""
    plain, flagged = (
        aot.compile_launch(step_launch(FP16, flags=flags, **EVERYTHING), architecture)
        for flags in (False, True)
    )
    assert flagged.stack_bytes == 0 and flagged.spills == 0 and flagged.registers <= 128, str(flagged)
    assert flagged.global_loads == plain.global_loads
    assert flagged.global_stores[128] == plain.global_stores[128]


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_a_step_that_moves_on_costs_one_atomic_addition_after_all_threads_have_read(architecture):
    plain, moving = (
        aot.compile_launch(step_launch(FP16, step=0, moving=moving, **EVERYTHING), architecture)
        for moving in (False, True)
    )
    assert moving.stack_bytes == 0 and moving.spills == 0 and moving.registers <= 128, str(moving)
    assert moving.global_loads[128] == plain.global_loads[128]
    assert moving.global_stores[128] == plain.global_stores[128]
    before, after = moving.ptx.split("atom.global.gpu.acq_rel.add.u32")  # one
    assert "bar.sync" in before[before.rindex("ld.global") :], "a slow warp might read what has moved on"
    assert after.count("st.global") == 3, "the position, its count and the timestep"


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_clipping_lets_nan_through(architecture):
    """The interpreter's minimum and maximum always do; the hardware's drop a NaN unless told not to."""
    code = aot.compile_launch(step_launch(FP16), architecture)
    assert "min.NaN.f32" in code.ptx and "max.NaN.f32" in code.ptx
    assert "min.f32" not in code.ptx and "max.f32" not in code.ptx


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", [SHAPE, RAGGED], ids=["aligned", "ragged"])
@pytest.mark.parametrize("memories", [1, 3])
def test_a_memory_is_read_before_it_is_overwritten(shape, dtype, architecture, memories):
    """By all threads: beside half-precision outputs a thread does not overwrite what it read itself."""
    code = aot.compile_launch(step_launch(dtype, shape=shape, memories=memories), architecture)
    order = accesses_in_order(code.ptx, 2 + memories)  # x, output, table, the memories
    assert re.fullmatch(r"\|*l+\|+s+\|*", order), order


def test_copying_ahead_is_decided_by_triton_and_architecture(monkeypatch):
    import triton

    _jit.load_triton()

    def stages(architecture, version, tensor_cores=True):
        monkeypatch.setattr(triton, "__version__", version)
        with aot.pretend_device(architecture):
            return _jit.stages_ahead(2, tensor_cores)

    versions = ("3.5.1", "3.6.0", "3.7.0+git1234", "3.7.1", "3.10.0")
    assert [stages(80, version) for version in versions] == [2] * 5, "mma.sync reads registers"
    assert [stages(90, version) for version in versions] == [1, 1, 1, 2, 2]
    assert [stages(100, version) for version in versions] == [1] * 5
    assert stages(90, "3.6.0", tensor_cores=False) == stages(100, "3.7.1", tensor_cores=False) == 2


@pytest.mark.parametrize("shape", [(3, 1), (1, 1 << 32)], ids=["one number a sample", "past 2³¹"])
def test_extreme_sizes_compile(shape):
    code = aot.compile_launch(step_launch(FP16, shape=shape, **EVERYTHING), 80)
    assert code.stack_bytes == 0 and code.spills == 0, str(code)


def test_one_compilation_for_all_steps_and_batches():
    # Triton specialises integers on 1 and on divisibility by 16: each of these would be a trap.
    steps = [step_launch(FP16, step=step) for step in (0, 1, 2, 15, 16, 17, 48, 49)]
    batches = [step_launch(FP16, shape=(batch, *SHAPE[1:])) for batch in (1, 2, 3, 16)]
    assert compilations(steps + batches) == 1
    assert compilations([*steps[:2], step_launch(FP16, guided=True)]) == 2, "the count counts"


def test_one_compilation_of_the_noise_for_all_steps():
    out, seeds = empty(SHAPE), empty((2,), torch.int64)
    launches = [noise.launch_of(out, seeds, step, stream) for step in (0, 1, 16, 17) for stream in (0, 1, 16)]
    assert compilations(launches) == 1


def test_pretending_ends():
    from triton.runtime import driver

    before = driver._active
    with pytest.raises(RuntimeError, match="stop"), aot.pretend_device(90):
        raise RuntimeError("stop")
    assert driver._active is before
