"""One plan after another."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from moe_sampler import Boundary, Expert, SamplingPlan, plan, sample

SOL, LUNE = Expert.sol(solver="ddim"), Expert.lune()


def test_a_hybrid_plan_is_two_plans_joined():
    """To the bit: the handoff that the planner folds in is the one of `then`."""
    whole = plan((SOL, LUNE), Boundary("sol", "lune", 0.7), steps={"sol": 5, "lune": 6})
    early = plan(SOL, noise_levels=whole.noise_levels[:5], end=whole.noise_levels[5])
    late = plan(LUNE, noise_levels=whole.noise_levels[5:])
    joined = early.then(late)
    assert joined.experts == ("sol", "lune") and joined.steps[4].target == late.start_level
    for own, other in zip(joined.steps, whole.steps, strict=True):
        assert own.row == pytest.approx(other.row, rel=1e-12) and own.calls == other.calls
    assert SamplingPlan.from_json(joined.to_json()) == joined and joined.made_from is None


@pytest.mark.parametrize("solver", ["dpmpp_3m", "unipc_3", "lms"])
def test_what_a_plan_remembers_ends_with_it(gentle_mixture, solver):
    """Two runs one after the other, the second from where the first one ended, are the joined run."""
    first = gentle_mixture.give_model(Expert.sol(solver=solver))
    then = gentle_mixture.give_model(Expert.lune(solver="dpmpp_2m"))
    early, late = plan(first, steps=8, end=0.6), plan(then, steps=6, start=0.6)
    joined = early.then(late)
    assert joined.memories == early.memories > late.memories == 1
    middle = sample(early, first, shape=(2, 50), seeds=[1, 2])
    level = early.steps[-1].target
    expected = sample(late, then, middle / (level.alpha + level.sigma))
    found = sample(joined, [first, then], shape=(2, 50), seeds=[1, 2])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_plans_are_joined_at_one_level_alone():
    with pytest.raises(
        ValueError, match=r"ends at noise level 0.700000, and the second one begins at 0.600000"
    ):
        plan(SOL, steps=4, end=0.7).then(plan(LUNE, steps=4, start=0.6))


@pytest.mark.parametrize(("solvers", "order"), [(("dpmpp_2m", "dpmpp_2m"), 2), (("heun", "unipc"), 2)])
def test_orders_of_convergence_across_a_join(gentle_mixture, solvers, order):
    """From the flow to the flow, so that no integer timesteps blur them."""
    first, then = (gentle_mixture.give_model(Expert.lune(solver=solver, shift=1.0)) for solver in solvers)
    x = torch.linspace(-1.5, 1.5, 41)[None]

    def run(count, experts=(first, then)):
        late = plan(experts[1], steps=count, start=0.5, end=0.1)  # a scheduler begins at a level of its own
        early = plan(experts[0], steps=count, start=0.9, end=late.start_level.noise)
        return sample(early.then(late), experts[0], x).double()

    fine = gentle_mixture.give_model(Expert.lune(solver="dpmpp_2m", shift=1.0))
    right = run(600, (fine, fine))
    errors = [(run(count) - right).square().mean().sqrt().item() for count in (8, 16, 32)]
    found = [math.log2(coarse / finer) for coarse, finer in itertools.pairwise(errors)]
    assert all(rate > order - 0.4 for rate in found), (errors, found)
