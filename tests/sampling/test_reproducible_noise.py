"""The noise of every stochastic method is its seed's: again, alone and in any batch."""

from __future__ import annotations

import pytest
from reproducible import assert_reproducible

from bench.scheduler_agreement import CLASSES, nonlinear
from moe_sampler import Expert, plan
from moe_sampler.sampling.scheduler_names import _FLOW, _VP, KNOWN_NAMES, REFUSED
from moe_sampler.sampling.solvers import SOLVERS

STOCHASTIC = {
    *("ddpm", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde", "euler_a", "dpm2_a", "sa_solver", "lcm", "tcd"),
    *("DDPMScheduler", "DDPMParallelScheduler"),
}
"""Every solver that draws noise, by what it says of itself: a new one that draws some is a failure below."""
_NAMED = {cls for cls, _ in (*_VP.values(), *_FLOW.values())}
EVERY = [*SOLVERS, *KNOWN_NAMES, *(name for name in CLASSES if name not in {*REFUSED, *_NAMED})]
ELSEWHERE = ("does not sample", "samples v_prediction", "needs torchsde", "has no LTX")


@pytest.mark.parametrize("solver", EVERY)
def test_noise_is_the_seeds(solver):
    draws = refused = False
    for kind in (Expert.sd15, Expert.lune):
        expert = nonlinear(kind(solver=solver))
        try:
            compiled = plan(expert, steps=4)
        except ValueError as error:
            assert any(part in str(error) for part in ELSEWHERE), error
            refused |= "torchsde" in str(error) or "has no LTX" in str(error)
            continue
        if compiled.needs_noise:
            draws = True
            assert_reproducible(compiled, expert)
    assert draws == (solver in STOCHASTIC) or refused


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddims_share_of_noise_is_too(eta):
    expert = nonlinear(Expert.sol(solver="ddim", eta=eta))
    assert_reproducible(plan(expert, steps=4), expert)
