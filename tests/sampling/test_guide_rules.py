"""The guide's rules, each as the mistake it prevents."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_sampler import Expert, FlowPath, VPPath, add_noise, plan, sample, velocity_to_epsilon, velocity_to_x0
from moe_sampler.kernels import euler_step_, shift_sigmas
from moe_sampler.sampling.paths import Level
from moe_sampler.sampling.solvers import solver_row


@pytest.fixture
def clean_and_noise():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 4, 8, 8, generator=generator)


def test_lune_must_not_add_the_velocity(clean_and_noise):
    """u = noise - data points to noise, so a step towards data subtracts it."""
    clean, noise = clean_and_noise
    velocity = noise - clean
    x = add_noise(clean, noise, 0.2, 0.8)
    stepped = euler_step_(x.clone(), velocity, 0.8, 0.3)
    torch.testing.assert_close(stepped, add_noise(clean, noise, 0.7, 0.3))
    row = solver_row("euler", Level(0.2, 0.8), Level(0.7, 0.3))
    x0 = x - 0.8 * velocity
    torch.testing.assert_close(row.a * x + row.b * x0, stepped)


def test_time_must_not_run_from_data_to_noise():
    with pytest.raises(ValueError, match="noise to data"):
        solver_row("euler", Level(0.7, 0.3), Level(0.2, 0.8))
    with pytest.raises(ValueError, match="start to end"):
        plan(Expert.lune(), start=0.1, end=0.9)
    with pytest.raises(ValueError, match="from noise to data, descending"):
        plan(Expert.lune(), noise_levels=[0.2, 0.8])
    for expert in (Expert.sol(), Expert.lune()):
        timesteps = [step.calls[0].timestep for step in plan(expert, steps=10).steps]
        assert timesteps == sorted(timesteps, reverse=True)


def test_sols_velocity_must_not_be_taken_for_lunes(clean_and_noise):
    """v = alpha eps - sigma x0 and u = eps - x0 are two things; each has its own way to x0."""
    clean, noise = clean_and_noise
    level = VPPath.linear().level(500)
    x = add_noise(clean, noise, level.alpha, level.sigma)
    v = level.alpha * noise - level.sigma * clean
    torch.testing.assert_close(velocity_to_x0(v, x, level.alpha, level.sigma), clean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        velocity_to_epsilon(v, x, level.alpha, level.sigma), noise, atol=1e-5, rtol=1e-5
    )
    assert (x - level.sigma * v - clean).abs().max() > 0.5  # Lune's formula on Sol's output


def test_velocity_to_epsilon_must_not_drop_the_sample(clean_and_noise):
    """On the VP path eps = sigma x + alpha v: alpha v alone is no noise estimate."""
    clean, noise = clean_and_noise
    alpha, sigma = 0.6, 0.8
    x, v = add_noise(clean, noise, alpha, sigma), alpha * noise - sigma * clean
    torch.testing.assert_close(velocity_to_epsilon(v, x, alpha, sigma), sigma * x + alpha * v)
    assert (alpha * v - noise).abs().max() > 0.5


def test_the_shift_must_push_towards_noise():
    """Shift acts on s, where 1 is noise: k > 1 keeps the sampler longer at high noise."""
    s = torch.linspace(0, 1, 11)
    shifted = shift_sigmas(s, 3.0)
    torch.testing.assert_close(shifted, 3 * s / (1 + 2 * s))
    assert (shifted[1:-1] > s[1:-1]).all() and shifted[0] == 0 and shifted[-1] == 1
    torch.testing.assert_close(shift_sigmas(s, 1.0), s)
    torch.testing.assert_close(shift_sigmas(shifted, 1 / 3), s)


def test_a_handoff_after_shift_must_stay_at_its_noise_level():
    """Deciding by step index, or before the shift, moves the boundary with the shift."""
    from moe_sampler import Boundary

    for shift in (1.0, 2.0, 3.0, 7.0):
        experts = (Expert.sol(), Expert.lune(shift=shift))
        compiled = plan(experts, Boundary("sol", "lune", 0.6), steps=20)
        lune = [step for step in compiled.steps if step.calls[0].name == "lune"]
        assert lune[0].level.noise == 0.6 and all(s.level.noise <= 0.6 for s in lune)


def test_lune_must_be_told_1000_s_and_sol_its_integer_timestep():
    for step in plan(Expert.lune(), steps=7).steps:
        assert step.calls[0].timestep == pytest.approx(1000 * step.level.sigma, rel=1e-12)
    seen: list[torch.Tensor] = []

    def model(x, timestep):
        seen.append(timestep)
        return x

    for expert in (Expert.sol(model), Expert.lune(model)):
        sample(plan(expert, steps=3), expert, shape=(1, 4), seeds=[0])
    assert [t.dtype for t in seen] == [torch.int64] * 3 + [torch.float32] * 3
    assert [t.item() for t in seen[:3]] == [999, 666, 332]


def test_sol_must_not_use_stable_diffusions_betas():
    sol, sd15 = Expert.sol().path, Expert.sd15().path
    assert abs(sol.level(500).noise - sd15.level(500).noise) > 0.01
    assert sol.betas[0] == pytest.approx(1e-4) and sol.betas[-1] == pytest.approx(0.02)
    assert sd15.betas[0] == pytest.approx(0.00085) and sd15.betas[-1] == pytest.approx(0.012)


def test_latents_must_not_be_clipped_unless_asked(mixture):
    huge = dataclasses.replace(Expert.lune(), model=lambda x, t: x - 3.0)
    assert sample(plan(huge, steps=4), huge, shape=(1, 4), seeds=[0]).max() > 1
    clipped = dataclasses.replace(huge, clip_sample_range=1.0)
    assert sample(plan(clipped, steps=4), clipped, shape=(1, 4), seeds=[0]).abs().max() <= 1


def test_tinyfluxs_clock_runs_the_other_way(mixture):
    """TinyFlux is told t = 1 - s and predicts data - noise; the same plan holds it."""
    lune = mixture.give_model(Expert.lune())
    path = FlowPath(timestep_scale=1.0, data_at_one=True)
    student = mixture.give_model(
        Expert("tinyflux", path, "reversed_flow_prediction", solver="euler", shift=2.0)
    )
    told = [step.calls[0].timestep for step in plan(student, steps=4).steps]
    assert told == sorted(told) and told[0] == 0.0
    runs = [sample(plan(e, steps=10), e, shape=(2, 50), seeds=[1, 2]) for e in (lune, student)]
    torch.testing.assert_close(*runs, atol=1e-5, rtol=0)
