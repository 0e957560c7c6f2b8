"""What the fields say, and what is said beside one."""

from __future__ import annotations

import pytest

from moe_sampler.tinyflux.sampling.expert import STUDENT as NAME
from moe_sampler.ui.again import command_line, python_code
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
        {"steps": 12, "speed": "fast"},
        {"levels_sol": "karras", "solver_lune": "unipc", "levels_lune": "cosine"},
        {"levels_lune": "karras"},
        {"solver_lune": "dpmpp_2m"},
        {"steps": 7, "levels_lune": "0.7,0.4,0.2", "solver_sol": "ddim"},
        {"maker": "lune", "levels_lune": "0.9,0.4,0.2"},
        {"maker": "sol", "steps_sol": "4", "image": "start.png", "strength": 0.35},
    ],
    ids=[
        *("as at first", "plain", "by expert", "one alone", "fast", "spacings", "a spacing"),
        *("the solver alone", "some levels", "all levels", "from a picture"),
    ],
)
def test_settings_bring_back_what_the_fields_held(cast, changed):
    """Through a picture's settings, which have the defaults spelled out."""
    values = filled(cast.form, **changed)
    settings, plan = cast.settings(values)
    restored = cast.form.values(cast.record(settings))
    counted = cast.form.shown(values["maker"])
    assert {name: restored[name] for name in counted} == {name: values[name] for name in counted}
    assert cast.plan(settings).to_json() == plan.to_json()


def test_a_picture_whose_experts_reuse_alike_or_not(cast):
    settings, _ = cast.settings(filled(cast.form, steps=12))
    assert cast.form.values(settings | {"reuse": {"sol": 3, "lune": 3}})["reuse"] == 3
    assert cast.form.values(settings | {"reuse": {"sol": 3, "lune": 2}})["reuse"] == 1
    assert cast.form.values(settings | {"reuse": [0, 3]})["reuse"] == 1


def test_settings_have_the_pipelines_names_and_leave_out_what_does_not_count(cast):
    settings, _ = cast.settings(filled(cast.form, maker="lune", handoff_1=0.3, solver_sol="ddim", steps=4))
    assert settings == {
        "prompt": "a castle",
        "seed": 0,
        "expert": "lune",
        "num_inference_steps": 4,
        "guidance_scale": {"lune": cast.form.first["guidance_lune"]},
    }


def test_levels_move_the_steps(cast):
    plain, spaced, listed = (
        cast.settings(filled(cast.form, maker="lune", steps=3, levels_lune=levels))
        for levels in ("", "karras", "0.9, 0.4, 0.2")
    )
    assert "levels" not in plain[0] and spaced[0]["levels"] == {"lune": "karras"}
    assert plain[1].noise_levels != spaced[1].noise_levels
    assert listed[0]["levels"] == {"lune": [0.9, 0.4, 0.2]} and "num_inference_steps" not in listed[0]
    assert listed[1].noise_levels == pytest.approx((0.9, 0.4, 0.2))
    encoders: dict[str, str] = {}
    recorded = cast.record(spaced[0]) | {"dtype": "float32"}
    assert "--levels lune=karras" in command_line(recorded, cast.where, encoders)
    assert '"lune": "karras"' in python_code(recorded, cast.model, cast.where, encoders)
    assert "--levels lune=0.9,0.4,0.2" in command_line(cast.record(listed[0]), cast.where, encoders)


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
        ("levels_lune", "karas", "unknown spacing"),
        ("levels_sol", "0.9,x", "a spacing's name, or noise levels"),
        ("levels_sol", "0.2,0.4", "descending"),
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


def test_levels_are_to_blame_where_a_solver_brings_its_own(cast):
    with pytest.raises(Wrong, match="brings its own noise levels") as caught:
        cast.settings(filled(cast.form, solver_sol="unipc", levels_sol="karras"))
    assert caught.value.field == "levels_sol"


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
