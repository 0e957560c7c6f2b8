from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch

from moe_sampler import (
    Boundary,
    Crossfade,
    Expert,
    FlowPath,
    Level,
    SamplingPlan,
    VPPath,
    plan,
)
from moe_sampler.kernels.rows import COLUMNS, ROW_WIDTH

SOL, LUNE = Expert.sol(), Expert.lune()


def hybrid(at: float = 0.7, **settings) -> SamplingPlan:
    return plan((SOL, LUNE), Boundary("sol", "lune", at), **{"steps": 12, **settings})


def test_a_run_may_begin_below_a_grid_but_not_hand_over_there():
    """An image with hardly any noise is shown to the expert as its cleanest timestep."""
    experts, cleanest = (Expert.sol(), Expert.lune()), Expert.sol().path.level(0).noise
    for start in (cleanest, 0.5 * cleanest):
        router = Boundary("sol", "lune", 0.3 * cleanest)
        compiled = plan(experts, router, steps={"sol": 1, "lune": 2}, start=start)
        assert [step.calls[0].name for step in compiled.steps] == ["sol", "lune", "lune"]
        assert compiled.steps[0].calls[0].timestep == 0 and compiled.start_level.noise == cleanest
    with pytest.raises(ValueError, match=r"cleanest timestep is noise level .* not below"):
        plan(experts, Boundary("lune", "sol", 0.5 * cleanest), steps={"sol": 1, "lune": 2})


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
        (dict(steps=0), "whole number from 1 to 10000, got 0"),
        (dict(steps=2.5), "steps must be a whole number"),
        (dict(steps=True), "steps must be a whole number"),
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


def test_errors_of_experts():
    with pytest.raises(ValueError, match="need a router"):
        plan((SOL, LUNE))
    with pytest.raises(ValueError, match="name of its own"):
        plan((SOL, SOL), Boundary("sol", "lune", 0.5))
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


@pytest.mark.parametrize("count", [1, 2, 7, 20])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_spacings_at_the_ends_of_a_hybrid_run(spacing, count):
    """Each spacing keeps what it stands for at an end of the timestep axis that the span has."""
    path = VPPath.scaled_linear(steps_offset=1)
    sd15 = Expert("sd15", path, "epsilon", spacing=spacing)

    def timesteps(first: str, then: str) -> list[int]:
        compiled = plan(
            (sd15, LUNE), Boundary(first, then, path.level(500).noise), steps={"sd15": count, "lune": 3}
        )
        return [s.calls[0].timestep for s in compiled.steps if s.calls[0].name == "sd15"]

    early = timesteps("sd15", "lune")  # from noise to the handoff at 500
    stride = 499 / (count + 1) if spacing == "leading" else 499 / count
    top = 999 - stride if spacing == "leading" else 999
    assert early == pytest.approx([top - stride * i for i in range(count)], abs=0.51)
    late = timesteps("lune", "sd15")  # from the handoff to the data
    bottom = {"trailing": 501 / count - 1, "leading": 1, "linspace": 0}[spacing]
    expected = np.linspace(500, bottom, count) if count > 1 else [500]
    assert late == pytest.approx(expected, abs=1.0) and late[0] == 500
    if spacing != "trailing" and count > 1:
        assert late[-1] == bottom


def test_noise_levels_are_the_solvers_nodes_and_say_the_same_run_again():
    heun = dataclasses.replace(LUNE, solver="heun")
    for experts in ((SOL, LUNE), (SOL, heun)):
        router = Crossfade("sol", "lune", 0.8, 0.5)
        whole = plan(experts, router, steps=12)
        assert len(whole.noise_levels) == 12
        assert plan(experts, router, noise_levels=whole.noise_levels) == whole
        tail = plan(experts, router, noise_levels=whole.noise_levels[5:])
        assert tail.noise_levels == whole.noise_levels[5:] and tail.start_level == tail.steps[0].level


def test_a_late_start_enters_at_the_expert_and_node_of_its_noise_level():
    for start in (0.95, 0.71, 0.7001, 0.7, 0.69, 0.2):
        compiled = hybrid(
            start=start, steps={"sol": 3, "lune": 3} if start > 0.71 else 3 if start <= 0.7 else 6
        )
        first = compiled.steps[0]
        expected = "sol" if start > 0.7 else "lune"
        assert first.calls[0].name == expected and compiled.start_level == first.level
        if expected == "sol":
            timestep = first.calls[0].timestep
            assert first.level == SOL.path.level(timestep) and first.level.noise > 0.7
            assert abs(first.level.noise - start) < 0.001
        else:
            assert first.level == LUNE.path.at(start)
        levels = [step.level.noise for step in compiled.steps]
        assert levels == sorted(levels, reverse=True)


def test_guidance_outside_its_window_is_off_and_free():
    windowed = dataclasses.replace(LUNE, guidance_scale=4.0, guidance_window=(0.8, 0.25))
    compiled = plan(windowed, steps=10)
    for step in compiled.steps:
        inside = 0.25 <= step.level.noise <= 0.8
        assert step.calls[0].guidance_scale == (4.0 if inside else 1.0)
        assert step.calls[0].guided == inside
        assert (step.coefficients["q_uncond_0"] != 0.0) == inside
    on = sum(0.25 <= step.level.noise <= 0.8 for step in compiled.steps)
    assert 0 < on < 10 and compiled.model_calls == 10 + on
    always = plan(dataclasses.replace(LUNE, guidance_scale=4.0), steps=10)
    assert plan(dataclasses.replace(windowed, guidance_window=(1.0, 0.0)), steps=10) == always
    assert not plan(dataclasses.replace(windowed, guidance_window=(0.79, 0.78)), steps=3).guided


def test_a_rescaled_prediction_comes_to_the_row_with_its_guidance_in_it():
    rescaled = dataclasses.replace(LUNE, guidance_scale=4.0, guidance_rescale=0.7, guidance_window=(1.0, 0.5))
    compiled, plain = plan(rescaled, steps=6), plan(LUNE, steps=6)
    for step, unguided in zip(compiled.steps, plain.steps, strict=True):
        assert step.row == unguided.row
        assert step.calls[0].guidance_rescale == (0.7 if step.level.noise >= 0.5 else 0.0)
    assert SamplingPlan.from_json(compiled.to_json()) == compiled and "4 rescaled 0.7" in str(compiled)


def test_plans_written_before_there_was_a_rescale_are_read():
    body = json.loads(hybrid().to_json())
    body["format"] = 1
    for step in body["steps"]:
        for call in step["calls"]:
            del call["guidance_rescale"]
    assert SamplingPlan.from_json(json.dumps(body)) == hybrid()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(guidance_scale=math.inf), "guidance_scale must be a finite number"),
        (dict(guidance_scale=math.nan), "guidance_scale must be a finite number"),
        (dict(guidance_window=(0.2, 0.8)), "guidance_window is"),
        (dict(guidance_window=(1.1, 0.8)), "guidance_window is"),
        (dict(guidance_window=(math.nan, 0.1)), "a level of guidance_window must be a finite number"),
        (dict(guidance_window=(0.8,)), "guidance_window is"),
        (dict(guidance_rescale=1.2), "guidance_rescale must lie"),
        (dict(shift=math.inf), "shift must be a finite number"),
        (dict(shift=0.0), "shift must lie"),
        (dict(eta=1.5), "eta must lie"),
        (dict(clip_sample_range=0.0), "clip_sample_range must be positive"),
    ],
)
def test_settings_of_an_expert_out_of_range(settings, message):
    with pytest.raises(ValueError, match=f"sol: {message}"):
        Expert.sol(**settings)


@pytest.mark.parametrize(
    "levels", [[], [1.2, 0.5], [0.5, 0.5], [0.3, 0.5], [0.5, 0.0], [math.nan, 0.5], [0.5, math.nan]]
)
def test_noise_levels_that_cannot_be(levels):
    with pytest.raises(
        ValueError, match=r"noise levels must be given|a noise level must be a finite number, got nan"
    ):
        plan(LUNE, noise_levels=levels)


def test_a_row_that_is_not_finite_is_refused_while_planning():
    flow_epsilon = Expert("x", LUNE.path, "epsilon")
    assert plan(flow_epsilon, noise_levels=[1 - 1e-12, 0.5])
    with pytest.raises(ValueError, match="pure noise"):
        plan(flow_epsilon, steps=3)

    class Faint(FlowPath):
        def at(self, noise):
            return Level(1e-60 * (1.0 - noise), 1e-60 * noise)

    with pytest.raises(ValueError, match=r"step 0 \(x, euler.*p = 1e\+60"):
        plan(Expert("x", Faint(), "flow_prediction", solver="euler"), steps=3)

    class Timeless(FlowPath):
        def timestep(self, level):
            return math.nan

    with pytest.raises(ValueError, match="x's timestep = nan"):
        plan(Expert("x", Timeless(), "flow_prediction"), steps=3)
    faint = Expert("x", VPPath((0.9999999,) * 14), "epsilon", solver="ddim")
    with pytest.raises(ValueError, match=r"step 0 \(x, ddim.*no finite float32 numbers: p = "):
        plan(faint, steps=1)
