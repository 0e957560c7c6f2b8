from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch

from moe_sampler import Boundary, Crossfade, Expert, SamplingPlan, Spans, plan
from moe_sampler.kernels.rows import COLUMNS, ROW_WIDTH
from moe_sampler.routers import active_experts, lead_spans

SOL, LUNE = Expert.sol(), Expert.lune()


def hybrid(at: float = 0.7, **settings) -> SamplingPlan:
    return plan((SOL, LUNE), Boundary("sol", "lune", at), **{"steps": 12, **settings})


def test_sol_works_early_and_lune_late():
    compiled = hybrid()
    assert compiled.experts == ("sol", "lune")
    for step in compiled.steps:
        assert step.calls[0].name == ("sol" if step.level.noise > 0.7 else "lune")
    assert compiled.steps[0].calls[0].timestep == 999


def test_the_handoff_is_met_to_the_last_bit():
    for at in (0.1, 0.3, 1 / 3, 0.7, 0.85, 0.95):
        first_of_lune = next(s for s in hybrid(at).steps if s.calls[0].name == "lune")
        assert first_of_lune.level.noise == at and first_of_lune.calls[0].timestep == 1000 * at


def test_steps_connect_and_end_at_the_data():
    compiled = hybrid()
    for step, following in itertools.pairwise(compiled.steps):
        assert step.target == following.level
    assert compiled.steps[-1].target.sigma == 0.0 and compiled.steps[-1].target.alpha == 1.0


@pytest.mark.parametrize("count", [2, 3, 12, 50])
def test_total_steps_are_met(count):
    assert len(hybrid(steps=count)) == count


def test_steps_by_expert():
    compiled = hybrid(steps={"sol": 3, "lune": 9})
    assert [step.calls[0].name for step in compiled.steps] == ["sol"] * 3 + ["lune"] * 9


def test_guidance_gates_are_each_experts_own():
    """1.0 / 4.0 must guide the second expert, and 4.0 / 1.0 must not pay for two passes of it."""
    for sol_scale, lune_scale in ((1.0, 4.0), (4.0, 1.0)):
        experts = (
            dataclasses.replace(SOL, guidance_scale=sol_scale),
            dataclasses.replace(LUNE, guidance_scale=lune_scale),
        )
        compiled = plan(experts, Boundary("sol", "lune", 0.7), steps={"sol": 4, "lune": 6})
        assert all(c.guided == (c.guidance_scale != 1) for s in compiled.steps for c in s.calls)
        assert compiled.model_calls == (4 + 12 if sol_scale == 1 else 8 + 6)


def test_a_discrete_expert_only_sees_its_integer_grid_and_the_other_follows():
    compiled = plan((SOL, LUNE), Crossfade("sol", "lune", 0.85, 0.45), steps=20)
    mixed = [step for step in compiled.steps if len(step.calls) == 2]
    assert mixed
    for step in mixed:
        sol, lune = step.calls
        assert isinstance(sol.timestep, int)
        assert lune.timestep == pytest.approx(1000 * SOL.path.level(sol.timestep).noise, rel=1e-12)
        assert sol.weight + lune.weight == pytest.approx(1.0)
        # One of the two takes the state as it is, the other a multiple of it.
        assert 1.0 in (sol.input_scale, lune.input_scale) and sol.input_scale != lune.input_scale
    weights = [step.calls[1].weight for step in mixed]
    assert weights == sorted(weights)


def test_json_round_trip_is_exact():
    clipped = dataclasses.replace(SOL, clip_sample_range=1.0)
    for compiled in (hybrid(), plan(clipped, steps=5), plan((SOL, LUNE), Crossfade("sol", "lune", 0.8, 0.5))):
        text = compiled.to_json()
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert SamplingPlan.from_json(text) == compiled
    with pytest.raises(ValueError, match="format"):
        SamplingPlan.from_json("{}")


def test_a_plan_is_immutable_and_printable():
    compiled = hybrid()
    with pytest.raises(dataclasses.FrozenInstanceError):
        compiled.initial_scale = 2.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        compiled.steps[0].solver = "euler"
    lines = str(compiled).splitlines()
    assert len(lines) == 2 + len(compiled)
    assert "sol" in lines[2] and "999" in lines[2] and "lune" in lines[-1]


def test_the_table_is_what_the_kernel_reads():
    table = hybrid().table()
    assert table.shape == (12, ROW_WIDTH) and table.dtype == torch.float32 and table.is_contiguous()
    assert (table[:, len(COLUMNS) :] == 0).all()
    assert not table.isnan().any()


def test_a_run_may_begin_and_end_anywhere():
    compiled = plan(LUNE, steps=5, start=0.6, end=0.2)
    assert compiled.steps[0].level.noise == 0.6 and compiled.initial_scale == 0.6
    assert compiled.steps[-1].target.noise == pytest.approx(0.2)
    entering_late = hybrid(start=0.5)
    assert entering_late.experts == ("lune",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(steps=0), "at least 1"),
        (dict(steps=2.5), "whole numbers"),
        (dict(steps=True), "whole numbers"),
        (dict(steps=1), "2 spans"),
        (dict(steps={"sol": 3}), "'lune' leads"),
        (dict(steps={"sol": 3, "lune": 3, "luna": 1}), "'luna'"),
        (dict(steps={"sol": 900, "lune": 3}), "do not fit"),
        (dict(start=1.5), "0 <= end < start <= 1"),
        (dict(noise_levels=[]), "noise levels"),
    ],
)
def test_errors_say_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        hybrid(**arguments)


def test_errors_of_experts_and_routers():
    with pytest.raises(ValueError, match="need a router"):
        plan((SOL, LUNE))
    with pytest.raises(ValueError, match="name of its own"):
        plan((SOL, SOL), Boundary("sol", "lune", 0.5))
    with pytest.raises(ValueError, match="the router names 'luna'"):
        plan((SOL, LUNE), Boundary("sol", "luna", 0.5))
    for at in (0.0, 1.0, -0.2, 1.3, math.nan):
        with pytest.raises(ValueError, match="strictly between 0"):
            Boundary("sol", "lune", at)
    with pytest.raises(ValueError, match="below"):
        Crossfade("sol", "lune", 0.4, 0.6)
    with pytest.raises(ValueError, match="add up to 1"):
        plan((SOL, LUNE), lambda s: {"sol": 0.7, "lune": 0.7})
    with pytest.raises(ValueError, match="at most two"):
        plan((SOL, LUNE, Expert.sd15()), lambda s: {"sol": 0.4, "lune": 0.3, "sd15": 0.3})
    with pytest.raises(ValueError, match="end at noise level 0"):
        Spans((("sol", 0.5),))
    with pytest.raises(ValueError, match="each ending below"):
        Spans((("sol", 0.5), ("lune", 0.6), ("sol", 0.0)))
    with pytest.raises(ValueError, match="unknown solver"):
        Expert.sol(solver="magic")
    with pytest.raises(ValueError, match="unknown prediction"):
        Expert("x", LUNE.path, "velocity")
    with pytest.raises(ValueError, match="unknown timestep spacing"):
        plan(Expert.sol(spacing="middle"))
    with pytest.raises(ValueError, match="unknown timestep spacing"):
        plan((Expert.sol(spacing="middle"), LUNE), Boundary("sol", "lune", 0.5))
    with pytest.raises(ValueError, match="pure noise"):
        plan(Expert("x", LUNE.path, "epsilon"))


def test_a_router_is_any_callable():
    def mine(noise: float) -> dict[str, float]:
        return {"sol": 1.0} if noise > 0.62 else {"lune": 1.0}

    assert plan((SOL, LUNE), mine, steps=9) == plan((SOL, LUNE), Boundary("sol", "lune", 0.62), steps=9)


def test_spans_are_found_to_the_last_bit():
    router = Spans((("sol", 0.705), ("lune", 0.7), ("sol", 0.123456789), ("lune", 0.0)))
    assert lead_spans(router, ["sol", "lune"]) == [
        ("sol", 1.0, 0.705),
        ("lune", 0.705, 0.7),
        ("sol", 0.7, 0.123456789),
        ("lune", 0.123456789, 0.0),
    ]


def test_crossfade_weights_are_smooth_and_add_up():
    router = Crossfade("sol", "lune", 0.8, 0.5)
    weights = [
        active_experts(router, s, ["sol", "lune"]).get("lune", 0.0)
        for s in torch.linspace(1, 0, 200).tolist()
    ]
    assert weights[0] == 0.0 and weights[-1] == 1.0
    assert all(0 <= later - earlier < 0.05 for earlier, later in itertools.pairwise(weights))
