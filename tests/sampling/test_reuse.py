"""Calls that reuse deep features: which ones do, what they cost, and that nobody else's are read."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

from moe_sampler import Boundary, Crossfade, Expert, SamplingPlan, SamplingRun, Spans, plan, sample
from moe_sampler.sampling.calls import with_guidance

SHAPE = (4, 5, 7)


def deep(x, timestep, c):
    """Depends on all that a call is told, so that another call's shows."""
    return torch.tanh(x * 0.9 + timestep / 500.0 + c.view(-1, 1, 1, 1))


def shallow(x, features):
    return 0.3 * x + features


class Model:
    """A model in two halves, and whose features each half was given."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def check_reusable(self) -> None:
        pass

    def __call__(self, sample, timestep, c):
        self.calls.append("plain")
        return shallow(sample, deep(sample, timestep, c))

    def recording(self, sample, timestep, c):
        self.calls.append("full")
        features = deep(sample, timestep, c)
        return shallow(sample, features), features

    def reusing(self, sample, timestep, features, c):
        self.calls.append("reuse")
        assert len(features) == len(sample) == len(c)
        return shallow(sample, features)


def by_hand(every: int):
    """The same as a plain callable that counts its own calls: nothing of the plan's is used."""
    kept = []

    def model(x, timestep, c):
        last = deep(x, timestep, c) if len(kept) % every == 0 else kept[-1]
        kept.append(last)
        return shallow(x, last)

    return model


def passes(compiled: SamplingPlan) -> str:
    """F a full call, r one that reuses; mixed steps in brackets."""
    letters = ["".join("r" if call.reuses else "F" for call in step.calls) for step in compiled.steps]
    return "".join(each if len(each) == 1 else f"[{each}]" for each in letters)


SOL, LUNE = Expert.sol(solver="ddim"), Expert.lune()
BOTH = Boundary("sol", "lune", 0.7)


@pytest.mark.parametrize(
    ("experts", "router", "steps", "expected"),
    [
        ([LUNE], None, 5, "FFFFF"),
        ([(LUNE, 1)], None, 5, "FFFFF"),
        ([(LUNE, 2)], None, 5, "FrFrF"),
        ([(LUNE, 3)], None, 8, "FrrFrrFr"),
        ([(LUNE, 99)], None, 5, "Frrrr"),
        ([(LUNE, [0, 3, 4])], None, 6, "FrrFFr"),
        # levels 0.97 to 0.33, shift 2: above 0.8 every second, below every third
        ([(LUNE, [(0.8, 2), (0.0, 3)])], None, 8, "FrFrrFrr"),
        ([(SOL, 2), (LUNE, 3)], BOTH, {"sol": 3, "lune": 4}, "FrF" + "FrrF"),
        ([SOL, (LUNE, 2)], BOTH, {"sol": 3, "lune": 3}, "FFF" + "FrF"),
        # who comes back has nothing any more
        ([(SOL, 9), (LUNE, 9)], Spans((("sol", 0.8), ("lune", 0.4), ("sol", 0.0))), 9, None),
        # each counts its own calls where both work
        ([(SOL, 2), (LUNE, 3)], Crossfade("sol", "lune", 0.99, 0.01), 6, None),
        # both evaluations of a Heun step count; the last one has no second
        ([(dataclasses.replace(LUNE, solver="heun"), 2)], None, 3, "FrFrF"),
        ([(dataclasses.replace(LUNE, solver="heun"), 3)], None, 3, "FrrFr"),
    ],
)
def test_which_calls_are_full(experts, router, steps, expected):
    given = [e if isinstance(e, Expert) else dataclasses.replace(e[0], reuse=e[1]) for e in experts]
    compiled = plan(given, router, steps=steps)
    compiled.check()
    if expected is not None:
        assert passes(compiled) == expected
        return
    before: set[str] = set()
    for step in compiled.steps:
        names = {call.name for call in step.calls}
        assert all(not call.reuses for call in step.calls if call.name not in before)
        before = names
    if isinstance(router, Crossfade):
        own = {n: [c.reuses for s in compiled.steps for c in s.calls if c.name == n] for n in ("sol", "lune")}
        assert own["sol"] == [i % 2 > 0 for i in range(len(own["sol"]))]
        assert own["lune"] == [i % 3 > 0 for i in range(len(own["lune"]))]
    else:
        assert passes(compiled).count("F") == 3 and "FrrF" in passes(compiled)


def test_a_guided_call_after_unguided_ones_is_full_and_costs_both_halves():
    """Noise levels of 6 steps with shift 1: 1, 5/6 ... 1/6; guided from 2/3 to 1/3."""
    lune = Expert.lune(shift=1.0, guidance_scale=2.0, guidance_window=(0.7, 0.3), reuse=9, reuse_share=0.125)
    compiled = plan(lune, steps=6)
    assert [call.guided for step in compiled.steps for call in step.calls] == [0, 0, 1, 1, 1, 0]
    assert passes(compiled) == "FrFrrr"
    assert compiled.model_calls == 9
    assert compiled.cost == 1 + 0.125 + 2 * (1 + 0.125 + 0.125) + 0.125
    assert plan(dataclasses.replace(lune, reuse=None), steps=6).cost == 9

    model = Model()
    seeds, cond = [1, 2], {"c": torch.tensor([0.2, -0.4])}
    sample(
        compiled,
        dataclasses.replace(lune, model=model),
        shape=(2, *SHAPE),
        seeds=seeds,
        cond=cond,
        uncond={"c": torch.zeros(2)},
    )
    assert model.calls == ["full", "reuse", "full", "reuse", "reuse", "reuse"]


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "heun", "ddim"])
def test_the_same_as_by_hand(solver, scale):
    lune = Expert.lune(solver=solver, guidance_scale=scale, eta=0.5 if solver == "ddim" else 0.0)
    run = dict(shape=(2, *SHAPE), seeds=[3, 8], cond={"c": torch.tensor([0.2, -0.4])})
    run |= {"uncond": {"c": torch.zeros(2)}} if scale > 1 else {}
    expected = sample(plan(lune, steps=7), dataclasses.replace(lune, model=by_hand(3)), **run)
    own = dataclasses.replace(lune, model=Model(), reuse=3)
    assert torch.equal(sample(plan(own, steps=7), own, **run), expected)
    full = sample(plan(lune, steps=7), dataclasses.replace(lune, model=Model()), **run)
    assert not torch.allclose(full, expected, atol=1e-3)


def duo(**settings) -> list[Expert]:
    return [
        Expert.sol(Model(), guidance_scale=2.0, reuse=2, **settings),
        Expert.lune(Model(), guidance_scale=3.0, reuse=3, **settings),
    ]


@pytest.mark.parametrize("router", [BOTH, Crossfade("sol", "lune", 0.9, 0.3)])
def test_alone_in_a_batch_paused_and_beside_another_run(router):
    experts = duo()
    compiled = plan(experts, router, steps=9)
    assert compiled.reuses

    def start(*seeds: int) -> SamplingRun:
        c = torch.tensor([0.1 * seed for seed in seeds])
        cond, uncond = {"c": c}, {"c": torch.zeros(len(seeds))}
        shape = (len(seeds), *SHAPE)
        return SamplingRun(compiled, experts, shape=shape, seeds=list(seeds), cond=cond, uncond=uncond)

    whole = start(3, 7, 11).advance()
    assert not torch.equal(whole[0], whole[1])
    runs = [start(3), start(7), start(11)]
    for until in range(1, len(compiled) + 1):  # all models are shared, and every run has a turn a step
        for run in runs:
            run.advance(until)
    for run, expected in zip(runs, whole, strict=True):
        assert torch.equal(run.x[0], expected)


def test_features_are_made_only_where_they_are_used_and_given_up_after():
    [_, lune] = duo()
    given = {
        "shape": (1, *SHAPE),
        "seeds": [1],
        "cond": {"c": torch.ones(1)},
        "uncond": {"c": torch.zeros(1)},
    }
    run = SamplingRun(plan(lune, steps=5), lune, **given)
    for kept in (True, True, False, True, False):  # F r r F r
        run.advance(run.index + 1)
        assert bool(run._calls._features) == kept
    assert lune.model.calls == ["full", "reuse", "reuse", "full", "reuse"]
    plain = dataclasses.replace(lune, model=Model(), reuse=None)
    sample(plan(plain, steps=3), plain, **given)
    assert plain.model.calls == ["plain"] * 3


def test_guidance_that_comes_in_the_middle_makes_a_full_call():
    lune = Expert.lune(Model(), reuse=9, guidance_scale=1.0)
    compiled = plan(lune, steps=6)
    assert passes(compiled) == "Frrrrr"
    changed = with_guidance(compiled, [lune], 3.0, since=2)
    assert passes(changed) == "FrFrrr"
    assert passes(with_guidance(changed, [lune], 1.0, since=4)) == "FrFrrr"

    seen = []

    def callback(info):
        seen.append(info["step"])
        if info["step"] == 1:
            info["run"].follow(changed)

    run = dict(shape=(1, *SHAPE), seeds=[1], cond={"c": torch.ones(1)}, uncond={"c": torch.zeros(1)})
    sample(compiled, lune, **run, callback=callback)
    assert seen == list(range(6))
    assert lune.model.calls == ["full", "reuse", "full", "reuse", "reuse", "reuse"]

    # To follow a plan that reuses what this run never kept.
    started = SamplingRun(plan(dataclasses.replace(lune, reuse=None), steps=6), lune, **run)
    started.advance(2)
    with pytest.raises(ValueError, match="make that call full"):
        started.follow(compiled)


def test_a_model_that_cannot_is_refused_before_any_call():
    lune = Expert.lune(lambda x, timestep: pytest.fail("called"), reuse=2)
    with pytest.raises(ValueError, match=r"lune reuse features, and its model can't.*ExpertModel"):
        sample(plan(lune, steps=4), lune, shape=(1, *SHAPE), seeds=[1])


def test_as_json_and_printed():
    experts = [dataclasses.replace(SOL, reuse=2, reuse_share=0.25), dataclasses.replace(LUNE, reuse=(0, 2))]
    compiled = plan(experts, BOTH, steps={"sol": 2, "lune": 3})
    again = SamplingPlan.from_json(compiled.to_json())
    assert again == compiled and again.cost == 1 + 0.25 + 1 + 0.1 + 1
    title, header, *lines = str(compiled).splitlines()
    assert title == "5 steps, 5 model calls per sample at the cost of 3.4"
    assert header.split()[-1] == "pass"
    assert [line.split()[-1] for line in lines] == ["full", "reuse", "full", "reuse", "full"]
    assert "pass" not in str(plan([SOL, LUNE], BOTH, steps=5))

    def tampered(change) -> str:
        body = json.loads(compiled.to_json()) | {"format": 3}
        body.pop("digest")
        change(body)
        return json.dumps(body)

    def first_reuses(body):
        body["steps"][0]["calls"][0]["share"] = 0.1
        body["made_from"] = None

    def cheaper(body):
        body["steps"][1]["calls"][0]["share"] = 0.01

    def free(body):
        body["steps"][1]["calls"][0]["share"] = 0.0

    for change, message in (
        (first_reuses, "step 0 of the plan lets sol reuse features"),
        (cheaper, "step 1's share is not what its made_from compiles to"),
        (free, r"share is not in \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplingPlan.from_json(tampered(change))

    def of_format_5(body):
        body["format"] = 5
        for step, expert in itertools.zip_longest(body["steps"], body["made_from"]["experts"]):
            for call in step["calls"]:
                del call["share"]
            for key in ("reuse", "reuse_share"):
                (expert or {}).pop(key, None)

    plain = plan([SOL, LUNE], BOTH, steps=3)
    body = json.loads(plain.to_json())
    body.pop("digest")
    of_format_5(body)
    body["format"] = 3  # which needs no digest
    assert SamplingPlan.from_json(json.dumps(body)) == plain


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "whole number from 1"),
        (2.5, "whole number"),
        ("3", "whole number"),
        (True, "whole number"),
        ([], "ascending from 0"),
        ([1, 2], "ascending from 0"),
        ([0, 3, 3], "ascending from 0"),
        ([(0.5, 2)], "the last one at 0"),
        ([(0.2, 2), (0.5, 2), (0.0, 1)], "descending"),
        ([(0.5, 0), (0.0, 1)], "whole number from 1"),
        ([(0.5, 2, 3)], "pairs"),
    ],
)
def test_settings_that_are_none(value, message):
    with pytest.raises(ValueError, match=f"lune: reuse.*{message}"):
        Expert.lune(reuse=value)
    with pytest.raises(ValueError, match="reuse_share must lie between 0 and 1"):
        Expert.lune(reuse_share=1.5)


def test_auto_is_every_third_call_of_plans_that_have_calls_to_spare():
    def made(reuse, steps):
        experts = [dataclasses.replace(expert, reuse=reuse) for expert in (SOL, LUNE)]
        return plan(experts, BOTH, steps=steps)

    assert made("auto", 10) == made(3, 10)  # also in what it was compiled from
    assert made("auto", 9) == made(None, 9) and not made("auto", 9).reuses
    assert SamplingPlan.from_json(made("auto", 12).to_json()) == made(3, 12)
    with pytest.raises(ValueError, match="sol: reuse"):
        dataclasses.replace(SOL, reuse="often")
