"""The public conversions, by their definitions: what is mixed is taken apart again."""

from __future__ import annotations

import pytest
import torch

from moe_sampler import add_noise, epsilon_to_x0, velocity_to_epsilon, velocity_to_x0, x0_to_epsilon
from moe_sampler.sampling.paths import Level
from moe_sampler.sampling.predictions import PREDICTIONS, check_prediction, x0_coefficients

LEVELS = [(0.8, 0.6), (0.3, 0.7), (1.0, 2.0), (0.05, 0.95), (0.999, 1e-3)]
"""On the VP path, on the flow path, on none."""


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_the_conversions_take_apart_what_was_mixed(pair, alpha, sigma):
    x0, epsilon = pair
    x, velocity = alpha * x0 + sigma * epsilon, alpha * epsilon - sigma * x0
    assert torch.equal(add_noise(x0, epsilon, alpha, sigma), x)
    torch.testing.assert_close(epsilon_to_x0(epsilon, x, alpha, sigma), x0)
    torch.testing.assert_close(x0_to_epsilon(x0, x, alpha, sigma), epsilon)
    torch.testing.assert_close(velocity_to_x0(velocity, x, alpha, sigma), x0)
    each = torch.full((2,), alpha), torch.full((2,), sigma)
    found = velocity_to_epsilon(velocity.float(), x.float(), *each)
    torch.testing.assert_close(found.double(), epsilon, rtol=0, atol=2e-5 / min(1.0, alpha**2 + sigma**2))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_every_prediction_says_x0(pair, prediction, alpha, sigma):
    x0, epsilon = pair
    x = alpha * x0 + sigma * epsilon
    output = {
        "epsilon": epsilon,
        "v_prediction": alpha * epsilon - sigma * x0,
        "flow_prediction": epsilon - x0,
        "reversed_flow_prediction": x0 - epsilon,
        "sample": x0,
    }[prediction]
    p, q = x0_coefficients(prediction, Level(alpha, sigma))
    torch.testing.assert_close(p * x + q * output, x0)


def test_what_says_nothing_is_refused(pair):
    x0, x = pair
    for sigma in (0.0, -0.1):
        with pytest.raises(ValueError, match="sigma = 0"):
            x0_to_epsilon(x0, x, 1.0, sigma)
    with pytest.raises(ValueError, match="nothing about x0 at pure noise"):
        epsilon_to_x0(x0, x, 0.0, 1.0)
    assert torch.equal(velocity_to_x0(x0, x, 0.0, 1.0), -x0)
    for name in ("velocity", "XXepsilonXX", ""):
        with pytest.raises(ValueError, match=f'unknown prediction type "{name}": use one of epsilon, v_pre'):
            check_prediction(name)
