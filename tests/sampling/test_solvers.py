"""Solvers alone: against textbook steps, exact moments of a Gaussian, and their orders of convergence."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch
from every_timestep import EveryTimestep
from scipy.integrate import solve_ivp

from moe_sampler import (
    Boundary,
    Crossfade,
    Expert,
    FlowPath,
    Level,
    PerStep,
    SamplingPlan,
    VPPath,
    plan,
    sample,
)
from moe_sampler.sampling.solvers import HEUN_CORRECTOR, SOLVERS, check_solver, heun_corrector_row, solver_row

SOL, LUNE = Expert.sol(solver="heun"), Expert.lune(solver="heun")


@pytest.mark.parametrize("path", [FlowPath(), VPPath.linear()], ids=["flow", "vp"])
def test_heuns_two_rows_are_the_average_of_two_slopes(path):
    """By hand, in the time in which each path's slope is (x - x0) / time."""
    draw = random.Random(7)
    for _ in range(20):
        high, low = sorted((draw.uniform(0.02, 0.98) for _ in range(2)), reverse=True)
        level, target = path.at(high), path.at(low)
        x, x0, x0_there = (draw.gauss(0.0, 1.0) for _ in range(3))
        scale, scale_there = (1.0, 1.0) if isinstance(path, FlowPath) else (level.alpha, target.alpha)
        time, time_there = level.sigma / scale, target.sigma / scale_there
        first_slope = (x / scale - x0) / time
        predicted = x / scale + (time_there - time) * first_slope
        second_slope = (predicted - x0_there) / time_there
        expected = scale_there * (x / scale + (time_there - time) * 0.5 * (first_slope + second_slope))

        predictor, corrector = solver_row("heun", level, target), heun_corrector_row(level, target)
        state = predictor.a * x + predictor.b * x0
        assert state == pytest.approx(scale_there * predicted, abs=1e-12)
        state = corrector.a * state + corrector.b * x0_there + corrector.d_0 * x0
        assert state == pytest.approx(expected, abs=1e-12 * max(1.0, abs(corrector.b)))


def test_heun_starts_at_pure_noise_and_ends_at_the_data():
    for expert in (LUNE, SOL):
        compiled = plan(expert, steps=5)
        assert [step.solver for step in compiled.steps] == ["heun", HEUN_CORRECTOR] * 4 + ["heun"]
        assert len(compiled.noise_levels) == 5 and compiled.model_calls == 9
        assert compiled.steps[-1].target == Level(1.0, 0.0)
    with pytest.raises(ValueError, match="first order"):
        heun_corrector_row(Level(0.5, 0.5), Level(1.0, 0.0))


def test_a_corrector_is_evaluated_by_whoever_works_where_the_step_arrives():
    compiled = plan((SOL, LUNE), Boundary("sol", "lune", 0.7), steps={"sol": 4, "lune": 3})
    for step, following in itertools.pairwise(compiled.steps):
        assert step.target == following.level
        assert step.corrects != following.corrects
        if step.corrects:  # the next step looks from the same level, told the same time
            assert step.calls == following.calls and step.target == step.level
    sol, lune = (
        [s for s in compiled.steps if s.calls[0].name == name and s.corrects] for name in ("sol", "lune")
    )
    assert len(sol) == 3 and all(isinstance(s.calls[0].timestep, int) for s in sol)
    # The step that crosses to Lune's path is corrected by Lune: experts need not come back.
    assert [s.calls[0].timestep for s in lune] == pytest.approx(
        [1000 * noise for noise in compiled.noise_levels[4:]], rel=1e-12
    )


def test_heun_into_an_end_with_noise_left():
    """Corrected where the experts can look there, first order where that is between two timesteps."""
    assert plan(LUNE, steps=2, end=0.3).steps[-1].corrects
    on_grid, off_grid = (
        SOL.path.level(250).noise,
        0.5 * (SOL.path.level(250).noise + SOL.path.level(251).noise),
    )
    last = plan(SOL, steps=2, end=on_grid).steps[-1]
    assert last.corrects and last.calls[0].timestep == 250
    assert not plan(SOL, steps=2, end=off_grid).steps[-1].corrects


def test_a_plan_of_heun_steps_prints_and_goes_to_json():
    compiled = plan((SOL, LUNE), Crossfade("sol", "lune", 0.8, 0.5), steps=6)
    assert SamplingPlan.from_json(compiled.to_json()) == compiled
    lines = str(compiled).splitlines()
    assert lines[0] == f"6 steps, {compiled.model_calls} model calls per sample"
    assert len(lines) == 2 + len(compiled) and sum(HEUN_CORRECTOR in line for line in lines) == 5


def test_a_multistep_solver_forgets_a_prediction_made_at_its_own_level():
    """After a corrector the history lies where the next step begins: no direction to extrapolate in."""
    level, target = FlowPath().at(0.5), FlowPath().at(0.4)
    assert solver_row("dpmpp_2m", level, target, [level]) == solver_row("euler", level, target)
    compiled = plan((SOL, Expert.lune(solver="dpmpp_2m")), Boundary("sol", "lune", 0.7), steps=8)
    first, second, *_ = (step.coefficients for step in compiled.steps if step.solver == "dpmpp_2m")
    assert first["d_0"] == 0.0 and second["d_0"] != 0.0


def test_unknown_solvers_and_backward_steps():
    for solver in SOLVERS:
        check_solver(solver)
        with pytest.raises(ValueError, match="from noise to data"):
            solver_row(solver, FlowPath().at(0.4), FlowPath().at(0.5))
    with pytest.raises(ValueError, match=f"use one of {', '.join(SOLVERS)}"):
        check_solver("lms")


# Orders of convergence, one expert at a time; tests/test_handoff.py has them across the handoff.

START, END = 0.9, 0.05


@pytest.fixture(scope="module")
def points() -> torch.Tensor:
    return torch.linspace(-2.0, 2.0, 41, dtype=torch.float64)[None]


@pytest.fixture(scope="module")
def arrivals(gentle_mixture, points) -> torch.Tensor:
    """Where the ODE dy/ds = (y - x0) / s of y = x / (alpha + sigma) leads from START to END."""

    def slope(s, y):
        return (y - gentle_mixture.x0(torch.from_numpy(y), 1.0 - s, s).numpy()) / s

    start = points.numpy().ravel() / (VPPath.linear().at(START).alpha + VPPath.linear().at(START).sigma)
    solution = solve_ivp(slope, (START, END), start, method="DOP853", rtol=1e-9, atol=1e-10)
    return torch.from_numpy(solution.y[:, -1])[None]


class EvenlyInFlow(EveryTimestep):
    """Its grid is the flow's."""

    def grid(self, steps, start, end, shift, spacing):
        return FlowPath().grid(steps, start, end, shift)


@pytest.mark.parametrize("path", [FlowPath(), EvenlyInFlow()], ids=["flow", "vp"])
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_orders_of_convergence(gentle_mixture, points, arrivals, path, solver, order):
    expert = gentle_mixture.give_model(Expert("x", path, "sample", solver=solver))
    level, end = path.at(START), path.at(END)
    scale = (level.alpha + level.sigma) / (VPPath.linear().at(START).alpha + VPPath.linear().at(START).sigma)
    errors = []
    for steps in (40, 80, 160):
        compiled = plan(expert, steps=steps, start=START, end=END)
        state = sample(compiled, expert, (points * scale).float()) / (end.alpha + end.sigma)
        errors.append((state - arrivals).square().mean().sqrt().item())
    found = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(order - 0.25 < rate < order + 0.35 for rate in found), (errors, found)


STD, MEAN = 0.6, 0.8


def moments(compiled: SamplingPlan) -> tuple[float, float]:
    """Mean and variance that a plan makes of N(MEAN, STD^2) noised to its first level, exactly: rows are
    affine, and so is the denoiser x0 = MEAN + gain * (x - alpha * MEAN), which stands in for p x + q o."""
    level = compiled.start_level
    first = np.array([level.alpha * MEAN, 0.0])  # of (x, the memory)
    second = np.diag([level.alpha**2 * STD**2 + level.sigma**2, 0.0])
    for step in compiled.steps:
        alpha, sigma = step.level.alpha, step.level.sigma
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        offset = MEAN - gain * alpha * MEAN
        row = step.coefficients
        linear = np.array([[row["a"] + row["b"] * gain, row["d_0"]], [gain, 0.0]])
        first = linear @ first + np.array([row["b"] * offset, offset])
        second = linear @ second @ linear.T + np.diag([row["n"] ** 2, 0.0])
    return float(first[0]), float(second[0, 0])


@pytest.mark.parametrize("path", [FlowPath(), EvenlyInFlow()], ids=["flow", "vp"])
@pytest.mark.parametrize(
    ("solver", "eta", "order"), [("ddpm", 0.0, 1), ("ddim", 0.5, 1), ("dpmpp_2m_sde", 0.0, 2)]
)
def test_weak_orders_of_the_stochastic_solvers(path, solver, eta, order):
    """How fast the variance tends to the true one as steps get shorter; the mean is met exactly."""
    end = path.at(END)
    errors = []
    for steps in (100, 200, 400):
        expert = Expert("x", path, "sample", solver=solver, eta=eta)
        mean, variance = moments(plan(expert, steps=steps, start=START, end=END))
        assert mean == pytest.approx(end.alpha * MEAN, abs=1e-12)
        errors.append(abs(variance - end.alpha**2 * STD**2 - end.sigma**2))
    found = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(order - 0.25 < rate < order + 0.35 for rate in found), (errors, found)


def test_samples_of_the_sde_have_the_planned_moments(gentle_mixture):
    """The moments above are those of real runs, not of a calculation that never met the sampler."""
    gaussian = dataclasses.replace(gentle_mixture, means=(MEAN,), stds=(STD,), shares=(1.0,))
    experts = [gaussian.give_model(preset(solver="dpmpp_2m_sde")) for preset in (Expert.sol, Expert.lune)]
    compiled = plan(experts, Boundary("sol", "lune", 0.7), steps=8)
    samples = sample(compiled, experts, shape=(2, 30000), seeds=[1, 2]).double()
    mean, variance = moments(compiled)
    assert samples.mean().item() == pytest.approx(mean, abs=0.01)
    assert samples.var().item() == pytest.approx(variance, abs=0.01)
    assert abs(variance - STD**2) > 0.02  # so coarse a run is off by more than what is tested


def test_a_heun_run_per_step_mixes_experts(gentle_mixture):
    experts = [gentle_mixture.give_model(e) for e in (SOL, LUNE)]
    mixed = PerStep([*["sol"] * 10, *[{"sol": 0.5, "lune": 0.5}] * 10, *["lune"] * 10])
    compiled = plan(experts, mixed, start=0.9)
    x = torch.linspace(-2, 2, 41)[None]
    lune_alone = sample(
        plan(experts[1], steps=60, start=compiled.start_level.noise),
        experts[1],
        x / _norm(compiled.start_level),
    )
    torch.testing.assert_close(sample(compiled, experts, x), lune_alone, atol=0.01, rtol=0)


def _norm(level: Level) -> float:
    return level.alpha + level.sigma


@pytest.mark.parametrize(("sigma", "target"), [(14.6, 7.0), (2.0, 1.0), (0.5, 0.03)])
def test_where_the_signal_keeps_its_size_ddpm_is_euler_ancestral(sigma, target):
    """k-diffusion's get_ancestral_step: a path of one's own with alpha = 1, as EDM and Euler a have it."""
    up = math.sqrt(target**2 * (sigma**2 - target**2) / sigma**2)
    down = math.sqrt(target**2 - up**2)
    row = solver_row("ddpm", Level(1.0, sigma), Level(1.0, target))
    # x' = x0 + (x - x0) sigma_down / sigma + sigma_up z
    assert row == pytest.approx((down / sigma, 1.0 - down / sigma, up, 0, 0, 0, 0, 0, 0), rel=1e-9)
