"""What Triton compiles for the training pairs: no spills, no stack, 128-bit accesses, once for all steps."""

import pytest
import torch
from aot_helpers import aot, compilations, compiled_code

from moe_sampler.kernels import training_pairs

pytestmark = compiled_code

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPE, RAGGED = (2, 4, 64, 64), (2, 3, 37, 11)


def empty(shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_of(
    prediction,
    dtype=torch.float32,
    shape=SHAPE,
    *,
    seeds=True,
    step=3,
    stream=0,
    shift=3.0,
    scale=1000.0,
    levels=1000,
):
    x0, batch = empty(shape, dtype), shape[:1]
    flow = "flow" in prediction
    level = empty(batch) if flow else empty(batch, torch.int64)
    tables = (None, None) if flow else (empty((levels,)), empty((levels,)))
    source = (empty(batch, torch.int64), None) if seeds else (None, empty(shape, dtype))
    pair = training_pairs.Pair(x0, level, *tables, *source, step, stream, shift, prediction, scale, dtype)
    return training_pairs.launch_of(
        pair, empty(shape, dtype), empty(shape, dtype), empty(batch) if flow else None
    )


@pytest.mark.parametrize("architecture", [90])  # test_aot compiles every operation for all of them
@pytest.mark.parametrize("seeds", [True, False], ids=["seeds", "noise"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "prediction", ["flow_prediction", "reversed_flow_prediction", "epsilon", "v_prediction", "sample"]
)
def test_compiled_code(prediction, dtype, seeds, architecture):
    code = aot.compile_launch(launch_of(prediction, dtype, seeds=seeds), architecture)
    assert code.stack_bytes == 0 and code.spills == 0, str(code)
    assert code.registers <= 64, "more would keep fewer than 1024 threads on a multiprocessor"
    flow, accesses = "flow" in prediction, dtype.itemsize // 2
    # A thread owns 8 elements; sigma or (timestep, α, σ), the seed, and one timestep to store.
    loads = {128: accesses * (1 if seeds else 2), 64: int(not flow) + int(seeds), 32: 1 if flow else 2}
    assert code.global_loads == {bits: count for bits, count in loads.items() if count}, str(code)
    assert code.global_stores == {128: 2 * accesses} | ({32: 1} if flow else {}), str(code)


@pytest.mark.parametrize("prediction", ["flow_prediction", "v_prediction"])
@pytest.mark.parametrize("shape", [RAGGED, (3, 1), (1, 1 << 32)], ids=["ragged", "one number", "past 2³¹"])
def test_other_sizes_do_not_spill_either(shape, prediction):
    code = aot.compile_launch(launch_of(prediction, torch.float16, shape), 80)
    assert code.stack_bytes == 0 and code.spills == 0, str(code)


def test_one_compilation_for_all_values():
    values = [{"step": step} for step in (0, 1, 15, 16)] + [{"stream": stream} for stream in (1, 16)]
    values += [{"shift": 1.0}, {"scale": 1.0}, {"shape": (16, *SHAPE[1:])}]
    ddpm = [{"levels": levels} for levels in (1, 16, 999, 1000)]
    launches = [launch_of("flow_prediction", **v) for v in values] + [launch_of("epsilon", **v) for v in ddpm]
    assert compilations(launches) == 2, "one a path"
