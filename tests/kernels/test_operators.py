"""The operators as torch sees them, and what they refuse."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from moe_sampler.kernels import (
    COLUMNS,
    ROW_WIDTH,
    euler_step_,
    make_row,
    philox_normal,
    sampler_step_,
    shift_sigmas,
    velocity_to_epsilon,
)

OPS = torch.ops.moe_sampler
SHAPE = (2, 4, 8, 8)
ROW = make_row(
    **{
        "p": 1.1,
        "a": 0.9,
        "b": 0.2,
        "n": 0.3,
        "scale_0": 0.7,
        "d_0": 0.1,
        "d_1": -0.3,
        "keep_x0": 1,
        "keep_n": 2,
    },
    **{"q_cond_0": -2, "q_uncond_0": 1.5, "q_cond_1": 0.4},
)
NAN_AT = (torch.tensor(1), torch.tensor(COLUMNS.index("a")))
AT_THE_END = torch.tensor([2, 0], dtype=torch.int32)
QUIET_ROW = make_row(p=1.1, a=0.9, b=0.2, q_cond_0=-2, scale_0=0.7)


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def step_arguments(guided=True, everything=True):
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    batch, *rest = SHAPE
    x, output = randn(*SHAPE), randn((1 + guided) * batch, *rest)
    table = torch.tensor([QUIET_ROW, ROW])
    if not everything:
        return x, [output], table, 0, [], None, [], None, None, 0
    next_inputs = [torch.zeros(2 * batch, *rest), torch.zeros(SHAPE, dtype=torch.bfloat16)]
    return (
        x,
        [output, randn(*SHAPE).half()],
        table,
        1,
        [randn(*SHAPE), randn(*SHAPE)],
        randn(*SHAPE),
        next_inputs,
        torch.tensor([3, 4]),
        None,
        5,
        torch.zeros(2, dtype=torch.int32),
    )


@pytest.mark.parametrize("everything", [True, False], ids=["everything", "least"])
def test_opcheck_sampler_step(everything):
    opcheck(OPS.sampler_step_.default, step_arguments(everything=everything))


def test_opcheck_a_moving_step():
    x, outputs, table, _, *rest = step_arguments()
    position, told = torch.tensor([1, 0], dtype=torch.int32), torch.tensor(700)
    moving = (position, torch.tensor([900.0, 700.0]), told)
    opcheck(OPS.sampler_step_.default, (x, outputs, table, 0, *rest, *moving))


def test_opcheck_the_others():
    x, velocity, levels = torch.randn(SHAPE), torch.randn(SHAPE).half(), torch.tensor([0.4, 0.6])
    opcheck(OPS.velocity_to_epsilon.default, (velocity, x, levels, levels))
    opcheck(OPS.velocity_to_epsilon.level, (velocity, x, 0.6, 0.5))
    opcheck(OPS.euler_step_.default, (x, velocity, levels, levels * 0.9))
    opcheck(OPS.euler_step_.level, (x, velocity, 0.6, 0.5))
    opcheck(OPS.shift_sigmas.default, (torch.linspace(0, 1, 9), 3.0))
    opcheck(OPS.philox_normal.default, ([2, 3, 5], torch.tensor([1, 2]), 4, 0, torch.float16))


@pytest.mark.gpu
def test_opcheck_on_cuda():
    def move(value):
        if isinstance(value, list):
            return [move(each) for each in value]
        return value.cuda() if isinstance(value, torch.Tensor) else value

    opcheck(OPS.sampler_step_.default, tuple(map(move, step_arguments())))
    opcheck(OPS.euler_step_.level, (torch.randn(SHAPE).cuda(), torch.randn(SHAPE).cuda(), 0.6, 0.5))
    opcheck(OPS.philox_normal.default, ([2, 3, 5], torch.tensor([1, 2]).cuda(), 4, 0, torch.float16))


def loop(x, output, table, next_input, seeds, memories, x0):
    for step in range(2):
        sampler_step_(
            x, [output], table, step, memories=memories, x0=x0, next_inputs=[next_input], seeds=seeds
        )
        memories = [memories[-1], *memories[:-1]]
    euler_step_(x, output[: len(x)], 0.5, 0.4)
    epsilon = velocity_to_epsilon(output[: len(x)], x, 0.8, torch.tensor([0.6, 0.5], device=x.device))
    z = philox_normal(x.shape, seeds, 3, dtype=torch.bfloat16)
    return epsilon, z, shift_sigmas(x.flatten(), 2.0), next_input * 2


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_without_graph_breaks(device, compiler):
    x, (output, _), table, _, memories, x0, *_ = step_arguments()
    x, output, table, x0 = (tensor.to(device) for tensor in (x, output, table, x0))
    memories = [memory.to(device) for memory in memories]
    next_input, seeds = torch.zeros_like(output), torch.tensor([3, 4], device=device)
    own = [x, output, table, next_input, seeds, memories, x0]
    expected_own = copy.deepcopy(own)
    expected = loop(*expected_own)
    compiled = torch.compile(loop, fullgraph=True, backend=compiler)(*own)
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
    assert memories[0].ne(own[-1]).any()
    torch.testing.assert_close(own, expected_own, rtol=0, atol=0)


def test_steps_share_one_compiled_graph():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    step_ = torch.compile(lambda *args: sampler_step_(args[0], [args[1]], *args[2:]), backend=counter)
    table = torch.tensor([QUIET_ROW] * 8)
    x, output = torch.ones(SHAPE), torch.ones(SHAPE)
    for step in range(8):
        step_(x, output, table, step)
    assert counter.frame_count <= 2, "torch specialises the first step on its number, no more"


def test_import_loads_neither_triton_nor_cuda_and_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch
from moe_sampler.kernels import make_row, sampler_step_
assert not torch.cuda.is_initialized()
table = torch.tensor([make_row(p=1, a=0.5, b=0.25, q_cond_0=1)])
assert sampler_step_(torch.ones(1, 4), [torch.ones(1, 4)], table, 0).tolist() == [[1.0] * 4]
try:
    sampler_step_(torch.ones(1, 4), [torch.ones(1, 4)], table, 0, backend="triton")
except ValueError as error:
    assert "pip install triton" in str(error)
else:
    raise AssertionError("a missing backend was not missed")
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    code = "import sys, moe_sampler.kernels; assert not any(m.split('.')[0] == 'triton' for m in sys.modules)"
    result = run_python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks the message of a machine without CUDA tensors")
def test_a_backend_asked_by_name_must_be_there(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.ones(1, 4)
    with pytest.raises(ValueError, match="needs CUDA tensors, these are on cpu: move them"):
        euler_step_(x, torch.ones(1, 4), 1.0, 0.5, backend="triton")
    with pytest.raises(ValueError, match="backend must be None, 'triton' or 'torch', got 'cuda'"):
        philox_normal((1, 4), [0], backend="cuda")
    assert torch.equal(x, torch.ones(1, 4))
    assert torch.equal(euler_step_(x, torch.ones(1, 4), 1.0, 0.5, backend="torch"), torch.full((1, 4), 0.5))


def test_no_derivative_is_an_error_not_a_silent_zero():
    x, velocity = torch.ones(1, 4), torch.ones(1, 4, requires_grad=True)
    with pytest.raises(ValueError, match="velocity requires grad"):
        velocity_to_epsilon(velocity, x, 0.6, 0.8)
    with torch.no_grad():
        velocity_to_epsilon(velocity, x, 0.6, 0.8)


def wrong(error, message, **changes):
    return pytest.param(changes, error, message, id=message)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        wrong(TypeError, "x must be float32", x=lambda a: a["x"].half()),
        wrong(ValueError, "x must be contiguous", x=lambda a: a["x"].transpose(1, 2)),
        wrong(ValueError, "outputs must be a list of 1 to 4", outputs=lambda a: []),
        wrong(ValueError, "outputs must be a list of 1 to 4 tensors", outputs=lambda a: a["outputs"][0]),
        wrong(ValueError, "memories must be a list of 0 to 3", memories=lambda a: [torch.ones(SHAPE)] * 4),
        wrong(
            ValueError, "row 1 reads or keeps more memories than the 1", memories=lambda a: a["memories"][:1]
        ),
        wrong(ValueError, "row 1 reads or keeps more memories than the 0", memories=lambda a: []),
        wrong(ValueError, "x0 must have shape", x0=lambda a: torch.ones(1, 4, 8, 8)),
        wrong(ValueError, r"x0 shares memory with memories\[1\]", x0=lambda a: a["memories"][1]),
        wrong(ValueError, r"outputs\[0\] must have shape", outputs=lambda a: [torch.ones(3, 4, 8, 8)]),
        wrong(ValueError, r"x shares memory with outputs\[0\]", outputs=lambda a: [a["x"]]),
        wrong(
            TypeError,
            r"outputs\[1\] must be float32 or",
            outputs=lambda a: [a["outputs"][0], a["x"].double()],
        ),
        wrong(ValueError, r"outputs\[0\] is on meta", outputs=lambda a: [a["x"].to("meta")]),
        wrong(ValueError, "step 2 is outside the table", step=lambda a: 2),
        wrong(ValueError, "step -1 is outside the table", step=lambda a: -1),
        wrong(ValueError, r"table must have shape \[steps, 24\]", table=lambda a: torch.ones(2, 12)),
        wrong(
            ValueError,
            "got a = nan",
            table=lambda a: a["table"].clone().index_put_(NAN_AT, torch.tensor(math.nan)),
        ),
        wrong(TypeError, "table must be float32", table=lambda a: torch.ones(2, ROW_WIDTH).double()),
        wrong(ValueError, r"memories\[0\] must have shape", memories=lambda a: [torch.ones(1, 4, 8, 8)]),
        wrong(ValueError, r"memories\[0\] shares memory with x", memories=lambda a: [a["x"]]),
        *(
            wrong(ValueError, rf"{written} shares memory with {read}", **given)
            for written, read, given in (
                ("x", "noise", dict(noise=lambda a: a["x"], seeds=lambda a: None)),
                ("x", r"outputs\[1\]", dict(outputs=lambda a: [a["outputs"][0], a["x"]])),
                (r"memories\[1\]", r"outputs\[0\]", dict(outputs=lambda a: [a["memories"][1]])),
                (
                    r"memories\[0\]",
                    "noise",
                    dict(noise=lambda a: a["memories"][0], seeds=lambda a: None),
                ),
                (r"next_inputs\[0\]", "x", dict(next_inputs=lambda a: [a["x"]])),
                (r"next_inputs\[0\]", r"outputs\[0\]", dict(next_inputs=lambda a: [a["outputs"][0]])),
                (
                    r"next_inputs\[1\]",
                    r"memories\[0\]",
                    dict(next_inputs=lambda a: [torch.ones(SHAPE), a["memories"][0]]),
                ),
            )
        ),
        wrong(
            ValueError, "noise must have shape", noise=lambda a: torch.ones(1, 4, 8, 8), seeds=lambda a: None
        ),
        wrong(TypeError, "noise must be float32", noise=lambda a: a["x"].half(), seeds=lambda a: None),
        wrong(ValueError, "nonfinite must have shape", nonfinite=lambda a: torch.zeros(3, dtype=torch.int32)),
        wrong(TypeError, "nonfinite must be int32", nonfinite=lambda a: torch.zeros(2)),
        wrong(ValueError, "leave step at 0, got 1", position=lambda a: torch.zeros(2, dtype=torch.int32)),
        wrong(ValueError, "position 2 is outside the table", step=lambda a: 0, position=lambda a: AT_THE_END),
        wrong(TypeError, "position must be int32", step=lambda a: 0, position=lambda a: torch.zeros(2)),
        wrong(ValueError, "go together, and with position", timesteps=lambda a: torch.zeros(2)),
        wrong(
            TypeError,
            "next_timestep must be int64 or float32",
            step=lambda a: 0,
            position=lambda a: torch.zeros(2, dtype=torch.int32),
            timesteps=lambda a: torch.zeros(2),
            next_timestep=lambda a: torch.zeros((), dtype=torch.int32),
        ),
        wrong(ValueError, "next_inputs must be a list", next_inputs=lambda a: [torch.ones(SHAPE)] * 5),
        wrong(
            ValueError,
            r"next_inputs\[1\] shares memory with next_inputs\[0\]",
            next_inputs=lambda a: [t := torch.ones(4, 4, 8, 8), t[2:]],
        ),
        wrong(TypeError, r"next_inputs\[0\] must be float32", next_inputs=lambda a: [a["x"].int()]),
        wrong(ValueError, "either seeds or noise", noise=lambda a: torch.ones(SHAPE)),
        wrong(TypeError, "seeds must be int64", seeds=lambda a: torch.ones(2)),
        wrong(ValueError, "seeds must have shape", seeds=lambda a: torch.ones(3, dtype=torch.int64)),
        wrong(ValueError, "stream must lie in", stream=lambda a: -1),
        wrong(ValueError, r"row 1 adds noise \(n = 0.3\): give seeds or noise", seeds=lambda a: None),
        wrong(ValueError, "backend must be None", backend=lambda a: "cuda"),
        wrong(ValueError, "x requires grad", x=lambda a: a["x"].clone().requires_grad_()),
    ],
)
def test_refusals_leave_everything_untouched(changes, error, message):
    arguments = {
        "x": torch.ones(SHAPE),
        "outputs": [torch.ones(SHAPE)],
        "table": torch.tensor([QUIET_ROW, ROW]),
        "step": 1,
        "memories": [torch.ones(SHAPE), torch.ones(SHAPE)],
        "x0": torch.ones(SHAPE),
        "next_inputs": [torch.ones(SHAPE)],
        "seeds": torch.tensor([1, 2]),
    }
    before = arguments["x"], *arguments["memories"], arguments["x0"], arguments["next_inputs"][0]
    arguments |= {name: change(arguments) for name, change in changes.items()}
    with pytest.raises(error, match=message):
        sampler_step_(**arguments)
    for tensor in before:
        assert torch.equal(tensor, torch.ones(SHAPE))
