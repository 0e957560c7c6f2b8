"""Sampling functions in k-diffusion's form, compiled: k-diffusion's own where it is installed, and some
written here from their papers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from reproducible import assert_reproducible

from bench.scheduler_agreement import SEEDS, SHAPE, difference, function_by_itself, nonlinear
from moe_sampler import Expert, SamplingPlan, sample
from moe_sampler.sampling.probing import NotAffineError

SIGMAS = [14.6, 9.0, 5.0, 2.7, 1.4, 0.7, 0.3, 0.1, 0.0]


def up_and_down(sigma, target, eta=1.0):
    """k-diffusion's get_ancestral_step."""
    up = min(target, eta * (target**2 * (sigma**2 - target**2) / sigma**2) ** 0.5)
    return (target**2 - up**2) ** 0.5, up


def euler_ancestral(model, x, sigmas, noise_sampler: Any = None, eta=1.0):
    for sigma, target in itertools.pairwise(sigmas):
        x0 = model(x, sigma * x.new_ones([x.shape[0]]))
        down, up = up_and_down(sigma, target, eta)
        x = x0 + (x - x0) * down / sigma
        if target > 0:
            x = x + noise_sampler(sigma, target) * up
    return x


def heun(model, x, sigmas):
    """arXiv:2206.00364, algorithm 1."""
    for sigma, target in itertools.pairwise(sigmas):
        slope = (x - model(x, sigma)) / sigma
        there = x + (target - sigma) * slope
        if target > 0:
            slope = (slope + (there - model(there, target)) / target) / 2
        x = x + (target - sigma) * slope
    return x


def dpm_2(model, x, sigmas):
    """The midpoint in ln(sigma): arXiv:2206.00927, algorithm 1, with r = 1/2, as Katherine Crowson has it."""
    for sigma, target in itertools.pairwise(sigmas):
        slope = (x - model(x, sigma)) / sigma
        if target > 0:
            middle = (sigma * target) ** 0.5
            there = x + (middle - sigma) * slope
            slope = (there - model(there, middle)) / middle
        x = x + (target - sigma) * slope
    return x


def adams_bashforth(model, x, sigmas, order):
    """With the weights of equal steps, which these are not: coefficients are whatever a function takes."""
    weights = {
        1: [1.0],
        2: [1.5, -0.5],
        3: [23 / 12, -16 / 12, 5 / 12],
        4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
        5: [1901 / 720, -2774 / 720, 2616 / 720, -1274 / 720, 251 / 720],
    }
    slopes = []
    for sigma, target in itertools.pairwise(sigmas):
        slopes = [(x - model(x, sigma)) / sigma, *slopes][:order]
        own = weights[len(slopes)] if target > 0 else weights[1]
        x = x + (target - sigma) * sum(w * slope for w, slope in zip(own, slopes, strict=False))
    return x


def adams_bashforth_3(model, x, sigmas):
    return adams_bashforth(model, x, sigmas, 3)


def adams_bashforth_4(model, x, sigmas):
    return adams_bashforth(model, x, sigmas, 4)


def adams_bashforth_5(model, x, sigmas):
    return adams_bashforth(model, x, sigmas, 5)


def dpmpp_sde(model, x, sigmas, noise_sampler: Any = None):
    """Two stages whose noise is one Brownian motion's: the second stage's holds the first one's."""
    for sigma, target in itertools.pairwise(sigmas):
        x0 = model(x, sigma)
        if target == 0:
            x = x0
            continue
        middle = (sigma * target) ** 0.5
        down, up = up_and_down(sigma, middle)
        there = down / sigma * x + (1 - down / sigma) * x0 + noise_sampler(sigma, middle) * up
        x0_there = model(there, middle)
        down, up = up_and_down(sigma, target)
        x = down / sigma * x + (1 - down / sigma) * x0_there + noise_sampler(sigma, target) * up
    return x


def check(function, memories, expert=None, sigmas=SIGMAS):
    flow = expert is not None
    expert = nonlinear(expert or Expert.sol())
    compiled = SamplingPlan.from_sampler(function, sigmas, expert)
    assert compiled.memories == memories
    assert SamplingPlan.from_json(compiled.to_json()) == compiled
    expected = function_by_itself(function, sigmas, expert, compiled.initial_scale if flow else sigmas[0])
    assert difference(sample(compiled, expert, shape=SHAPE, seeds=SEEDS), expected) < 1e-5
    return compiled


OWN = [
    (euler_ancestral, 0),
    (heun, 1),
    (dpm_2, 1),
    (adams_bashforth_3, 2),
    (adams_bashforth_4, 3),
    (dpmpp_sde, 1),
]


@pytest.mark.parametrize(("function", "memories"), OWN)
def test_functions_written_from_their_papers(function, memories):
    compiled = check(function, memories)
    assert compiled.steps[0].solver == function.__name__ and compiled.steps[0].calls[0].name == "sol"


@pytest.mark.parametrize("function", [euler_ancestral, dpmpp_sde])
def test_their_noise_is_the_seeds(function):
    expert = nonlinear(Expert.sol())
    compiled = SamplingPlan.from_sampler(function, SIGMAS, expert)
    assert compiled.needs_noise
    assert_reproducible(compiled, expert)


@pytest.mark.parametrize("function", [heun, dpm_2, adams_bashforth_3])
def test_functions_without_noise_sample_flows_as_they_are(function):
    memories = dict(OWN)[function]
    check(function, memories, Expert.lune(), [0.98, 0.8, 0.6, 0.4, 0.2, 0.0])


OF_K_DIFFUSION = {
    **{"euler": 0, "euler_ancestral": 0, "heun": 1, "dpm_2": 1, "dpm_2_ancestral": 1, "lms": 3},
    **{"dpmpp_2s_ancestral": 1, "dpmpp_sde": 1, "dpmpp_2m": 1, "dpmpp_2m_sde": 1, "dpmpp_3m_sde": 2},
}


@pytest.mark.parametrize("name", OF_K_DIFFUSION)
def test_k_diffusions_own(name):
    sampling = pytest.importorskip("k_diffusion.sampling", reason="k-diffusion is not installed")
    check(getattr(sampling, f"sample_{name}"), OF_K_DIFFUSION[name])


def test_a_function_that_no_plan_can_hold_says_why():
    def adaptive(model, x, sigmas):
        x0 = model(x, sigmas[0])
        return x0 if (x - x0).abs().max() < 1 else x

    def normalised(model, x, sigmas):
        x0 = model(x, sigmas[0])
        return x0 / x0.norm()

    for function, message in (
        (adaptive, "adaptive reads values of what it samples, and decides by them"),
        (normalised, "normalised is not affine"),
        (lambda model, x, sigmas: x, "never called the model"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplingPlan.from_sampler(function, SIGMAS, Expert.sol())
    with pytest.raises(NotAffineError, match="adams_bashforth_5 must remember more than 3 things"):
        SamplingPlan.from_sampler(adams_bashforth_5, SIGMAS, Expert.sol())
    with pytest.raises(ValueError, match=r"euler_ancestral leaves the path: after 1 calls .*ancestral steps"):
        SamplingPlan.from_sampler(euler_ancestral, [0.9, 0.5, 0.0], Expert.lune())
    with pytest.raises(ValueError, match=r"at most 1, got 14\.6"):
        SamplingPlan.from_sampler(heun, SIGMAS, Expert.lune())
    with pytest.raises(ValueError, match="descending to 0"):
        SamplingPlan.from_sampler(heun, SIGMAS[::-1], Expert.sol())
