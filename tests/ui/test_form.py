"""What the fields say, and what is said beside one."""

from __future__ import annotations

import pytest

from moe_sampler.tinyflux.sampling.expert import STUDENT as NAME
from moe_sampler.ui.form import HYBRID, LARGEST_SEED, STUDENT, Form, Wrong
from moe_sampler.ui.planning import Cast


@pytest.fixture(scope="module")
def cast() -> Cast:
    return Cast()


def filled(form: Form, **values):
    return form.first | {"prompt": "a castle"} | values


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"steps": 7, "handoff_1": 0.42, "seed": LARGEST_SEED, "negative": "night, rain"},
        {"steps_sol": "3", "steps_lune": "5", "solver_sol": "ddim", "guidance_lune": 4.5},
        {"maker": "lune", "solver_lune": "heun", "reuse": 3, "speed": "fast", "height": "80", "width": "48"},
        {"maker": "sol", "steps_sol": "4", "image": "start.png", "strength": 0.35},
    ],
    ids=["as at first", "plain", "by expert", "one alone", "from a picture"],
)
def test_settings_bring_back_what_the_fields_held(cast, changed):
    """Through a picture's settings, which have the defaults spelled out."""
    values = filled(cast.form, **changed)
    settings, plan = cast.settings(values)
    restored = cast.form.values(cast.record(settings))
    counted = cast.form.shown(values["maker"])
    assert {name: restored[name] for name in counted} == {name: values[name] for name in counted}
    assert cast.plan(settings).to_json() == plan.to_json()


def test_settings_have_the_pipelines_names_and_leave_out_what_does_not_count(cast):
    settings, _ = cast.settings(filled(cast.form, maker="lune", handoff_1=0.3, solver_sol="ddim", steps=4))
    assert settings == {
        "prompt": "a castle",
        "seed": 0,
        "expert": "lune",
        "num_inference_steps": 4,
        "guidance_scale": {"lune": cast.form.first["guidance_lune"]},
    }


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("prompt", "  ", "what the picture shows"),
        ("prompt", "a\0b", "NUL"),
        ("seed", None, "whole number"),
        ("seed", 1.5, "whole number"),
        ("seed", LARGEST_SEED + 1, "9,007,199,254,740,991"),
        ("steps", 0, "whole number"),
        ("steps_sol", "x", "whole number"),
        ("steps_sol", "3", "come together"),
        ("solver_lune", "ddpm2", "unknown solver"),
        ("guidance_sol", None, "a number"),
        ("handoff_1", 1.0, "strictly between"),
        ("height", "tall", "whole number"),
        ("maker", "luna", "use hybrid"),
    ],
)
def test_what_is_wrong_is_said_of_its_field(cast, field, value, part):
    with pytest.raises(Wrong, match=part) as caught:
        cast.settings(filled(cast.form, **{field: value}))
    assert caught.value.field == field


def test_the_strength_is_to_blame_where_it_leaves_no_step(cast):
    with pytest.raises(Wrong, match="leaves none of 6 steps") as caught:
        cast.settings(filled(cast.form, steps=6, image="start.png", strength=0.01))
    assert caught.value.field == "strength"


def test_a_plan_is_drawn_before_there_is_a_prompt(cast):
    _, plan = cast.settings(cast.form.first | {"steps": 5}, prompted=False)
    assert len(plan) == 5


def test_any_number_of_experts():
    defaults = {"handoff": 0.6, "num_inference_steps": 9}
    one, three = Form(("sol",), defaults), Form(("a", "b", "c"), defaults, student=True)
    assert one.makers == ("sol",) and not one.handoffs and not {"handoff_1"} & one.first.keys()
    assert three.makers == (HYBRID, "a", "b", "c", STUDENT)
    assert [three.first[name] for name in three.handoffs] == pytest.approx([0.6, 0.3])
    assert three.settings(filled(three))["handoff"] == pytest.approx([0.6, 0.3])
    assert not three.weights  # nobody there who can guide


def test_what_guides_the_student(cast):
    form = Form(cast.form.names, {**cast.form.defaults, "tinyflux_guidance": 3.0}, student=True)
    values = filled(form, maker=STUDENT, weight_sol=0.4, solver_tinyflux="euler", reuse=3)
    settings = form.settings(values)
    assert settings["sol_weight"] == 0.4 and "lune_weight" not in settings and "reuse" not in settings
    assert settings["guidance_scale"]["tinyflux"] == 3.0 and settings["solver"] == {"tinyflux": "euler"}
    assert form.values(settings | {"student": "runs/student"}) | {"reuse": 3} == values
    alone = form.settings(values | {"weight_sol": 0.0})
    assert alone["guidance_scale"] == {"tinyflux": 3.0} and "handoff" not in alone


def test_the_student_is_called_as_in_plans():
    assert STUDENT == NAME
