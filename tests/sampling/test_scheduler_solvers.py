"""Any scheduler of diffusers as a solver: the plan does what the scheduler does by itself."""

from __future__ import annotations

import math

import diffusers.schedulers
import numpy as np
import pytest
import torch
from older_versions import NEEDS_A_FLOWS_EULER_A

from bench.scheduler_agreement import (
    BOTH,
    CLASSES,
    SEEDS,
    SHAPE,
    agreement,
    by_itself,
    difference,
    expert_for,
    nonlinear,
)
from moe_sampler import Boundary, Expert, Level, PerStep, SamplingPlan, plan, sample
from moe_sampler.sampling.probing import Brownian, NotAffineError
from moe_sampler.sampling.scheduler_names import KNOWN_NAMES, REFUSED

MEMORIES = {
    **dict.fromkeys(("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler"), 0),
    **dict.fromkeys(("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"), 0),
    **dict.fromkeys(("TCDScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"), 0),
    **dict.fromkeys(("LTXEulerAncestralRFScheduler", "CogVideoXDDIMScheduler"), 0),
    **dict.fromkeys(
        ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler"), 1
    ),
    **dict.fromkeys(("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "DPMSolverSDEScheduler"), 1),
    **dict.fromkeys(("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"), 1),
    **dict.fromkeys(("UniPCMultistepScheduler", "SASolverScheduler"), 2),
    **dict.fromkeys(("LMSDiscreteScheduler", "PNDMScheduler", "IPNDMScheduler"), 3),
}
"""How many things each must remember beside the state, found by hand from its formulas."""


@pytest.mark.parametrize("name", CLASSES)
def test_every_scheduler_compiles_or_says_why_not(name):
    """A class of diffusers that is neither in MEMORIES nor refused by name is a failure: it is new."""
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"{name} cannot be a solver: {REFUSED[name]}"):
            Expert.sol(solver=name)
        return
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde", reason="diffusers' DPMSolverSDEScheduler needs torchsde")
    # IPNDM in float32 takes alphas from sigmas near 1, which leaves them four digits, and a state in float32
    # is divided by the first of them. KDPM2 takes a second to be made.
    dtype, most = (torch.float64, 2e-5) if name == "IPNDMScheduler" else (torch.float32, 1e-5)
    for steps in (8,) if name.startswith("KDPM2") else (8, 20):
        compiled, off = agreement(expert_for(name), steps, dtype)
        assert off < most and compiled.memories == MEMORIES[name]
    assert SamplingPlan.from_json(compiled.to_json()) == compiled


@pytest.mark.parametrize("name", BOTH)
def test_schedulers_that_sample_flows_too(name):
    for steps in (8, 20):
        # DEIS in float32 starts from 1 - sigma, of which it has four digits.
        dtype = torch.float64 if name.startswith("DEIS") else torch.float32
        _, off = agreement(expert_for(name, flow=True), steps, dtype)
        assert off < 1e-5


def test_names_people_know():
    """Each makes a plan, for flows and for DDPM paths or for one of them, and says which if not."""
    for kind in (Expert.sd15, Expert.lune):
        for name in KNOWN_NAMES:
            try:
                compiled = plan(kind(solver=name), steps=6)
            except ValueError as refused:
                if "which came with" in str(refused) and name == "euler_a":
                    continue  # an older diffusers: test_a_name_whose_scheduler_came_later
                assert name in ("ipndm", "tcd", "pndm", "lms", "dpm2", "dpm2_a", "dpmpp_sde"), refused
                assert "sample" in str(refused) or "torchsde" in str(refused)
                continue
            assert compiled.steps[0].solver == name and compiled.steps[-1].target == Level(1.0, 0.0)
    karras = plan(Expert.sol(solver="dpmpp_2m_karras"), steps=12).noise_levels
    sigmas = np.array([noise / (1 - noise) for noise in karras]) ** (1 / 7)
    assert np.ptp(np.diff(sigmas)) < 2e-4 * sigmas[0], (
        "equally spaced in sigma^(1/7): arXiv:2206.00364, eq. 5"
    )
    with pytest.raises(ValueError, match=r'unknown solver "dpm\+\+": use one of ddpm, .*unipc'):
        Expert.sol(solver="dpm++")
    with pytest.raises(ValueError, match=r"sol: diffusers \S+ has no MyScheduler: use one of ddpm, .*unipc"):
        plan(Expert.sol(solver="MyScheduler"), steps=4)
    with pytest.raises(ValueError, match="tcd does not sample flows: use one of ddpm"):
        plan(Expert.lune(solver="tcd"), steps=4)


def test_a_name_whose_scheduler_came_later(monkeypatch):
    """The oldest diffusers has no LTXEulerAncestralRFScheduler, nor another that takes its steps."""
    name = "LTXEulerAncestralRFScheduler"
    monkeypatch.delattr(diffusers.schedulers, name, raising=False)
    monkeypatch.delitem(diffusers.schedulers._class_to_module, name, raising=False)  # loaded when asked for
    with pytest.raises(ValueError, match="which came with") as refused:
        plan(Expert.lune(solver="euler_a"), steps=4)
    said, _, others = str(refused.value).partition(", or use one of ")
    version = diffusers.__version__
    assert said == (
        f"lune: diffusers {version} has no {name} (euler_a), which came with 0.37: "
        "install that or a newer one"
    )
    assert "unipc" in others and "euler_a" not in others
    assert plan(Expert.sol(solver="euler_a"), steps=4).steps[0].solver == "euler_a"


def test_a_scheduler_itself_with_its_own_settings():
    """Its levels come with it: shifted, dynamically shifted, given."""
    ancestral = diffusers.schedulers.EulerAncestralDiscreteScheduler(
        beta_schedule="linear", prediction_type="v_prediction", timestep_spacing="leading", steps_offset=1
    )
    assert agreement(nonlinear(Expert.sol(solver=ancestral)), 9)[1] < 1e-5
    flow, lune = (
        diffusers.schedulers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        Expert.lune(),
    )
    lune = nonlinear(lune)
    for steps, options in ((7, dict(mu=0.8)), (None, dict(mu=0.8, sigmas=[0.9, 0.5, 0.2]))):
        compiled = SamplingPlan.from_scheduler(flow, steps, lune, **options)
        found = sample(compiled, lune, shape=SHAPE, seeds=SEEDS)
        assert difference(found, by_itself(flow, lune, steps, **options)) < 1e-5
    with pytest.raises(ValueError, match="set_timesteps takes no mood"):
        SamplingPlan.from_scheduler(flow, 7, lune, mood=1)


def test_what_no_plan_can_hold_is_refused_by_name():
    schedulers = diffusers.schedulers
    for made in (
        schedulers.DDPMScheduler(clip_sample=True),
        schedulers.DPMSolverMultistepScheduler(thresholding=True),
    ):
        with pytest.raises(
            ValueError, match=f"{type(made).__name__}'s (clip_sample|thresholding) = True is not affine"
        ):
            Expert.sol(solver=made)
    with pytest.raises(TypeError, match="a solver is a name or one of diffusers' schedulers, got 3"):
        Expert.sol(solver=3)
    other = schedulers.UniPCMultistepScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")
    with pytest.raises(
        ValueError, match=r"sol: UniPCMultistepScheduler would tell the model timestep .* another path"
    ):
        plan(Expert.sol(solver=other), steps=8)

    class Odd(schedulers.DDIMScheduler):
        def step(self, model_output, timestep, sample, **kwargs):
            return super().step(model_output * model_output.abs().mean(), timestep, sample, **kwargs)

    with pytest.raises(NotAffineError, match="Odd is not affine in the state"):
        plan(Expert.sol(solver=Odd(clip_sample=False)), steps=4)

    class Adaptive(schedulers.DDIMScheduler):
        def step(self, model_output, timestep, sample, **kwargs):
            scale = 2.0 if model_output.norm() > 1 else 1.0
            return super().step(model_output * scale, timestep, sample, **kwargs)

    with pytest.raises(NotAffineError, match="Adaptive reads values of what it samples"):
        plan(Expert.sol(solver=Adaptive(clip_sample=False)), steps=4)
    for router, options in ((PerStep(["sol"] * 3), {}), (None, dict(noise_levels=[0.9, 0.5]))):
        with pytest.raises(ValueError, match="sol: unipc brings its own noise levels"):
            plan(Expert.sol(solver="unipc"), router, **options)


PAIRS = [
    pytest.param(("unipc", "euler_a"), marks=NEEDS_A_FLOWS_EULER_A),
    ("heun_karras", "lcm"),
    ("ddpm", "unipc_3"),
    ("dpmpp_3m_sde", "dpmpp_2m"),
    ("lms", "deis"),
]


@pytest.mark.parametrize("solvers", PAIRS, ids="-".join)
def test_a_scheduler_in_a_part_of_a_run(gentle_mixture, solvers):
    """It starts afresh, on levels of its own, and ends where the next one begins."""
    experts = [
        gentle_mixture.give_model(kind(solver=solver))
        for kind, solver in zip((Expert.sol, Expert.lune), solvers, strict=True)
    ]
    compiled = plan(experts, Boundary("sol", "lune", 0.7), steps={"sol": 6, "lune": 7})
    assert [compiled.experts, len(compiled.noise_levels)] == [("sol", "lune"), 13]
    for step, following in zip(compiled.steps, compiled.steps[1:], strict=False):
        assert step.target == following.level
    assert compiled.steps[-1].target == Level(1.0, 0.0)
    samples = sample(compiled, experts, shape=(4, 4000), seeds=range(4)).double()
    data = np.array(gentle_mixture.means) @ np.array(gentle_mixture.shares)
    assert samples.mean().item() == pytest.approx(data, abs=0.05)
    alone = sample(compiled, experts, shape=(1, 4000), seeds=[2])
    assert torch.equal(alone[0].double(), samples[2]), "a sample is its seed's, alone and in a batch"
    assert SamplingPlan.from_json(compiled.to_json()) == compiled


def test_brownian_noise_over_overlapping_times_is_correlated():
    """Half of the longer time is the shorter one, so that its increment is the root of a half of it."""

    class World:
        shape = (100_000,)
        generator = torch.Generator().manual_seed(3)

        def noise(self):
            return torch.randn(self.shape, generator=self.generator, dtype=torch.float64)

    draw = Brownian(World())
    short, long, rest, none = draw(2.0, 1.5), draw(2.0, 1.0), draw(1.5, 1.0), draw(1.0, 0.5)
    found = np.corrcoef(np.stack([short, long, rest, none]))
    half = math.sqrt(0.5)
    expected = [[1, half, 0, 0], [half, 1, half, 0], [0, half, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(found, expected, atol=0.015)
    torch.testing.assert_close(long, half * (short + rest))
