"""What Triton compiles of `rope_qk`: no spills, no stack, 128-bit accesses, once for all sizes, strides."""

import pytest
import torch
from aot_helpers import aot, compilations, compiled_code

from moe_sampler.kernels import rotary

pytestmark = compiled_code

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(width, dtype, kind, *, batch=2, heads=4, tokens=64, fused=True):
    """kind: "plain", "modulated", "back" or "back to the modulation"."""
    out = empty(batch, heads, tokens, width, dtype=dtype)
    q, k, _ = (t.transpose(1, 2) for t in empty(batch, tokens, 3, heads, width, dtype=dtype).unbind(2))
    if not fused:
        q = k = out
    table, modulation = empty(tokens, width // 2), empty(batch, heads, tokens)
    if kind in ("plain", "modulated"):
        return rotary.launch_of(out, out, q, k, table, table, None if kind == "plain" else modulation)
    gradient = empty(batch, tokens, heads, width, dtype=dtype).transpose(1, 2)  # as attention returns it
    extra = {"dmodulation": modulation, "q": q, "k": k} if kind == "back to the modulation" else {}
    return rotary.launch_of(out, out, gradient, gradient, table, table, modulation, back=True, **extra)


KINDS = ["plain", "modulated", "back", "back to the modulation"]
CASES = [(64, kind, architecture) for kind in KINDS for architecture in aot.ARCHITECTURES]
CASES += [(width, kind, 90) for width in (128, 40, 16) for kind in KINDS[1::2]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width, kind, architecture", CASES)
def test_compiled_code(width, kind, dtype, architecture):
    code = aot.compile_launch(launch(width, dtype, kind), architecture)
    assert code.stack_bytes == 0 and code.spills == 0 and code.registers <= 64, str(code)
    # A thread owns 8 elements of a head and 4 of its angles.
    once, summing = dtype.itemsize // 2, kind == "back to the modulation"
    assert code.global_loads[128] == (4 if summing else 2) * once + 2, str(code)
    assert code.global_loads.keys() == ({128} if kind == "plain" else {128, 32}), str(code)
    assert code.global_stores == ({128: 2 * once, 32: 1} if summing else {128: 2 * once}), str(code)


@pytest.mark.parametrize("width", [2, 10, 1024])
def test_other_widths_do_not_spill_either(width):
    code = aot.compile_launch(launch(width, torch.float16, "back to the modulation"), 90)
    assert code.stack_bytes == 0 and code.spills == 0, str(code)


def test_one_compilation_for_all_sizes_and_strides():
    sizes = [(1, 1, 1), (2, 4, 16), (3, 1, 17), (16, 12, 1104)]
    launches = [
        launch(64, torch.float16, "modulated", batch=b, heads=h, tokens=n, fused=fused)
        for b, h, n in sizes
        for fused in (True, False)
    ]
    assert compilations(launches) == 1
    assert compilations([*launches, launch(64, torch.float16, "plain")]) == 2, "the count counts"
