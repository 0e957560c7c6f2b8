"""The student as an expert: the same plan and step as everyone's, checked against loops written by hand."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from tinyflux_helpers import inputs_of, new_config, trained, v4_config
from torch.testing import assert_close

from moe_sampler import Crossfade, Expert, plan, sample
from moe_sampler.sampling.initial import initial_latents
from moe_sampler.tinyflux import StudentModel, tinyflux_expert

STEPS, SHAPE = 6, (2, 4, 3, 5)
EXACT = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module", params=[v4_config(), new_config()], ids=["published", "new"])
def student(request):
    return trained(request.param)


def text_of(model, batch=2):
    inputs = inputs_of(model.config, batch=batch)
    return {name: inputs[name] for name in ("encoder_hidden_states", "pooled_projections")}


@torch.no_grad()
def euler(model, times, x, cond, uncond=None, scale=1.0, **features):
    """x ← x + v·(t' - t) on tokens, in float32, t from noise (0) to data (1)."""
    tokens = x.flatten(2).transpose(1, 2)
    for t, following in pairwise(times):
        call = {"timestep": torch.full((len(x),), t), "size": x.shape[2:], **features}
        v = model(tokens, **cond, **call).sample
        if uncond is not None:
            without = model(tokens, **uncond, **call).sample
            v = without + scale * (v - without)
        tokens = tokens + v * float(following - t)
    return tokens.transpose(1, 2).reshape(x.shape)


def times_of(shift, upstream):
    u = np.linspace(0, 1, STEPS + 1)
    if upstream:
        return shift * u / (1 + (shift - 1) * u)
    s = 1 - u
    return 1 - shift * s / (1 + (shift - 1) * s)


@pytest.mark.parametrize("upstream", [False, True], ids=["ours", "upstream's schedule"])
def test_sampling_is_euler(student, upstream):
    expert = tinyflux_expert(student, shift=3.0, upstream_schedule=upstream)
    steps = plan(expert, steps=STEPS)
    times = times_of(3.0, upstream)
    assert [step.calls[0].timestep for step in steps.steps] == pytest.approx(list(times[:-1]), abs=1e-12)
    start = initial_latents(steps, SHAPE, seeds=[1, 2])
    out = sample(steps, expert, start, cond=text_of(student))
    assert_close(out, euler(student, times, start, text_of(student)), **EXACT)
    assert (out - start).abs().max() > 0.1


def test_the_schedules_differ():
    """Shift 3: our steps crowd near the noise (t = 0), upstream's near the data."""
    assert times_of(3.0, False)[3] == pytest.approx(0.25)
    assert times_of(3.0, True)[3] == pytest.approx(0.75)


def test_guidance_with_the_null_condition(student):
    expert = tinyflux_expert(student, guidance_scale=2.0)
    cond = text_of(student)
    uncond = student.null_condition(2, cond["encoder_hidden_states"].shape[1])
    steps = plan(expert, steps=STEPS)
    start = initial_latents(steps, SHAPE, seeds=[1, 2])
    out = sample(steps, expert, start, cond=cond, uncond=uncond)
    published = student.config["schedule"] == "data"
    expected = euler(student, times_of(3.0, published), start, cond, uncond, 2.0)
    assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert (
        out - sample(plan(tinyflux_expert(student), steps=STEPS), expert, start, cond=cond)
    ).abs().max() > 1e-3


def test_masked_text_is_guided_by_a_masked_null_condition(student):
    cond = text_of(student) | {"encoder_attention_mask": torch.tensor([[1, 1, 0, 0, 0]] * 2)}
    expert = tinyflux_expert(student, guidance_scale=2.0)
    uncond = student.null_condition(2, 5, mask=True)
    out = sample(plan(expert, steps=2), expert, shape=SHAPE, seeds=[1, 2], cond=cond, uncond=uncond)
    plain = sample(
        plan(expert, steps=2),
        expert,
        shape=SHAPE,
        seeds=[1, 2],
        cond=text_of(student),
        uncond=student.null_condition(2, 5),
    )
    assert out.isfinite().all() and not torch.equal(out, plain)


def test_expert_features(student):
    """Constant ones go with the conditioning; others are asked for at every step."""
    config = student.config
    real = inputs_of(config, real=("lune", "sol"))
    real = {name: real[name] for name in ("lune_features", "sol_stats", "sol_spatial")}
    steps = plan(tinyflux_expert(student), steps=STEPS)
    times = times_of(3.0, config["schedule"] == "data")
    start = initial_latents(steps, SHAPE, seeds=[1, 2])
    expected = euler(student, times, start, text_of(student), **real)
    out = sample(steps, tinyflux_expert(student), start, cond=text_of(student) | real)
    assert_close(out, expected, **EXACT)
    asked = []

    def features(latents, t):
        asked.append((tuple(latents.shape), round(t.item(), 6)))
        return real

    out = sample(steps, tinyflux_expert(student, features=features), start, cond=text_of(student))
    assert_close(out, expected, **EXACT)
    assert asked == [(SHAPE, round(t, 6)) for t in times[:-1]]


def test_expert_round_trip(student):
    """A plan names the expert, survives JSON, and runs with an expert whose settings were replaced since."""
    expert = tinyflux_expert(student, name="student", guidance_scale=2.0, solver="dpmpp_2m")
    assert (expert.prediction, expert.path.data_at_one, expert.path.timestep_scale) == (
        "reversed_flow_prediction",
        True,
        1.0,
    )
    steps = plan(expert, steps=4)
    restored = type(steps).from_json(steps.to_json())
    assert restored == steps and restored.experts == ("student",)
    keys = {"cond": text_of(student), "uncond": student.null_condition(2, 5)}
    out = sample(steps, expert, shape=SHAPE, seeds=[1, 2], **keys)
    other = dataclasses.replace(expert, guidance_scale=1.0)
    assert torch.equal(sample(restored, other, shape=SHAPE, seeds=[1, 2], **keys), out)


def test_a_sample_is_the_same_alone_and_in_a_batch(student):
    expert, cond = tinyflux_expert(student), text_of(student, batch=3)
    together = sample(plan(expert, steps=3), expert, shape=(3, 4, 8, 8), seeds=[4, 5, 6], cond=cond)
    alone = sample(
        plan(expert, steps=3),
        expert,
        shape=(1, 4, 8, 8),
        seeds=[5],
        cond={name: tensor[1:2] for name, tensor in cond.items()},
    )
    assert_close(alone[0], together[1], **EXACT)


def test_low_precision_student():
    model = trained(new_config()).to(torch.bfloat16)
    expert = tinyflux_expert(model)
    assert expert.dtype == torch.bfloat16
    out = sample(plan(expert, steps=3), expert, shape=SHAPE, seeds=[1, 2], cond=text_of(model))
    assert out.dtype == torch.float32 and out.isfinite().all()


def test_mixing_with_sol_and_lune(student, mixture):
    """Sol early, the student in the middle, mixed by weights over the noise; each is told its own time."""
    seen = {"sol": [], "student": []}
    sol = mixture.give_model(Expert.sol(solver="ddim"))
    model = StudentModel(student)

    def exact(x, timestep, **_):
        seen["sol"].append(timestep.item())
        return sol.model(x, timestep)

    def spied(x, timestep, **cond):
        seen["student"].append(timestep.item())
        return model(x, timestep, **cond)

    experts = [
        dataclasses.replace(sol, model=exact),
        dataclasses.replace(tinyflux_expert(student, name="student"), model=spied),
    ]
    steps = plan(experts, Crossfade("sol", "student", start=0.7, end=0.3), steps=10)
    both = [step for step in steps.steps if len(step.calls) == 2]
    assert both
    out = sample(steps, experts, shape=SHAPE, seeds=[1, 2], cond=text_of(student))
    assert out.isfinite().all()
    for step in both:
        told = {call.name: call.timestep for call in step.calls}
        assert told["student"] == pytest.approx(1 - step.level.noise, abs=1e-9)
        assert told["sol"] == int(told["sol"])
    assert seen["student"] == sorted(seen["student"]) and seen["sol"] == sorted(seen["sol"], reverse=True)


def test_refusals(student):
    with pytest.raises(TypeError, match="TinyFlux"):
        tinyflux_expert(student.final_linear)
    with pytest.raises(ValueError, match="shift"):
        tinyflux_expert(student, shift=-1.0)
    with pytest.raises(ValueError, match="shift"):
        tinyflux_expert(student, shift=0.0, upstream_schedule=True)
    expert = tinyflux_expert(student)
    with pytest.raises(ValueError, match="hidden_states must have shape"):
        sample(plan(expert, steps=2), expert, shape=(2, 5, 4, 4), seeds=[1, 2], cond=text_of(student))
