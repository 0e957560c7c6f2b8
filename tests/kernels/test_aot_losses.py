"""What Triton compiles for the weighted loss: no spills, no stack, 128-bit accesses, once for all values."""

import pytest
import torch
from aot_helpers import aot, compilations, compiled_code, skip_unless_tuned

from moe_sampler.kernels import losses

pytestmark = compiled_code

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPE, TOKENS = (2, 4, 64, 64), (2, 4096, 16)
KINDS = ["epsilon", "v_prediction", "flow_prediction", "sample"]


def empty(shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_of(
    dtype, shape=SHAPE, *, size=None, map_shape=None, weight=False, kind="", gamma=5.0, wanted=True
):
    x, batch = empty(shape, dtype), shape[:1]
    weights = empty(batch) if weight else None, empty((*batch, *map_shape)) if map_shape else None
    height, width = size or (shape[-2:] if map_shape else (0, 0))
    levels = (empty(batch), empty(batch)) if kind else (None, None)
    arguments = losses.Loss(
        x, x, *weights, height, width, size is not None, *levels, gamma, kind, wanted=wanted
    )
    return losses.launch_of(arguments, empty((*batch, losses.partials(x))), x if wanted else None)


# name: options, scalars a program reads, texels a thread reads
CASES = {
    "plain": ({}, 0, 0),
    "without gradient": ({"wanted": False, "weight": True}, 1, 0),
    **{f"weight, min-SNR of {kind}": ({"weight": True, "kind": kind}, 3, 0) for kind in KINDS},
    "map of an image": ({"map_shape": (8, 8)}, 0, 32),
    "map of tokens": ({"shape": TOKENS, "size": (64, 64), "map_shape": (8, 8), "weight": True}, 1, 4),
}


@pytest.mark.parametrize("architecture", [90])  # test_aot compiles every operation for all of them
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options, scalars, texels", CASES.values(), ids=list(CASES))
def test_compiled_code(options, scalars, texels, dtype, architecture):
    code = aot.compile_launch(launch_of(dtype, **options), architecture)
    assert code.stack_bytes == 0 and code.spills == 0, str(code)
    assert code.registers <= 64, "more would keep fewer than 1024 threads on a multiprocessor"
    accesses = dtype.itemsize // 2  # a thread owns 8 elements
    expected = {128: 2 * accesses, 32: scalars + texels}
    assert code.global_loads == {bits: count for bits, count in expected.items() if count}, str(code)
    written = {128: accesses} if options.get("wanted", True) else {}
    assert code.global_stores == written | {32: 1}, str(code)


@pytest.mark.parametrize("architecture", [90])  # test_aot compiles every operation for all of them
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_gradient(dtype, architecture):
    x, accesses = empty(SHAPE, dtype), dtype.itemsize // 2
    for slopes in ((x, None), (None, x), (x, x)):
        code = aot.compile_launch(losses.backward_launch_of(*slopes, x, empty((2,))), architecture)
        assert code.stack_bytes == 0 and code.spills == 0 and code.registers <= 64, str(code)
        assert code.global_loads == {128: accesses, 32: 1}, str(code)
        assert code.global_stores == {128: accesses * (2 if slopes[0] is slopes[1] else 1)}, str(code)


@pytest.mark.parametrize(
    "options",
    [
        {"shape": (2, 3, 37, 11), "map_shape": (8, 8), "kind": "sample"},
        {"shape": (2, 407, 3), "size": (37, 11), "map_shape": (8, 8)},
        {"shape": (3, 1)},
        {"shape": (1, 1 << 32), "weight": True},
        {"shape": (1 << 12, 16, 256, 256), "map_shape": (8, 8)},
    ],
    ids=["ragged image", "ragged tokens", "one number a sample", "a sample past 2³¹", "a batch past 2³¹"],
)
def test_other_sizes_do_not_spill_either(options):
    code = aot.compile_launch(launch_of(torch.float16, **options), 80)
    assert code.stack_bytes == 0 and code.spills == 0, str(code)
    skip_unless_tuned()
    assert code.registers <= 64, str(code)


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_lets_nan_through(kind, architecture):
    """The interpreter's minimum always does; the hardware's drops a NaN unless told not to."""
    code = aot.compile_launch(launch_of(torch.float32, kind=kind), architecture)
    assert "min.NaN.f32" in code.ptx and "min.f32" not in code.ptx


def test_one_compilation_for_all_values():
    launches = [launch_of(torch.float16, kind="sample", gamma=gamma) for gamma in (1.0, 5.0)]
    launches += [launch_of(torch.float16, (batch, *SHAPE[1:]), kind="sample") for batch in (1, 3, 16)]
    assert compilations(launches) == 1
