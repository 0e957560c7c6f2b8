"""`velocity_to_epsilon`, `euler_step_`, `shift_sigmas` against their definitions in float64."""

import math

import numpy as np
import pytest
import torch
from kernel_helpers import DTYPES, SHAPES, randn

from moe_sampler.kernels import euler_step_, shift_sigma, shift_sigmas, velocity_to_epsilon


def levels(values, batch, kind, body):
    """The same levels as numbers or as one float32 per sample, and in float64 for the reference."""
    if kind == "numbers":
        return [float(v) for v in values], [torch.tensor(v, dtype=torch.float64) for v in values]
    spread = [torch.tensor([v * (1 + 0.1 * i) for i in range(batch)], dtype=torch.float32) for v in values]
    return [t.to(body.device) for t in spread], [t.double() for t in spread]


def in_every_form(test):
    test = pytest.mark.parametrize("shape", SHAPES)(test)
    test = pytest.mark.parametrize("dtype", DTYPES, ids=str)(test)
    return pytest.mark.parametrize("kind", ["numbers", "per sample"])(test)


def broadcast(value, x):
    return value.view(-1, *(1,) * (x.ndim - 1)) if value.ndim else value


@in_every_form
def test_velocity_to_epsilon_recovers_the_noise(body, generator, assert_within_rule, shape, dtype, kind):
    """From v = α·ε − σ·x0 and x = α·x0 + σ·ε, on a path that is not variance preserving."""
    (alpha, sigma), exact = levels((0.6, 0.5), shape[0], kind, body)
    a, s = (broadcast(value, torch.empty(shape)) for value in exact)
    x0, noise = randn(generator, *shape).double(), randn(generator, *shape).double()
    velocity, x = (a * noise - s * x0).to(dtype), (a * x0 + s * noise).float()
    result = velocity_to_epsilon(
        velocity.to(body.device), x.to(body.device), alpha, sigma, backend=body.backend
    )
    assert result.dtype == dtype
    reference = (s * x.double() + a * velocity.double()) / (a * a + s * s)
    low_a, low_s = a.to(dtype), s.to(dtype)
    eager = (low_s * x.to(dtype) + low_a * velocity) / (low_a * low_a + low_s * low_s)
    assert_within_rule(result, eager, reference)
    if dtype == torch.float32:
        torch.testing.assert_close(result.cpu().double(), noise, rtol=0, atol=2e-6)


def test_velocity_to_epsilon_with_everything_in_half(body, generator, assert_within_rule):
    velocity, x = (randn(generator, 2, 4, 8, 8, dtype=torch.float16) for _ in range(2))
    angle = 0.7
    alpha, sigma = math.cos(angle), math.sin(angle)
    arguments = velocity.to(body.device), x.to(body.device), alpha, sigma
    reference = sigma * x.double() + alpha * velocity.double()
    assert_within_rule(
        velocity_to_epsilon(*arguments, backend=body.backend), sigma * x + alpha * velocity, reference
    )


@in_every_form
def test_euler_step_moves_towards_the_data(body, generator, assert_within_rule, shape, dtype, kind):
    (sigma, sigma_next), exact = levels((0.7, 0.55), shape[0], kind, body)
    s, s_next = (broadcast(value, torch.empty(shape)) for value in exact)
    x0, noise = randn(generator, *shape).double(), randn(generator, *shape).double()
    x, velocity = ((1 - s) * x0 + s * noise).float(), (noise - x0).to(dtype)
    state = x.to(body.device, copy=True)
    result = euler_step_(state, velocity.to(body.device), sigma, sigma_next, backend=body.backend)
    assert result is state
    reference = x.double() - velocity.double() * (s - s_next)
    assert_within_rule(result, x.to(dtype) - velocity * (s - s_next).to(dtype), reference)
    if dtype == torch.float32:
        on_path = (1 - s_next) * x0 + s_next * noise
        torch.testing.assert_close(result.cpu().double(), on_path, rtol=0, atol=2e-6)


@pytest.mark.parametrize("count", [1, 20, 1000, 1024, 3001])
@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0, 3.0])
def test_shift_sigmas(body, count, shift):
    sigmas = torch.linspace(1, 0, count) if count > 1 else torch.tensor([0.3])
    result = shift_sigmas(sigmas.to(body.device), shift, backend=body.backend)
    s = sigmas.double()
    torch.testing.assert_close(result.cpu().double(), shift * s / (1 + (shift - 1) * s), rtol=3e-7, atol=0)
    if count > 1:
        assert result[0] == 1 and result[-1] == 0


def test_shift_pushes_towards_noise(body):
    sigmas = torch.linspace(0.1, 0.9, 9, device=body.device)
    assert (shift_sigmas(sigmas, 3.0, backend=body.backend) > sigmas).all()


def test_shift_keeps_float64():
    sigmas = torch.linspace(0, 1, 11, dtype=torch.float64)
    result = shift_sigmas(sigmas, 3.0)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, 3 * sigmas / (1 + 2 * sigmas), rtol=1e-15, atol=0)


def test_host_formula_takes_numbers_arrays_and_tensors():
    assert shift_sigma(0.5, 3.0) == 0.75
    np.testing.assert_allclose(shift_sigma(np.array([0.0, 0.5, 1.0]), 3.0), [0, 0.75, 1])
    torch.testing.assert_close(shift_sigma(torch.tensor([0.0, 0.5, 1.0]), 3.0), torch.tensor([0, 0.75, 1]))
    # A shift is undone by its reciprocal, and two shifts multiply.
    assert shift_sigma(shift_sigma(0.3, 2.0), 0.5) == pytest.approx(0.3)
    assert shift_sigma(shift_sigma(0.3, 2.0), 1.5) == pytest.approx(shift_sigma(0.3, 3.0))


def test_level_zero_keeps_mixed_numbers_and_tensors(generator):
    x, velocity = randn(generator, 2, 8), randn(generator, 2, 8)
    expected = euler_step_(x.clone(), velocity, 0.5, 0.25)
    mixed = euler_step_(x.clone(), velocity, torch.full((2,), 0.5), 0.25)
    assert torch.equal(mixed, expected)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: euler_step_(x.double(), x, 1, 0), TypeError, "x must be float32"),
        (lambda x: euler_step_(x, x, 1, 0), ValueError, "x shares memory with velocity"),
        (lambda x: euler_step_(x, x[:1].clone(), 1, 0), ValueError, "velocity must have shape"),
        (lambda x: euler_step_(x, x.clone(), torch.ones(3), 0), ValueError, "sigma must have shape"),
        (lambda x: euler_step_(x.T, x.T.clone(), 1, 0), ValueError, "x must be contiguous"),
        (lambda x: euler_step_(x, x.int(), 1, 0), TypeError, "velocity must be float32 or float16"),
        (lambda x: euler_step_(x, x.clone(), torch.ones(2).double(), 0), TypeError, "sigma must be float32"),
        (lambda x: velocity_to_epsilon(x, x[:1], 1, 1), ValueError, "velocity must have shape"),
        (lambda x: velocity_to_epsilon(x, x, 0, 0), ValueError, "must not both be zero"),
        (lambda x: velocity_to_epsilon(x, x.double(), 1, 1), TypeError, "x must be float32 or"),
        (lambda x: velocity_to_epsilon(x, x, math.nan, 1), ValueError, "alpha must be finite"),
        (lambda x: euler_step_(x, x.clone(), 1, math.nan), ValueError, "sigma_next must be finite"),
        (lambda x: shift_sigmas(x, 0), ValueError, "shift must be positive"),
        (lambda x: shift_sigmas(x, math.nan), ValueError, "shift must be positive"),
        (lambda x: shift_sigmas(x.half(), 2), TypeError, "sigmas must be float32 or float64"),
    ],
)
def test_wrong_arguments_leave_x_untouched(call, error, message):
    x = torch.arange(8.0).view(2, 4)
    with pytest.raises(error, match=message):
        call(x)
    assert torch.equal(x, torch.arange(8.0).view(2, 4))
