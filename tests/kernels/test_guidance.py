"""`zero_star_guidance` and `projected_guidance` against diffusers' formulas in float64."""

import math

import pytest
import torch
from kernel_helpers import DTYPES, SHAPES, randn
from torch.library import opcheck

from moe_sampler.kernels import projected_guidance, zero_star_guidance

apg = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance", reason="older diffusers have none")
OPS = torch.ops.moe_sampler
SCALE = 6.0
P, Q = 0.8, -1.3
REDUCED = 2e-6  # a sum over a sample, and a scale of the guidance, before the result
EVERY_SHAPE_AND_DTYPE = pytest.mark.parametrize(
    "shape, dtype",
    [
        *(pytest.param(*each.values, torch.float16, id=each.id) for each in SHAPES),
        *(pytest.param((2, 3, 37, 21), dtype, id=str(dtype)) for dtype in DTYPES),
    ],
)


def doubled(generator, shape, dtype, apart=0.5):
    """A model's output: two predictions that have something in common."""
    uncond = randn(generator, *shape)
    return torch.cat([uncond, uncond + apart * randn(generator, *shape)]).to(dtype)


def zero_star(output, scale):
    """CFG-Zero*, in whatever precision the output has."""
    uncond, cond = (half.flatten(1) for half in output.chunk(2)) if output.ndim > 1 else output.chunk(2)
    if output.ndim == 1:
        uncond, cond = uncond[:, None], cond[:, None]
    share = (cond * uncond).sum(1, keepdim=True) / ((uncond * uncond).sum(1, keepdim=True) + 1e-8)
    guided = share * uncond + scale * (cond - share * uncond)
    return guided.view(len(output) // 2, *output.shape[1:])


def projected(output, x, scale, buffer=None, eta=0.0, norm_threshold=0.0):
    """diffusers' own function of the two predictions of x0, in whatever precision, as an output again."""
    uncond, cond = (P * x.to(output) + Q * half for half in output.chunk(2))
    flat = [each.reshape(len(x), -1) for each in (cond, uncond)]
    guided = apg.normalized_guidance(*flat, scale - 1.0, buffer, eta, norm_threshold, True)
    return (guided.view(x.shape) - P * x.to(output)) / Q


@EVERY_SHAPE_AND_DTYPE
def test_zero_star(body, generator, assert_within_rule, shape, dtype):
    output = doubled(generator, shape, dtype)
    result = zero_star_guidance(output.to(body.device), SCALE, backend=body.backend)
    assert result.dtype == torch.float32
    assert_within_rule(result, zero_star(output, SCALE), zero_star(output.double(), SCALE), REDUCED)


@EVERY_SHAPE_AND_DTYPE
def test_projection(body, generator, assert_within_rule, shape, dtype):
    output, x = doubled(generator, shape, dtype), randn(generator, *shape)
    result = projected_guidance(output.to(body.device), x.to(body.device), P, Q, SCALE, backend=body.backend)
    assert result.dtype == torch.float32
    reference = projected(output.double(), x.double(), SCALE)
    assert_within_rule(result, projected(output, x, SCALE), reference, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eta, norm_threshold", [(0.0, 20.0), (0.4, 0.0), (1.0, 3.0)])
def test_three_steps_of_everything(body, generator, assert_within_rule, dtype, eta, norm_threshold):
    """A buffer begins with anything in it; its first step has no momentum."""
    shape, buffers = (2, 3, 37, 21), [apg.MomentumBuffer(-0.5) for _ in range(2)]
    running = torch.full(shape, math.nan, device=body.device)
    for step in range(3):
        output, x = doubled(generator, shape, dtype), randn(generator, *shape)
        options = {"eta": eta, "norm_threshold": norm_threshold}
        result = projected_guidance(
            output.to(body.device),
            x.to(body.device),
            P,
            Q,
            SCALE,
            running=running,
            momentum=-0.5 if step else 0.0,
            backend=body.backend,
            **options,
        )
        reference, eager = (
            projected(output.to(kind), x.to(kind), SCALE, buffer, **options)
            for kind, buffer in zip((torch.float64, dtype), buffers, strict=True)
        )
        assert_within_rule(result, eager, reference, 1e-5)
        kept = buffers[0].running_average.view(shape)
        torch.testing.assert_close(running.cpu().double(), kept, atol=2e-6, rtol=1e-6)


def test_all_of_the_parallel_part_is_plain_guidance(body, generator):
    output, x = doubled(generator, (2, 3, 37, 21), torch.float32), randn(generator, 2, 3, 37, 21)
    result = projected_guidance(
        output.to(body.device),
        x.to(body.device),
        P,
        Q,
        SCALE,
        eta=1.0,
        norm_threshold=1e6,
        backend=body.backend,
    )
    uncond, cond = output.chunk(2)
    torch.testing.assert_close(result.cpu(), uncond + SCALE * (cond - uncond), atol=2e-5, rtol=0)


def test_a_sample_is_the_same_alone_and_in_any_batch(body, generator):
    shape = (5, 3, 37, 41)
    output, x, running = doubled(generator, shape, torch.float16), *(randn(generator, *shape) for _ in "xr")
    x, running = x.to(body.device), running.to(body.device)

    def made(which):
        own = torch.cat([half[which] for half in output.chunk(2)]).to(body.device)
        kept = running[which].clone()
        guided = projected_guidance(
            own, x[which], P, Q, SCALE, norm_threshold=9.0, running=kept, momentum=-0.5, backend=body.backend
        )
        return zero_star_guidance(own, SCALE, backend=body.backend), guided, kept

    together = made(slice(None))
    for i in range(5):
        for mine, all_of_them in zip(made(slice(i, i + 1)), together, strict=True):
            assert torch.equal(mine[0], all_of_them[i])


def test_nothing_to_divide_by(body):
    """Where the unconditional prediction, or x0, is zero everywhere."""
    output = torch.cat([torch.zeros(1, 7), torch.ones(1, 7)]).to(body.device)
    zeros = torch.zeros(1, 7, device=body.device)
    assert torch.equal(zero_star_guidance(output, 3.0, backend=body.backend).cpu(), torch.full((1, 7), 3.0))
    level = projected_guidance(
        zeros.repeat(2, 1), zeros, 1.0, -0.5, 3.0, norm_threshold=1.0, backend=body.backend
    )
    assert torch.equal(level, zeros)


def test_no_samples(body):
    nothing = torch.empty(0, 4, 8, device=body.device)
    assert zero_star_guidance(nothing, 3.0, backend=body.backend).shape == (0, 4, 8)
    assert projected_guidance(nothing, nothing, 1.0, -0.5, 3.0, backend=body.backend).shape == (0, 4, 8)


def test_torch_sees_one_operator():
    output, x = torch.randn(4, 3, 8).half(), torch.randn(2, 3, 8)
    opcheck(OPS.zero_star_guidance.default, (output, SCALE))
    opcheck(OPS.projected_guidance.default, (output, x, torch.randn(2, 3, 8), P, Q, SCALE, 0.5, 2.0, -0.5))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(output=torch.ones(3, 4)), ValueError, r"output must be \[2B, ...\], unconditional half first"),
        (dict(output=torch.ones(4, 4, dtype=torch.int32)), TypeError, "output must be float32 or"),
        (dict(x=torch.ones(4, 4)), ValueError, "x must have shape"),
        (dict(x=torch.ones(2, 4).half()), TypeError, "x must be float32"),
        (dict(running=torch.ones(4, 4)), ValueError, "running must have shape"),
        (dict(q=0.0), ValueError, "q must not be 0"),
        (dict(norm_threshold=-1.0), ValueError, "norm_threshold negative"),
        (dict(momentum=-0.5, running=None), ValueError, "momentum needs running"),
        (dict(scale=math.nan), ValueError, "scale must be finite"),
    ],
)
def test_refusals_leave_what_is_kept_alone(changes, error, message):
    running = torch.ones(2, 4)
    given = dict(output=torch.ones(4, 4), x=torch.ones(2, 4), p=1.0, q=-0.5, scale=3.0, running=running)
    with pytest.raises(error, match=message):
        projected_guidance(**(given | changes))
    assert torch.equal(running, torch.ones(2, 4))


def test_what_is_kept_is_storage_of_its_own():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match="running shares memory with x"):
        projected_guidance(torch.ones(4, 4), x, 1.0, -0.5, 3.0, running=x)
    with pytest.raises(ValueError, match="scale must be finite"):
        zero_star_guidance(torch.ones(4, 4), math.inf)
