"""NaN and infinities in the loop: found when the run is over, named by step and by who made them."""

from __future__ import annotations

import pytest
import torch

from moe_sampler import Boundary, Crossfade, Expert, SamplingRun, plan, sample
from moe_sampler.errors import NonFiniteError

SHAPE = (2, 4, 8, 8)
BAD = [torch.nan, torch.inf, -torch.inf]


def experts(bad: str = "", at: int = 0, value: float = torch.nan, **settings) -> tuple[Expert, Expert]:
    """Models that predict zeros, but for one element of one sample in the bad one's call number `at`."""
    calls = {"sol": 0, "lune": 0}

    def model_of(name):
        def model(x, timestep):
            made = torch.zeros_like(x)
            if name == bad and calls[name] == at:
                made[-1, -1, -1, -1] = value
            calls[name] += 1
            return made

        return model

    return Expert.sol(model_of("sol"), **settings), Expert.lune(model_of("lune"), **settings)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    ("bad", "at", "step"), [("sol", 0, 0), ("sol", 2, 2), ("lune", 0, 4), ("lune", 3, 7)]
)
def test_names_the_expert_and_the_step(bad, at, step, value):
    pair = experts(bad, at, value)
    compiled = plan(pair, Boundary("sol", "lune", 0.7), steps={"sol": 4, "lune": 4})
    with pytest.raises(
        NonFiniteError, match=rf"^{bad} gave NaN or an infinity at step {step} \(of 0 to 7"
    ) as found:
        sample(compiled, pair, shape=SHAPE, seeds=[1, 2])
    assert found.value.experts == (bad,)


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde"])
@pytest.mark.parametrize("value", BAD)
def test_every_solver_lets_them_through(solver, value):
    sol, _ = experts("sol", 1, value, solver=solver)
    with pytest.raises(NonFiniteError, match=r"sol gave .* at step 1 "):
        sample(plan(sol, steps=5), sol, shape=SHAPE, seeds=[1, 2])


def test_two_experts_at_once_are_both_named():
    pair = experts("lune", 0)
    compiled = plan(pair, Crossfade("sol", "lune", 0.99, 0.3), steps=8)
    with pytest.raises(NonFiniteError, match="sol or lune gave NaN") as found:
        sample(compiled, pair, shape=SHAPE, seeds=[1, 2])
    assert found.value.experts == ("sol", "lune")


def test_a_callback_is_named_as_such():
    _, lune = experts()

    def spoil(info):
        return info["x"] * torch.inf if info["step"] == 2 else None

    with pytest.raises(NonFiniteError, match=r"^the callback's latents at step 2 ") as found:
        sample(plan(lune, steps=5), lune, shape=SHAPE, seeds=[1, 2], callback=spoil)
    assert found.value.experts == ()


def test_a_state_that_is_none_from_the_start():
    _, lune = experts()
    with pytest.raises(NonFiniteError, match="the state that the run starts from"):
        sample(plan(lune, steps=3), lune, torch.full(SHAPE, torch.nan))


def test_a_run_tells_when_it_is_asked():
    """`advance` waits for nothing, so it doesn't know; the first bad step is named, however late one asks."""
    _, lune = experts("lune", 1)
    run = SamplingRun(plan(lune, steps=4), lune, shape=SHAPE, seeds=[1, 2])
    run.check()
    run.advance(1)
    run.check()
    run.advance()
    with pytest.raises(NonFiniteError, match="at step 1 "):
        run.check()


def test_finite_runs_pass():
    pair = experts()
    compiled = plan(pair, Boundary("sol", "lune", 0.7), steps=6)
    assert sample(compiled, pair, shape=SHAPE, seeds=[1, 2]).isfinite().all()
