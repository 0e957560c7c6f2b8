"""Numbers are Python's and NumPy's; strings aren't; advice works; what is absurd is refused at once."""

from __future__ import annotations

import dataclasses
import re
import time

import numpy as np
import pytest
import torch

from moe_sampler import Boundary, Crossfade, Expert, PerStep, SamplingPlan, Spans, plan
from moe_sampler._numbers import number, whole

SOL, LUNE = Expert.sol(), Expert.lune()
PAIR = (SOL, LUNE)


@pytest.mark.parametrize(
    "kind",
    [float, np.float32, np.float64, np.float16, np.array, torch.tensor],
    ids=lambda kind: kind.__name__,
)
def test_every_kind_of_number_is_one(kind):
    value = kind(7.5)
    assert type(number("x", value)) is float and number("x", value) == 7.5
    expert = Expert.lune(guidance_scale=value, shift=value)
    assert expert == Expert.lune(guidance_scale=7.5, shift=7.5)
    half = kind(0.5)
    settings = dict(
        eta=half, clip_sample_range=value, guidance_rescale=half, guidance_window=(half, kind(0.25))
    )
    full = Expert.lune(**settings)
    kept = [full.eta, full.clip_sample_range, full.guidance_rescale, *full.guidance_window]
    assert kept == [0.5, 7.5, 0.5, 0.5, 0.25] and {type(each) for each in kept} == {float}
    compiled = plan(expert, steps=np.int64(4))
    assert SamplingPlan.from_json(compiled.to_json()) == compiled == plan(expert, steps=4)
    for one, other in (
        (Boundary("sol", "lune", half), Boundary("sol", "lune", 0.5)),
        (Crossfade("sol", "lune", half, kind(0.25)), Crossfade("sol", "lune", 0.5, 0.25)),
        (Spans((("sol", half), ("lune", 0))), Spans((("sol", 0.5), ("lune", 0.0)))),
        (PerStep([{"sol": half, "lune": half}] * 3), PerStep([{"sol": 0.5, "lune": 0.5}] * 3)),
    ):
        assert plan(PAIR, one) == plan(PAIR, other)


@pytest.mark.parametrize("kind", [int, np.int64, np.int32, np.uint8, np.array, torch.tensor])
def test_every_kind_of_whole_number_is_one(kind):
    assert type(whole("n", kind(6), 10)) is int
    assert plan(PAIR, Boundary("sol", "lune", 0.7), steps={"sol": kind(2), "lune": kind(4)}) == plan(
        PAIR, Boundary("sol", "lune", 0.7), steps={"sol": 2, "lune": 4}
    )


@pytest.mark.parametrize(
    "given", ["7.5", "nan", True, None, [7.5], 1j, float("nan"), float("inf"), b"1", 10**400]
)
def test_what_is_no_number_is_refused_with_what_was_given(given):
    shown = re.escape(repr(given)) if given is not None else "None"
    for make in (
        lambda: Expert.lune(guidance_scale=given),
        lambda: Expert.lune(shift=given),
        lambda: Boundary("sol", "lune", given),
        lambda: plan(LUNE, start=given),
        lambda: plan(LUNE, noise_levels=[given]),
    ):
        with pytest.raises(ValueError, match=f"must be a finite number, got {shown}"):
            make()
    for steps in (given if given is not None else "20", 20.0, np.float32(20), "20"):
        with pytest.raises(ValueError, match="steps must be a whole number from 1 to 10000, got"):
            plan(LUNE, steps=steps)


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        (lambda: plan(LUNE, steps=10**9), "from 1 to 10000, got 1000000000"),
        (lambda: plan(SOL, steps=10**9), "from 1 to 10000, got 1000000000"),
        (
            lambda: plan(PAIR, Boundary("sol", "lune", 0.7), steps={"sol": 10**9, "lune": 4}),
            "steps of sol .* 10000",
        ),
        (
            lambda: Expert.lune(guidance_scale=1e39),
            r"lune: the guidance scale may be at most 1000, got 1e\+39",
        ),
        (lambda: Expert.lune(shift=1e308), r"shift must lie between 0\.001 and 1000, got 1e\+308"),
        (lambda: Expert.lune(shift=1e-308), r"shift must lie between 0\.001 and 1000"),
    ],
)
def test_the_absurd_is_refused_at_once_with_the_limit(make, limit):
    begun = time.monotonic()
    with pytest.raises(ValueError, match=limit):
        make()
    assert time.monotonic() - begun < 1.0


def test_a_shift_at_its_limits_plans():
    for shift in (0.001, 1000.0):
        assert len(plan(Expert.lune(shift=shift), steps=20)) == 20


@pytest.mark.parametrize("steps", [2, 3, 20, {"sol": 1, "lune": 1}, {"sol": 5, "lune": 5}])
def test_a_handoff_above_what_an_expert_can_see(steps):
    """Sol's noisiest timestep lies below 0.999, so no number of steps helps; another handoff does."""
    with pytest.raises(
        ValueError, match=r"sol's noisiest timestep is noise level 0\.99\d+, not above 0\.999"
    ) as found:
        plan(PAIR, Boundary("sol", "lune", 0.999), steps=steps)
    assert "fewer steps" not in str(found.value)
    advised = float(re.search(r"hand over at ([0-9.]+)", str(found.value))[1])
    assert plan(PAIR, Boundary("sol", "lune", advised), steps=2).experts == ("sol", "lune")


def test_a_handoff_below_what_an_expert_can_see():
    with pytest.raises(ValueError, match="sol's cleanest timestep is noise level") as found:
        plan(PAIR, Boundary("lune", "sol", 0.001), steps=4)
    advised = float(re.search(r"do so at ([0-9.]+)", str(found.value))[1])
    assert plan(PAIR, Boundary("lune", "sol", advised), steps=2).experts == ("lune", "sol")


@pytest.mark.parametrize("scale", [1.0, 0.999, 0.5, 0.0, -3.0])
def test_a_guidance_scale_of_one_or_less_is_none(scale):
    """diffusers: `do_classifier_free_guidance` is `guidance_scale > 1`."""
    expert = dataclasses.replace(LUNE, guidance_scale=scale, guidance_rescale=0.5)
    assert not expert.guided and expert.guidance_at(0.5) == 1.0
    assert plan(expert, steps=4) == plan(LUNE, steps=4)
    assert dataclasses.replace(LUNE, guidance_scale=1.001).guided
