"""The handoff between paths, on experts whose denoisers are exact.

Sol runs a one-dimensional Gaussian mixture down to t = 400 on the VP path, Lune takes it to the data. Both follow
the same probability-flow ODE, so halving the steps' length must halve the error; a naive handoff leaves that
ODE and no number of steps brings it back.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from moe_sampler import Boundary, Crossfade, Expert, Spans, plan, sample

SAMPLES = 500
HANDOFF = Expert.sol().path.level(400).noise


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    """Evenly spread quantiles of N(0, 1), so that the distance has no sampling error."""
    q = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES
    return (math.sqrt(2) * torch.erfinv(2 * q - 1)).float()[None]


def duo(mixture, solver: str) -> tuple[Expert, Expert]:
    first = "ddim" if solver == "euler" else solver
    return mixture.give_model(Expert.sol(solver=first)), mixture.give_model(Expert.lune(solver=solver))


def distance_to_truth(mixture, x: torch.Tensor) -> float:
    """Wasserstein-1 distance between samples and the true distribution."""
    q = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES
    return (x.double().flatten().sort().values - mixture.quantile(q)).abs().mean().item()


@pytest.fixture(scope="module")
def solution(gentle_mixture, noise) -> torch.Tensor:
    """Where the gentle mixture's ODE leads from Sol's first node, by second-order steps on the flow path alone.

    The errors of single samples need the gentle mixture: between sharp modes they measure who fell where.
    """
    level = Expert.sol().path.level(999)
    lune = gentle_mixture.give_model(Expert.lune(solver="dpmpp_2m", shift=3.0))
    return sample(plan(lune, steps=1000, start=level.noise), lune, noise / (level.alpha + level.sigma))


def errors(mixture, noise, solution, solver, router, counts=(10, 20, 40, 80)) -> list[float]:
    experts = duo(mixture, solver)
    runs = (sample(plan(experts, router, steps={"sol": n, "lune": n}), experts, noise) for n in counts)
    return [(run - solution).double().square().mean().sqrt().item() for run in runs]


def orders(errors: list[float]) -> list[float]:
    return [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]


ROUTERS = {
    "boundary": Boundary("sol", "lune", HANDOFF),
    "crossfade": Crossfade("sol", "lune", start=HANDOFF + 0.1, end=HANDOFF - 0.1),
}


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_exact_handoff_converges_at_first_order(gentle_mixture, noise, solution, router):
    found = errors(gentle_mixture, noise, solution, "euler", router)
    assert found[-1] < 0.02
    assert all(0.8 < order < 1.3 for order in orders(found)), (found, orders(found))


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_2m_converges_at_second_order_across_the_handoff(gentle_mixture, noise, solution, router):
    found = errors(gentle_mixture, noise, solution, "dpmpp_2m", router)
    assert found[-1] < 0.002
    assert orders(found)[-1] > 1.6, (found, orders(found))


def test_exact_handoff_reaches_the_true_distribution(mixture, noise):
    experts = duo(mixture, "euler")
    distances = [
        distance_to_truth(
            mixture, sample(plan(experts, ROUTERS["boundary"], steps={"sol": n, "lune": n}), experts, noise)
        )
        for n in (10, 20, 40, 80)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.25 * distances[0]


@pytest.mark.parametrize(
    ("restart", "factor"),
    [(0.4, 1.0), (HANDOFF, 1.0)],
    ids=["unconverted with s = t / 1000", "right s but unscaled"],
)
def test_naive_handoffs_plateau(mixture, noise, restart, factor):
    """Unconverted latents are off by alpha + sigma, and t / 1000 is not the noise level of timestep t."""
    sol, lune = duo(mixture, "euler")
    distances = []
    for n in (10, 20, 40, 80):
        state = sample(plan(sol, steps=n, end=HANDOFF), sol, noise)
        distances.append(distance_to_truth(mixture, sample(plan(lune, steps=n, start=restart), lune, factor * state)))
    assert distances[-1] > 0.7 * distances[0]
    exact = sample(plan((sol, lune), ROUTERS["boundary"], steps={"sol": 80, "lune": 80}), (sol, lune), noise)
    assert distances[-1] > 3 * distance_to_truth(mixture, exact)


def test_handoff_by_hand_is_a_division(mixture, noise):
    """What the table folds in: divide the VP latent by alpha + sigma and go on at s = sigma / (alpha + sigma)."""
    sol, lune = duo(mixture, "euler")
    state = sample(plan(sol, steps=10, end=HANDOFF), sol, noise)
    level = sol.path.at(HANDOFF)
    by_hand = sample(plan(lune, steps=10, start=HANDOFF), lune, state / (level.alpha + level.sigma))
    folded = sample(plan((sol, lune), ROUTERS["boundary"], steps={"sol": 10, "lune": 10}), (sol, lune), noise)
    torch.testing.assert_close(folded, by_hand, atol=1e-5, rtol=0)


def test_the_way_back_from_flow_to_vp(gentle_mixture, noise, solution):
    experts = duo(gentle_mixture, "dpmpp_2m")
    way_back = plan(experts, Boundary("lune", "sol", HANDOFF), steps={"sol": 60, "lune": 60}, start=0.99)
    level = experts[1].path.at(0.99)
    start = sample(plan(experts[1], steps=200, start=Expert.sol().path.level(999).noise, end=0.99), experts[1], noise)
    assert way_back.steps[0].level == level
    torch.testing.assert_close(sample(way_back, experts, start), solution, atol=0.005, rtol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow_prediction", "reversed_flow_prediction", "sample"])
@pytest.mark.parametrize("preset", [Expert.sol, Expert.lune, Expert.sd15])
def test_every_prediction_on_every_path_is_the_same_sampler(mixture, noise, preset, prediction):
    reference = mixture.give_model(dataclasses.replace(preset(solver="ddim"), prediction="sample"))
    expert = mixture.give_model(dataclasses.replace(reference, prediction=prediction))
    start = 0.99  # epsilon says nothing about x0 at s = 1
    mine, expected = (sample(plan(e, steps=20, start=start), e, noise) for e in (expert, reference))
    torch.testing.assert_close(mine, expected, atol=2e-5, rtol=0)


def test_three_experts_of_three_parametrizations(gentle_mixture, noise, solution):
    sol, lune = duo(gentle_mixture, "dpmpp_2m")
    sd15 = gentle_mixture.give_model(Expert.sd15())
    experts = (sol, lune, sd15)
    trio = plan(experts, Spans((("sol", 0.7), ("sd15", 0.5), ("lune", 0.0))), steps=150)
    assert trio.experts == ("sol", "sd15", "lune")
    torch.testing.assert_close(sample(trio, experts, noise), solution, atol=0.005, rtol=0)
