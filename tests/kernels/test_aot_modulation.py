"""What Triton compiles of `rms_norm_modulate`: no spills, no stack, 128-bit accesses, once for all sizes."""

import pytest
import torch
from aot_helpers import aot, compilations, compiled_code

from moe_sampler.kernels import modulation

pytestmark = compiled_code

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def forward(width, dtype, small=None, *, batch=2, tokens=64, eps=1e-6, chunks=6):
    x, rstd = empty(batch, tokens, width, dtype=dtype), empty(batch, tokens)
    weight = empty(width, dtype=small or dtype)
    scale, shift = empty(batch, chunks * width, dtype=small or dtype).chunk(chunks, dim=1)[:2]
    return modulation.launch_of(x, rstd, x, weight, scale, shift, eps)


def backward(width, dtype, small=None, *, batch=2, tokens=64, chunks=6):
    x, rstd = empty(batch, tokens, width, dtype=dtype), empty(batch, tokens)
    weight = empty(width, dtype=small or dtype)
    scale = empty(batch, chunks * width, dtype=small or dtype).chunk(chunks, dim=1)[1]
    partial = empty(batch, modulation.chunks_of(tokens), width)
    return modulation.backward_launch_of(x, partial, partial, x, x, rstd, weight, scale)


def sums(width, dtype, small=None, *, batch=2, tokens=64, chunks=6):
    weight, partial = empty(width, dtype=small or dtype), empty(batch, modulation.chunks_of(tokens), width)
    scale = empty(batch, chunks * width, dtype=small or dtype).chunk(chunks, dim=1)[1]
    return modulation.sums_launch_of(weight, scale, scale, partial, partial, weight, scale)


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [512, 1280, 3072])
def test_compiled_code(width, dtype, architecture):
    # A thread owns 8 elements of a row: one 128-bit access for 2-byte items, two for 4-byte items.
    once = dtype.itemsize // 2
    code = aot.compile_launch(forward(width, dtype), architecture)
    assert code.stack_bytes == 0 and code.spills == 0 and code.registers <= 64, str(code)
    assert code.global_loads == {128: 4 * once}, str(code)
    assert code.global_stores == {128: once, 32: 1}, str(code)
    code = aot.compile_launch(backward(width, dtype), architecture)
    assert code.stack_bytes == 0 and code.spills == 0 and code.registers <= 128, str(code)
    assert code.global_loads.keys() == {128, 32} and code.global_loads[128] == 4 * once, str(code)
    sums = 2 if width == 512 else 4
    assert code.global_stores == {128: once + sums}, str(code)


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("width", [1, 100, 256, 4096])
def test_other_widths_do_not_spill_either(width, dtype, architecture):
    for make in (forward, backward, sums):
        code = aot.compile_launch(make(width, dtype, torch.float32), architecture)
        assert code.stack_bytes == 0 and code.spills == 0, str(code)
        assert 128 in code.global_loads or width < 256, str(code)


def test_one_compilation_for_all_batches_and_lengths():
    sizes = [(1, 1), (1, 16), (2, 17), (3, 1104), (16, 64)]
    make = lambda function: [function(512, torch.float16, batch=b, tokens=n) for b, n in sizes]  # noqa: E731
    others = [forward(512, torch.float16, eps=eps) for eps in (0.0, 1.0, 1e-5)]
    assert compilations(make(forward) + others + [forward(512, torch.float16, chunks=3)]) == 1
    assert compilations([*make(backward), backward(512, torch.float16, chunks=3)]) == 1
    assert compilations([*make(sums), sums(512, torch.float16, chunks=3)]) == 1
    assert compilations([*make(forward), forward(256, torch.float16)]) == 2, "the count counts"
