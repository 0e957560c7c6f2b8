"""Every operation runs through the same checks on each of its bodies.

`body` is the torch twin on the CPU, the Triton kernel in Triton's interpreter, and, with a GPU, both on CUDA.
Triton decides once per process whether it interprets, so the `interpreter` items run in a process of their
own, which test_interpreter.py starts; elsewhere they are deselected.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from bench.tolerance import error_and_allowance

# The modules share helpers; tests are imported without packages (importmode importlib).
sys.path.insert(0, str(Path(__file__).parent))

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


class Body(NamedTuple):
    device: str
    backend: str


BODIES = [
    pytest.param(Body("cpu", "torch"), id="twin"),
    pytest.param(Body("cpu", "triton"), id="interpreter", marks=pytest.mark.interpreter),
    pytest.param(Body("cuda", "triton"), id="cuda", marks=pytest.mark.gpu),
    pytest.param(Body("cuda", "torch"), id="cuda-twin", marks=pytest.mark.gpu),
]


def pytest_collection_modifyitems(config, items):
    if not INTERPRETING:
        left_out = [item for item in items if item.get_closest_marker("interpreter")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("interpreter")]


@pytest.fixture(scope="session", autouse=INTERPRETING)
def interpreter_knows_bfloat16():
    """Triton's interpreter truncates float32 to bfloat16, where compiled code rounds to nearest even, and its
    dot multiplies bfloat16's bits as integers."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    original, original_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(src.data).to(torch.bfloat16).view(torch.uint16).numpy()
            return TensorHandle(rounded, dst_type.scalar)
        return original(self, src, dst_type)

    def as_float32(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(self, a, b, *rest):
        return original_dot(self, as_float32(a), as_float32(b), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.fixture(params=BODIES)
def body(request):
    return request.param


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(20240607)


@pytest.fixture(scope="session")
def assert_within_rule():
    """`bench.tolerance`'s rule, of results that hold no NaN and no infinity."""

    def check(result, eager, reference, cap=1e-6):
        assert result.shape == reference.shape
        assert torch.isfinite(result).all()
        error, allowed = error_and_allowance(result, eager, reference, cap)
        assert error < allowed, f"error {error:.3g}, allowed {allowed:.3g}"

    return check
