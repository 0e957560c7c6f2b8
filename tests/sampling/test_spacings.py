"""Spacings against diffusers', as whole runs and in parts, and what steps on them come to."""

from __future__ import annotations

import itertools
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch
from diffusers.schedulers import AysSchedules
from every_timestep import EveryTimestep
from older_versions import NEEDS_A_FLOWS_EULER_A
from scipy.integrate import solve_ivp

from moe_sampler import Boundary, Expert, FlowPath, PerStep, SamplingPlan, VPPath, plan, sample
from moe_sampler.sampling import spacings
from moe_sampler.sampling.paths import noise_of_sigma
from moe_sampler.sampling.spacing_names import SPACING_NAMES
from moe_sampler.sampling.spacings import BY_NAME, nodes

BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}


def test_every_name_has_its_formula():
    assert tuple(BY_NAME) == SPACING_NAMES[1:]


@pytest.mark.parametrize("name", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("schedule", BETAS)
def test_on_timesteps_they_are_those_nearest_to_diffusers_levels(name, schedule):
    path, (start, end) = getattr(VPPath, schedule)(), BETAS[schedule]
    settings = dict(beta_schedule=schedule, beta_start=start, beta_end=end)
    for steps in (1, 6, 10):
        scheduler = diffusers.DPMSolverMultistepScheduler(**settings, **{f"use_{name}_sigmas": True})
        scheduler.set_timesteps(steps)
        levels = [path.at(noise_of_sigma(path, float(sigma))) for sigma in scheduler.sigmas[:-1]]
        wanted = [path.level(round(path.timestep(level))).noise for level in levels]
        assert nodes(name, path, steps) == wanted


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["karras", "exponential", "beta"])
def test_on_flows_they_are_diffusers(name, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **{f"use_{name}_sigmas": True})
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.001, 12))
    wanted = scheduler.sigmas[:-1].tolist()
    assert nodes(name, FlowPath(), 12, shift=shift) == pytest.approx(wanted, abs=1e-6)


def test_betas_quantiles_are_scipys():
    for x in np.linspace(0.0, 1.0, 41):
        assert spacings._beta_share(float(x)) == pytest.approx(scipy.stats.beta.cdf(x, 0.6, 0.6), abs=1e-12)


def test_align_your_steps_are_diffusers_timesteps():
    path = VPPath.scaled_linear()
    found = [path.nearest_timestep(noise) for noise in nodes("align_your_steps", path, 10)]
    assert (
        np.abs(np.subtract(found, AysSchedules["StableDiffusionTimesteps"])).max() <= 1
    )  # its sigmas' digits


def test_cosine_is_even_in_the_angle():
    angles = [math.atan2(noise, 1.0 - noise) for noise in nodes("cosine", FlowPath(), 9)]
    assert np.diff(angles) == pytest.approx(-math.pi / 18, abs=1e-12)


@pytest.mark.parametrize("name", BY_NAME)
def test_places_are_the_formulas_inverse(name):
    spacing = BY_NAME[name]
    for place in (0.0, 0.03, 0.4, 0.77, 0.99):
        sigma = spacing.sigma(place, 14.6, 0.03)
        assert spacing.place(sigma, 14.6, 0.03) == pytest.approx(place, abs=1e-9)


@pytest.mark.parametrize("name", SPACING_NAMES)
def test_a_part_of_a_run_is_spaced_like_the_whole(name):
    whole = nodes(name, FlowPath(), 12, shift=2.0)
    for cut in (4, 9):
        first = nodes(name, FlowPath(), cut, 1.0, whole[cut], shift=2.0)
        last = nodes(name, FlowPath(), 12 - cut, whole[cut], 0.0, shift=2.0)
        assert [*first, *last] == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize("name", SPACING_NAMES)
def test_every_step_has_a_timestep_of_its_own(name):
    for path in (VPPath.linear(), VPPath.scaled_linear(), VPPath((*VPPath.linear().betas[:-1], 1.0))):
        for count, high, low in ((60, 1.0, 0.0), (9, 0.7, 0.0), (20, 1.0, 0.8), (1, 0.9, 0.2)):
            found = nodes(name, path, count, high, low)
            times = [path.timestep(path.at(noise)) for noise in found]
            assert len(found) == count and all(a > b for a, b in itertools.pairwise(found))
            assert np.abs(np.round(times) - times).max() < 1e-6
            assert low < found[-1] and times[0] == pytest.approx(path.nearest_timestep(high), abs=1e-6)


@pytest.mark.parametrize("late", [*SPACING_NAMES, (0.8, 0.5, 0.3, 0.2, 0.1)])
@pytest.mark.parametrize("early", ["timestep", "karras", "beta"])
def test_the_handoff_stays_exact(early, late):
    experts = Expert.sol(levels=early), Expert.lune(levels=late)
    compiled = plan(experts, Boundary("sol", "lune", 0.8), steps={"sol": 4, "lune": 5})
    assert [call.name for step in compiled.steps for call in step.calls] == ["sol"] * 4 + ["lune"] * 5
    assert compiled.steps[4].level.noise == 0.8
    assert all(a.target == b.level for a, b in itertools.pairwise(compiled.steps))
    assert SamplingPlan.from_json(compiled.to_json()) == compiled
    assert compiled.made_from is not None
    assert [expert.levels for expert in compiled.made_from.experts] == [early, late]


def test_listed_levels_say_how_many_steps_there_are():
    lune = Expert.lune(levels=[0.9, 0.75, 0.4, 0.2])  # those above the handoff are Sol's to make
    pair, hand_over = (Expert.sol(), lune), Boundary("sol", "lune", 0.8)
    for steps in (None, 20, {"sol": 17}, {"sol": 17, "lune": 3}):
        compiled = plan(pair, hand_over, steps=steps)
        assert len(compiled) == 20 and list(compiled.noise_levels[17:]) == [0.75, 0.4, 0.2]
        assert SamplingPlan.from_json(compiled.to_json()) == compiled
    alone = plan(lune)
    assert list(alone.noise_levels) == [0.9, 0.75, 0.4, 0.2] and not alone.from_image
    with pytest.raises(ValueError, match="make 3 steps, but steps of lune is 5"):
        plan(pair, hand_over, steps={"sol": 4, "lune": 5})
    with pytest.raises(ValueError, match="use at least 4"):
        plan(pair, hand_over, steps=3)
    with pytest.raises(ValueError, match="none of lune's levels lie between"):
        plan(pair, Boundary("sol", "lune", 0.1), steps=8)
    with pytest.raises(ValueError, match="as noise_levels"):
        plan(pair, PerStep(["sol", "lune"]))


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ("karas", 'levels: unknown spacing "karas": use one of timestep'),
        ([0.2, 0.4], "from noise to data, descending"),
        ([1.5, 0.4], "at most 1"),
        ([], "lists noise levels"),
        ([0.5, 0.0], "above 0"),
        ([0.5, "x"], "a noise level must be a finite number"),
        (0.5, "a spacing's name or a list"),
    ],
)
def test_levels_that_cannot_be(levels, message):
    with pytest.raises(ValueError, match=message):
        Expert.lune(levels=levels)


def test_what_brings_its_own_levels_takes_none():
    with pytest.raises(ValueError, match=r"brings its own noise levels.*unipc_karras"):
        plan(Expert.sol(solver="unipc", levels="karras"), steps=5)
    with pytest.raises(ValueError, match="karras levels go down to"):
        plan((Expert.sol(), Expert.lune(levels="karras")), Boundary("sol", "lune", 0.0015), steps=5)


@NEEDS_A_FLOWS_EULER_A
def test_what_is_given_its_levels_takes_these():
    taken = plan(Expert.lune(solver="euler_a", levels="beta"), steps=5)
    assert list(taken.noise_levels) == pytest.approx(nodes("beta", FlowPath(), 5, shift=2.0))


START, END, HANDOFF = 0.9, 0.05, 0.5
ORDERS = {"euler": 1, "heun": 2, "dpmpp_2m": 2, "unip_3": 3}


@pytest.fixture(scope="module")
def points() -> torch.Tensor:
    return torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)


@pytest.fixture(scope="module")
def arrivals(gentle_mixture, points) -> torch.Tensor:
    """Where the ODE dy/ds = (y - x0) / s of y = x / (alpha + sigma) leads from START to END."""

    def slope(s, y):
        return (y - gentle_mixture.x0(torch.from_numpy(y), 1.0 - s, s).numpy()) / s

    solution = solve_ivp(slope, (START, END), points.numpy(), method="DOP853", rtol=1e-12, atol=1e-13)
    return torch.from_numpy(solution.y[:, -1])


def run_in_float64(compiled: SamplingPlan, mixture, x: torch.Tensor) -> torch.Tensor:
    """A plan's rows by hand, with the exact prediction in float64: a third order is soon below float32."""
    x, memories = x * (compiled.start_level.alpha + compiled.start_level.sigma), []
    for step in compiled.steps:
        x0, row = mixture.x0(x, step.level.alpha, step.level.sigma), step.update
        x = row.a * x + row.b * x0
        for weight, memory in zip((row.d_0, row.d_1, row.d_2), memories, strict=False):
            x = x + weight * memory
        if row.keeps:
            assert (row.keep_x, row.keep_x0, row.keep_n) == (0.0, 1.0, 0.0)
            memories = [x0, *memories][:3]
    return x / (compiled.steps[-1].target.alpha + compiled.steps[-1].target.sigma)


def levels_of(name: str, count: int) -> list[float]:
    """A spacing's, the first step of which is cut so that methods without a memory yet cost it no order: what
    a first-order step of h^2 and a second-order one of h^1.5 are off by is of fourth order."""
    whole = nodes(name, FlowPath(), count, START, END)
    h = whole[0] - whole[1]
    return [whole[0], whole[0] - h**2, whole[0] - h**1.5, *whole[1:]]


@pytest.mark.parametrize("name", SPACING_NAMES)
@pytest.mark.parametrize(("solver", "order"), ORDERS.items())
def test_orders_of_convergence_across_the_handoff(gentle_mixture, points, arrivals, name, solver, order):
    """From one path to the other, whose predictions remember each other's."""
    path: Any = EveryTimestep()
    experts = Expert("sol", path, "v_prediction", solver=solver), Expert.lune(solver=solver)
    errors = []
    for count in (40 * order, 80 * order):  # the higher, the later it shows
        compiled = plan(
            experts, Boundary("sol", "lune", HANDOFF), noise_levels=levels_of(name, count), end=END
        )
        arrived = run_in_float64(compiled, gentle_mixture, points)
        errors.append((arrived - arrivals).square().mean().sqrt().item())
    assert order - 0.3 < math.log2(errors[0] / errors[1]) < order + 0.6, errors


def test_three_predictions_are_remembered_across_the_handoff(gentle_mixture, points):
    experts = [
        gentle_mixture.give_model(e)
        for e in (Expert.sol(solver="unip_3"), Expert.lune(solver="dpmpp_3m", levels="cosine"))
    ]
    compiled = plan(experts, Boundary("sol", "lune", 0.7), steps={"sol": 5, "lune": 5}, start=START)
    assert compiled.memories == 2
    first = next(step.update for step in compiled.steps if step.calls[0].name == "lune")
    assert first.d_0 and first.d_1  # both Sol's
    start = points * (compiled.start_level.alpha + compiled.start_level.sigma)
    made = sample(compiled, experts, start.float()[None])[0].double()
    torch.testing.assert_close(made, run_in_float64(compiled, gentle_mixture, points), atol=2e-5, rtol=0)
