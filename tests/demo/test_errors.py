"""Held-out errors of models of which they are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bench.demo.errors import VP, HeldOutLatents, x0_errors
from bench.demo.held_out import HeldOut
from moe_sampler.demo.data import HELD_OUT_FIRST, SceneSet


@pytest.fixture(scope="module")
def held(demo_pipeline, tmp_path_factory):
    scenes = SceneSet(tmp_path_factory.mktemp("scenes"), 7, HELD_OUT_FIRST)
    scenes.render(workers=1)
    return HeldOutLatents(demo_pipeline, HeldOut(scenes, 2), count=7)


def says(velocity):
    return lambda x, timestep, states: SimpleNamespace(sample=velocity(x, float(timestep), len(states)))


def test_a_model_that_says_nothing_is_wrong_by_the_latents_power(held):
    def v(x, timestep, count):
        level = VP.level(round(timestep))
        assert len(x) == count
        return x * (level.alpha / level.sigma)  # x0 = alpha x - sigma v

    sol, lune = says(v), says(lambda x, timestep, count: x * (1000 / timestep))  # x0 = x - s u
    power = held.full.square().mean().item(), held.structure.square().mean().item()
    assert held.sol_error(sol, 0.5) == pytest.approx(power[0], rel=1e-4)
    assert held.sol_error(sol, 0.5, structure=True) == pytest.approx(power[1], rel=1e-4)
    assert held.lune_error(lune, 0.5) == pytest.approx(power[0], rel=1e-4)


def test_both_experts_err_more_where_there_is_more_noise(held, demo_pipeline):
    low, high = x0_errors(demo_pipeline, held, [0.1, 0.9])
    assert low["s"] == pytest.approx(0.1, abs=2e-3) and high["s"] == pytest.approx(0.9, abs=2e-3)
    for name in ("sol", "lune", "sol_structure"):
        assert 0 < 5 * low[name] < high[name] < held.full.square().mean()
