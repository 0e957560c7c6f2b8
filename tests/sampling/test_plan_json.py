"""Plans as JSON: what is none, or cannot be run, says so."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from moe_sampler import Boundary, Expert, SamplingPlan, plan, sample

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
        (changed(lambda b: b.update(format=9)), "format is 9"),
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
        (changed(lambda b: b.update(steps=b["steps"] * 100_000)), "steps are more than"),
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
