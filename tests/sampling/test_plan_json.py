"""Plans as JSON: what is none, or cannot be run, says so."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from moe_sampler import (
    Boundary,
    Crossfade,
    Expert,
    FlowPath,
    PerStep,
    SamplingPlan,
    Spans,
    VPPath,
    plan,
    sample,
)
from moe_sampler.sampling.betas import BETA_SCHEDULES, without_terminal_signal
from moe_sampler.sampling.calls import with_guidance
from moe_sampler.sampling.recipe import compile_again

EXPERTS = Expert.sol(solver="dpmpp_2m"), Expert.lune()
WHOLE = plan(EXPERTS, Boundary("sol", "lune", 0.7), steps=5)


def changed(change) -> str:
    """As someone may write a plan by hand: without a digest."""
    body = json.loads(WHOLE.to_json()) | {"format": 3}
    body.pop("digest")
    change(body)
    return json.dumps(body)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON"),
        ("[1, 2]", "format is None"),
        ("3", "format is None"),
        (changed(lambda b: b.update(format=10)), "format is 10"),
        (changed(lambda b: b.pop("steps")), "steps is missing"),
        (changed(lambda b: b.pop("initial_scale")), "initial_scale is missing"),
        (changed(lambda b: b.update(steps=[])), "no steps"),
        (changed(lambda b: b.update(steps=4)), "damaged"),
        (changed(lambda b: b["steps"][2]["row"].pop("q_cond_0")), "whose row has .*q_cond_0"),
        (changed(lambda b: b["steps"][2]["row"].update(p="one")), "damaged"),
        (changed(lambda b: b["steps"][2]["row"].update(p=None)), "finite"),
        (changed(lambda b: b["steps"][2].update(calls=[])), "calls 0 experts"),
        (changed(lambda b: b["steps"][2]["calls"][0].update(speed=2)), "damaged"),
        (changed(lambda b: b["steps"].pop(0)), "its beginning was cut off"),
        (changed(lambda b: b["steps"][0]["level"].update(alpha=0, sigma=0)), r"steps\[0\] has a level"),
        (changed(lambda b: b["steps"][0]["level"].update(sigma=10**400)), r"level.sigma must be a float"),
        (changed(lambda b: b["steps"][1]["calls"][0].update(weight=float("nan"))), "weight must be a float"),
        (changed(lambda b: b["steps"][1]["calls"][0].update(name=["sol"])), "name must be a str"),
        (changed(lambda b: b.update(steps=[None] * 100_001)), "steps are more than"),
        (WHOLE.to_json().replace('"sol"', '"lune"', 1), "changed since it was compiled"),
        ("[" * 100_000, "nested more than|no JSON"),
        ('{"a":' * 90 + "1" + "}" * 90, "nested more than"),
    ],
)
def test_what_is_no_plan(text, message):
    with pytest.raises(ValueError, match=message):
        SamplingPlan.from_json(text)


def test_a_plan_may_be_written_in_another_order_and_layout():
    """As editors and databases do; a digest of the text itself would call that a change."""
    body = json.loads(WHOLE.to_json())
    backwards = {key: body[key] for key in reversed(body)}
    backwards["steps"] = [{key: step[key] for key in reversed(step)} for step in body["steps"]]
    for text in (json.dumps(backwards), json.dumps(body, sort_keys=True, indent=4), WHOLE.to_json(indent=1)):
        assert SamplingPlan.from_json(text) == WHOLE
    for key in ("initial_scale", "from_image"):
        with pytest.raises(ValueError, match="changed since it was compiled"):
            SamplingPlan.from_json(json.dumps(body | {key: 0.5 if key == "initial_scale" else True}))


def test_where_a_run_begins_is_part_of_its_plan():
    assert not WHOLE.from_image and SamplingPlan.from_json(WHOLE.to_json()) == WHOLE
    late = plan(EXPERTS, Boundary("sol", "lune", 0.7), steps=5, start=0.9)
    assert late.from_image and SamplingPlan.from_json(late.to_json()) == late
    cut = plan(EXPERTS, Boundary("sol", "lune", 0.7), noise_levels=WHOLE.noise_levels[1:])
    assert cut.from_image
    assert not plan(EXPERTS, Boundary("sol", "lune", 0.7), noise_levels=WHOLE.noise_levels).from_image
    # "leading" begins below the top of its axis, from noise all the same.
    assert not plan(Expert.sol(spacing="leading"), steps=4).from_image
    older = json.loads(WHOLE.to_json()) | {"format": 2}
    older.pop("digest")
    older.pop("from_image")
    assert SamplingPlan.from_json(json.dumps(older)) == WHOLE


def test_a_run_cannot_begin_where_it_needs_the_step_before():
    cut = dataclasses.replace(WHOLE, steps=WHOLE.steps[1:])
    experts = [dataclasses.replace(expert, model=lambda x, t: x) for expert in EXPERTS]
    with pytest.raises(ValueError, match="its beginning was cut off"):
        sample(cut, experts, torch.zeros(1, 4))


def forged(body: dict) -> str:
    """As someone writes it who knows how a digest is made."""
    plain = json.dumps({key: body[key] for key in body if key != "digest"}, sort_keys=True)
    return json.dumps({**body, "digest": hashlib.sha256(plain.encode()).hexdigest()})


class Own:
    """A path of another class than this package's."""

    discrete = False

    def __init__(self):
        for name in ("at", "timestep", "level", "initial_scale", "grid"):
            setattr(self, name, getattr(FlowPath(), name))


COSINE = VPPath(tuple(BETA_SCHEDULES["squaredcos_cap_v2"](0, 0, 50)))
TRAINED = VPPath(tuple(np.linspace(1e-4, 0.03, 40) ** 1.1), steps_offset=1)
ZERO = VPPath(tuple(without_terminal_signal(BETA_SCHEDULES["linear"](1e-4, 0.02, 100))))
SD, LUNE = Expert.sd15(guidance_scale=7.5, guidance_rescale=0.5), Expert.lune(guidance_window=(0.6, 0.2))


@pytest.mark.parametrize(
    ("experts", "router", "options"),
    [
        (EXPERTS, Boundary("sol", "lune", 0.7), dict(steps=5)),
        (EXPERTS, Boundary("sol", "lune", 0.7), dict(steps={"sol": 3, "lune": 4}, start=0.9, end=0.1)),
        ([SD, LUNE], Crossfade("sd15", "lune", 0.8, 0.3), dict(steps=9)),
        ([SD, *EXPERTS], Spans((("sol", 0.7), ("sd15", 0.4), ("lune", 0.0))), dict(steps=7)),
        (EXPERTS, PerStep(["sol", {"sol": 0.5, "lune": 0.5}, "lune"]), {}),
        (EXPERTS, lambda s: {"sol": s, "lune": 1.0 - s}, dict(steps=6)),
        (EXPERTS, Boundary("sol", "lune", 0.7), dict(noise_levels=(1.0, 0.8, 0.5, 0.2))),
        (dataclasses.replace(LUNE, solver="heun"), None, dict(steps=3, end=0.05)),
        (Expert("c", COSINE, "sample", solver="ddim", eta=0.3, clip_sample_range=2.0), None, dict(steps=3)),
        (Expert("t", TRAINED, "epsilon", spacing="leading", set_alpha_to_one=False), None, dict(steps=4)),
        (Expert("z", ZERO, "v_prediction", solver="ddpm"), None, dict(steps=4)),
        (Expert("f", FlowPath(1.0, data_at_one=True), "reversed_flow_prediction"), None, dict(steps=4)),
    ],
)
def test_a_plan_carries_what_it_was_compiled_from(experts, router, options):
    made = plan(experts, router, **options)
    read = SamplingPlan.from_json(made.to_json())
    assert read == made and read.made_from == made.made_from
    assert compile_again(read.made_from) == dataclasses.replace(made, from_image=bool(options.get("start")))
    for steps in (made.steps[:-1], (*made.steps[:-1], dataclasses.replace(made.steps[-1], solver="euler a"))):
        with pytest.raises(ValueError, match="made_from compiles to"):
            SamplingPlan.from_json(dataclasses.replace(made, steps=steps).to_json())


def test_what_it_was_compiled_from_reads_as_its_settings():
    body = json.loads(plan([SD, LUNE], Boundary("sd15", "lune", 0.6), steps=5).to_json())
    sd15, lune = body["made_from"]["experts"]
    assert sd15["path"] == {
        **{"type": "VPPath", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        **{"num_train_timesteps": 1000, "steps_offset": 0},
    }
    assert (sd15["prediction"], sd15["guidance_scale"]) == ("epsilon", 7.5)
    assert (lune["solver"], lune["shift"], lune["guidance_window"]) == ("euler", 2.0, [0.6, 0.2])
    assert lune["path"] == {"type": "FlowPath", "timestep_scale": 1000.0, "data_at_one": False}
    assert body["made_from"]["router"] == {"type": "Boundary", "first": "sd15", "then": "lune", "at": 0.6}
    assert body["made_from"]["steps"] == 5
    assert list(body)[:2] == ["format", "made_from"]  # before thousands of coefficients


def edits():
    for column in (
        "a",
        "b",
        "d_0",
        "keep_x",
        "keep_x0",
        "n",
        "p",
        "q_cond_0",
        "q_uncond_0",
        "scale_0",
        "clip",
    ):
        yield f"row.{column}", lambda b, c=column: b["steps"][3]["row"].update({c: 0.125})
    for name in ("weight", "timestep", "guidance_scale", "input_scale", "guidance_rescale"):
        yield name, lambda b, n=name: b["steps"][3]["calls"][0].update({n: 0.25})
    yield "level", lambda b: b["steps"][3]["level"].update(alpha=0.25)
    yield "target", lambda b: b["steps"][3]["target"].update(sigma=0.25)
    yield "solver", lambda b: b["steps"][3].update(solver="ddim")
    yield "name", lambda b: b["steps"][3]["calls"][0].update(name="sol")
    yield "initial_scale", lambda b: b.update(initial_scale=0.5)
    of_lune = lambda b: b["made_from"]["experts"][1]  # noqa: E731
    yield "made_from.shift", lambda b: of_lune(b).update(shift=3.0)
    yield "made_from.guidance", lambda b: of_lune(b).update(guidance_scale=4.0)
    yield "made_from.prediction", lambda b: of_lune(b).update(prediction="reversed_flow_prediction")
    yield "made_from.betas", lambda b: b["made_from"]["experts"][0]["path"].update(beta_end=0.0201)
    yield "made_from.router", lambda b: b["made_from"]["router"].update(at=0.6)
    yield "made_from.steps", lambda b: b["made_from"].update(steps=6)


@pytest.mark.parametrize("edit", [edit for _, edit in edits()], ids=[name for name, _ in edits()])
def test_what_was_changed_is_noticed_even_under_a_new_digest(edit):
    body = json.loads(WHOLE.to_json())
    edit(body)
    with pytest.raises(ValueError, match=r"damaged: .*made_from") as error:
        SamplingPlan.from_json(forged(body))
    assert len(str(error.value).splitlines()) == 1
    # Whoever means it says so: without a recipe the coefficients speak for themselves.
    body["made_from"] = None
    if body["steps"][3]["row"]["clip"] != 0.125:
        assert SamplingPlan.from_json(forged(body)).made_from is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(made_from=7), "made_from must be an object"),
        (dict(made_from={}), "made_from.experts is missing"),
        (dict(experts=[]), "give at least one expert"),
        (dict(router={"type": "os.system"}), "router.type must be one of"),
        (dict(router={"type": ["Spans"]}), "router.type must be one of"),
        (dict(router={"type": "Spans"}), "must have a list of spans"),
        (dict(router={"type": "Spans", "spans": [1, 2]}), "damaged"),
        (dict(router={"type": "PerStep", "steps": [["sol"], None]}), "router per step lists"),
        (dict(steps=10**9), "steps must be a whole number from 1"),
        (dict(steps="many"), "steps must be"),
        (dict(noise_levels=[0.1, 0.9]), "noise levels must be given from noise to data"),
        (dict(path={"type": "VPPath", "steps_offset": 0, "num_train_timesteps": 10**12}), "path must have 1"),
        (dict(path={"type": "VPPath", "steps_offset": 0, "beta_schedule": "sharp"}), "beta_schedule"),
        (dict(path={"type": "VPPath", "steps_offset": 0, "trained_betas": [2.0, 0.1]}), "betas must be"),
        (dict(path={"type": "VPPath", "steps_offset": 0, "trained_betas": []}), "path must have 1"),
        (dict(path={"type": "FlowPath", "timestep_scale": "fast"}), "path.timestep_scale must be a float"),
        (dict(path={"type": "FlowPath", "timestep_scale": 0.0}), "damaged"),
        (dict(path={"type": "Own"}), "path.type must be VPPath or FlowPath"),
    ],
)
def test_a_recipe_from_a_stranger_is_one_line(change, message):
    body = json.loads(WHOLE.to_json())
    if "made_from" in change:
        body.update(change)
    elif "path" in change:
        body["made_from"]["experts"][0].update(change)
    else:
        body["made_from"].update(change)
    with pytest.raises(ValueError, match=message) as error:
        SamplingPlan.from_json(forged(body))
    assert len(str(error.value).splitlines()) == 1


values = st.none() | st.booleans() | st.integers(-5, 10**12) | st.floats() | st.text(max_size=5)
values = st.recursive(values, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3))


@seed(13)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_recipe_is_right_or_one_clear_error(data):
    """One value anywhere in it is replaced by any other."""
    body = json.loads(WHOLE.to_json())
    place = body["made_from"]
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(values)
    try:
        assert SamplingPlan.from_json(forged(body)) == WHOLE
    except ValueError as error:
        assert str(error).startswith("this sampling plan is damaged: ")
        assert len(str(error).splitlines()) == 1


def test_a_path_of_ones_own_is_named_and_not_compiled_again():
    made = plan(Expert("mine", Own(), "flow_prediction"), steps=3)
    read = SamplingPlan.from_json(made.to_json())
    assert read == made
    assert read.made_from is not None
    assert read.made_from.experts[0].path["type"].endswith("test_plan_json.Own")
    assert compile_again(read.made_from) is None


def test_another_guidance_on_the_way_is_no_recipe_any_more():
    other = with_guidance(WHOLE, EXPERTS, 3.0, since=2)
    assert other.made_from is None
    assert SamplingPlan.from_json(other.to_json()) == other


def test_plans_of_the_format_before_are_read():
    body = json.loads(WHOLE.to_json()) | {"format": 4}
    body.pop("made_from")
    assert SamplingPlan.from_json(forged(body)) == WHOLE


def test_plans_with_one_memory_that_every_step_wrote_are_read():
    """Formats before 7: `d` for the memory, two experts at most, and no word of what is kept."""
    body = json.loads(WHOLE.to_json()) | {"format": 6}
    before = ("p", "a", "b", "d", "n", "clip", "q_cond_0", "q_uncond_0", "q_cond_1", "q_uncond_1")
    for step in body["steps"]:
        row = step["row"] | {"d": step["row"]["d_0"]}
        step["row"] = {name: row[name] for name in (*before, "scale_0", "scale_1")}
    assert any(step["row"]["d"] for step in body["steps"])
    assert SamplingPlan.from_json(forged(body)) == WHOLE
