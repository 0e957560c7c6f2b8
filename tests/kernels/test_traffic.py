"""Bytes of every kernel, counted in the interpreter: each element of its operands exactly once."""

import pytest
import torch

from bench import cases
from moe_sampler.kernels import _jit, conversions

pytest.importorskip("triton", reason="Triton is not available on this platform")
from triton.runtime.errors import InterpreterError

from bench.traffic import count_traffic

pytestmark = pytest.mark.interpreter


def by_tensor(launch):
    traffic = count_traffic(launch)
    return {id(t): traffic[i] for i, t in enumerate(launch.args) if isinstance(t, torch.Tensor)}


# Of two dtypes of one size the second would show nothing new: what is counted are addresses.
CASES = {(case.operation, case.variant, case.dtype.itemsize): case for case in reversed(cases.cases())}


@pytest.mark.parametrize("case", [*CASES.values()][::-1], ids=str)
def test_a_launch_moves_no_byte_twice(case):
    built = case.build(case.small, "cpu")
    of = by_tensor(built.launch)
    for tensor in built.read:
        assert of[id(tensor)].read == of[id(tensor)].distinct_read == tensor.nbytes
    for tensor in built.written:
        assert of[id(tensor)].written == of[id(tensor)].distinct_written == tensor.nbytes
    if built.asked:
        assert sum(of[id(tensor)].read for tensor in built.cached) == built.asked
    listed = {id(t) for t in (*built.read, *built.written, *built.cached)}
    assert listed == of.keys(), "every operand must be listed"
    assert all(not of[key].read for key in of.keys() - {id(t) for t in (*built.read, *built.cached)})
    assert all(not of[key].written for key in of.keys() - {id(t) for t in built.written})


def test_the_count_sees_masks_and_the_outside():
    x, velocity = torch.rand(2, 500), torch.rand(2, 500)
    kernel, grid, args, constants = conversions.euler_launch_of(x, velocity, step_down=0.1)
    assert by_tensor(_jit.Launch(kernel, grid, args, constants))[id(velocity)].read == velocity.nbytes
    with pytest.raises(InterpreterError, match="reaches outside its tensors"):
        count_traffic(_jit.Launch(kernel, (grid[0] + 1,), args, constants))
