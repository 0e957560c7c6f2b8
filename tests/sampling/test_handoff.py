"""The handoff between paths, on experts whose denoisers are exact.

Sol runs a one-dimensional Gaussian mixture down to t = 400 on the VP path, Lune takes it to the data. Both
follow the same probability-flow ODE, so halving the steps' length must halve the error; a naive handoff
leaves that ODE and no number of steps brings it back.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from moe_sampler import Boundary, Crossfade, Expert, Spans, plan, sample

SAMPLES = 500
HANDOFF = Expert.sol().path.level(400).noise
# Nearer to pure noise ln(alpha / sigma) changes so fast that no affordable step is in the asymptotic regime.
START = Expert.sol().path.level(800)


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
    """Where the gentle mixture's ODE dx/ds = (x - x0) / s leads from `START`, by Runge-Kutta in float64.

    The errors of single samples need the gentle mixture: between sharp modes they measure who fell where.
    """
    x = noise.double() / (START.alpha + START.sigma)
    nodes = torch.linspace(START.noise, 1e-3, 800, dtype=torch.float64).tolist()

    def slope(x: torch.Tensor, s: float) -> torch.Tensor:
        return (x - gentle_mixture.x0(x, 1 - s, s)) / s

    for s, following in itertools.pairwise(nodes):
        h = following - s
        k1 = slope(x, s)
        k2 = slope(x + h / 2 * k1, s + h / 2)
        k3 = slope(x + h / 2 * k2, s + h / 2)
        k4 = slope(x + h * k3, following)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x - nodes[-1] * slope(x, nodes[-1])


def errors(mixture, noise, solution, solver, router, counts=(10, 20, 40, 80), lune=1) -> list[float]:
    experts = duo(mixture, solver)
    runs = (
        sample(plan(experts, router, steps={"sol": n, "lune": lune * n}, start=START.noise), experts, noise)
        for n in counts
    )
    return [(run - solution).double().square().mean().sqrt().item() for run in runs]


def orders(errors: list[float]) -> list[float]:
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


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
    # On a grid uniform in s, 2M's error is O(h^2 log(1 / h)): near the data the steps in ln(alpha / sigma)
    # stay finite. Lune's finer grid keeps that logarithm from hiding the order.
    found = errors(gentle_mixture, noise, solution, "dpmpp_2m", router, counts=(20, 40, 80), lune=4)
    assert found[-1] < 1e-3 and all(1.6 < order < 2.4 for order in orders(found)), (found, orders(found))
    first_order = errors(gentle_mixture, noise, solution, "euler", router, counts=(80,), lune=4)
    assert found[-1] < 0.1 * first_order[0]


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_heun_converges_at_second_order_across_the_handoff(gentle_mixture, noise, solution, router):
    """Its corrector at the handoff is Lune's, its predictor Sol's; where they mix, so do both."""
    found = errors(gentle_mixture, noise, solution, "heun", router, counts=(10, 20, 40))
    assert found[-1] < 1e-3 and all(1.8 < order < 2.2 for order in orders(found)), (found, orders(found))


@pytest.mark.parametrize(("first", "then"), [("heun", "dpmpp_2m"), ("dpmpp_2m", "heun")])
def test_solvers_of_second_order_may_hand_over_to_each_other(gentle_mixture, noise, solution, first, then):
    experts = [gentle_mixture.give_model(e) for e in (Expert.sol(solver=first), Expert.lune(solver=then))]
    found = []
    for n in (20, 40, 80):
        compiled = plan(experts, ROUTERS["boundary"], steps={"sol": n, "lune": 4 * n}, start=START.noise)
        run = sample(compiled, experts, noise)
        found.append((run - solution).double().square().mean().sqrt().item())
    assert found[-1] < 1e-3 and all(1.5 < order < 2.4 for order in orders(found)), (found, orders(found))


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
        distances.append(
            distance_to_truth(mixture, sample(plan(lune, steps=n, start=restart), lune, factor * state))
        )
    assert distances[-1] > 0.7 * distances[0]
    exact = sample(plan((sol, lune), ROUTERS["boundary"], steps={"sol": 80, "lune": 80}), (sol, lune), noise)
    assert distances[-1] > 3 * distance_to_truth(mixture, exact)


def test_handoff_by_hand_is_a_division(mixture, noise):
    """What the table folds in: the VP latent over alpha + sigma, at s = sigma / (alpha + sigma)."""
    sol, lune = duo(mixture, "euler")
    state = sample(plan(sol, steps=10, end=HANDOFF), sol, noise)
    level = sol.path.at(HANDOFF)
    by_hand = sample(plan(lune, steps=10, start=HANDOFF), lune, state / (level.alpha + level.sigma))
    folded = sample(plan((sol, lune), ROUTERS["boundary"], steps={"sol": 10, "lune": 10}), (sol, lune), noise)
    torch.testing.assert_close(folded, by_hand, atol=1e-5, rtol=0)


def test_the_way_back_from_flow_to_vp(gentle_mixture, noise, solution):
    experts = duo(gentle_mixture, "dpmpp_2m")
    way_back = plan(
        experts, Boundary("lune", "sol", HANDOFF), steps={"sol": 60, "lune": 60}, start=START.noise
    )
    assert way_back.experts == ("lune", "sol")
    start = noise / (START.alpha + START.sigma)
    torch.testing.assert_close(sample(way_back, experts, start).double(), solution, atol=0.002, rtol=0)


@pytest.mark.parametrize(
    "prediction", ["epsilon", "v_prediction", "flow_prediction", "reversed_flow_prediction", "sample"]
)
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
    trio = plan(experts, Spans((("sol", 0.7), ("sd15", 0.5), ("lune", 0.0))), steps=300, start=START.noise)
    assert trio.experts == ("sol", "sd15", "lune")
    torch.testing.assert_close(sample(trio, experts, noise).double(), solution, atol=0.002, rtol=0)
