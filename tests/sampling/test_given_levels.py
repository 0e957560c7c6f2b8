"""diffusers' methods on flows, on levels that a name's ending or `levels` says."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from older_versions import NEEDS_A_FLOWS_EULER_A, NEEDS_SIGMAS_FOR_UNIPC

from bench.scheduler_agreement import SEEDS, SHAPE, by_itself, difference, nonlinear
from moe_sampler import Boundary, Expert, FlowPath, Level, plan, sample
from moe_sampler.sampling.scheduler_names import _FLOW, _SPACINGS
from moe_sampler.sampling.spacings import nodes

SHIFT = 2.0
NAMES = [pytest.param(name, marks=NEEDS_A_FLOWS_EULER_A if name == "euler_a" else ()) for name in _FLOW]


def on(noise, name, steps):
    """The levels of a spacing; a scheduler that cannot begin at pure noise begins a thousandth below it."""
    assert 0.999 < noise[0] <= 1.0
    return noise == pytest.approx(nodes(name, FlowPath(), steps, noise[0], shift=SHIFT), abs=1e-6)


@pytest.mark.parametrize("solver", NAMES)
def test_every_name_with_every_spacing(solver):
    for spacing in _SPACINGS:
        compiled = plan(Expert.lune(solver=f"{solver}_{spacing}"), steps=6)
        assert on([step.level.noise for step in compiled.steps if not step.corrects], spacing, 6)
        assert compiled.steps[-1].target == Level(1.0, 0.0)
        assert compiled.steps[0].solver == f"{solver}_{spacing}"


@pytest.mark.parametrize("solver", NAMES)
def test_every_name_arrives_at_the_data(gentle_mixture, solver):
    expert = gentle_mixture.give_model(Expert.lune(solver=f"{solver}_karras"))
    made = sample(plan(expert, steps=48), expert, shape=(1, 4000), seeds=[0]).double()
    means, stds, shares = (
        np.array(each) for each in (gentle_mixture.means, gentle_mixture.stds, gentle_mixture.shares)
    )
    assert made.mean().item() == pytest.approx(means @ shares, abs=0.02)
    if solver != "lcm":  # which jumps to the model's mean, and back to noise
        deviation = ((means**2 + stds**2) @ shares - (means @ shares) ** 2) ** 0.5
        assert made.std().item() == pytest.approx(deviation, abs=0.03)


@NEEDS_SIGMAS_FOR_UNIPC
@pytest.mark.parametrize("steps", [5, 12])
@pytest.mark.parametrize("spacing", [*_SPACINGS, "cosine"])
def test_it_is_the_scheduler_with_these_sigmas(spacing, steps):
    ending = spacing in _SPACINGS
    solver, levels = (f"unipc_{spacing}", None) if ending else ("unipc", spacing)
    expert = nonlinear(Expert.lune(solver=solver, levels=levels))
    compiled = plan(expert, steps=steps)
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    sigmas = list(compiled.noise_levels)
    expected = by_itself(scheduler, expert, None, [1000 * sigma for sigma in sigmas], sigmas=np.array(sigmas))
    assert difference(sample(compiled, expert, shape=SHAPE, seeds=SEEDS), expected) < 1e-5


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_it_is_the_built_in_solver_on_the_same_levels(solver):
    made = [
        sample(plan(expert, steps=6), expert, shape=SHAPE, seeds=SEEDS)
        for expert in (
            nonlinear(Expert.lune(solver=f"{solver}_beta")),
            nonlinear(Expert.lune(solver=solver, levels="beta")),
        )
    ]
    torch.testing.assert_close(made[0], made[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["unipc_karras", "deis_beta", "heun_exponential", "dpmpp_2s_karras"])
def test_in_a_part_of_a_run(gentle_mixture, solver):
    """Spaced like that part of a whole run, to the handoff and from it; with one model it is that alone."""
    pair = [gentle_mixture.give_model(Expert.lune(name=name, solver=solver)) for name in ("early", "late")]
    compiled = plan(pair, Boundary("early", "late", 0.5), steps={"early": 20, "late": 24})
    spacing = solver.rpartition("_")[2]
    firsts = [step.level.noise for step in compiled.steps if not step.corrects]
    assert firsts[:20] == pytest.approx(nodes(spacing, FlowPath(), 20, firsts[0], 0.5, shift=SHIFT), abs=1e-6)
    assert firsts[20:] == pytest.approx(nodes(spacing, FlowPath(), 24, 0.5, shift=SHIFT), abs=1e-6)
    assert compiled.steps[-1].target == Level(1.0, 0.0)
    alone = gentle_mixture.give_model(Expert.lune(solver="heun"))
    right = sample(plan(alone, steps=60), alone, shape=(1, 400), seeds=[0])
    assert difference(sample(compiled, pair, shape=(1, 400), seeds=[0]), right) < 0.02


def test_what_it_remembers_survives_a_handoff():
    pair = [Expert.sol(solver="unipc_karras"), Expert.lune(solver="unipc_karras")]
    compiled = plan(pair, Boundary("sol", "lune", 0.7), steps={"sol": 4, "lune": 5})
    first = next(step for step in compiled.steps if step.calls[0].name == "lune")
    assert first.update.memories > 0
    # Where the spacing is one, so are the levels of experts that share them.
    same, other = ("unipc_karras", "unipc_karras"), ("unipc_karras", "unipc_beta")
    for solvers, whole in ((same, True), (other, False)):
        experts = [Expert.lune(name=name, solver=solver) for name, solver in zip("ab", solvers, strict=True)]
        shared = plan(experts, Boundary("a", "b", 0.5), steps=8)
        assert on(list(shared.noise_levels), "karras", 8) == whole


@pytest.mark.parametrize("solver", ["unipc", "dpmpp_3m_sde", "deis"])
def test_listed_levels(solver):
    compiled = plan(Expert.lune(solver=solver, levels=[1.0, 0.5, 0.2]))
    assert list(compiled.noise_levels) == pytest.approx([1.0, 0.5, 0.2], abs=6e-4)


def test_what_cannot_be():
    with pytest.raises(ValueError, match="unipc_karras says where the steps lie, so that no levels"):
        plan(Expert.lune(solver="unipc_karras", levels="beta"), steps=4)
    with pytest.raises(ValueError, match="UniPCMultistepScheduler brings its own noise levels"):
        plan(Expert.lune(solver="UniPCMultistepScheduler", levels="karras"), steps=4)
    with pytest.raises(ValueError, match="no use_karras_sigmas: leave the ending of lcm_karras out"):
        plan(Expert.sol(solver="lcm_karras"), steps=4)


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "SASolver"])
@pytest.mark.parametrize("spacing", _SPACINGS)
def test_a_scheduler_that_forgets_it_samples_a_flow(name, spacing):
    cls = getattr(diffusers, f"{name}Scheduler")
    own = cls(prediction_type="flow_prediction", use_flow_sigmas=True, **{f"use_{spacing}_sigmas": True})
    with pytest.raises(ValueError, match=r'forgets use_flow_sigmas.*solver="unipc", levels="karras"'):
        plan(Expert.lune(solver=own), steps=4)
