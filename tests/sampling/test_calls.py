"""What a plan's calls and rows mean to experts, and what becomes of them when guidance changes on the way."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import pytest
import torch

from moe_sampler import Boundary, Crossfade, Expert, SamplingRun, Spans, VPPath, plan, sample
from moe_sampler.kernels.rows import COLUMNS
from moe_sampler.sampling.calls import check_fits, with_guidance

ROUTERS = [Boundary("sol", "lune", 0.7), Crossfade("sol", "lune", 0.9, 0.4), Boundary("lune", "sol", 0.5)]
WINDOWED = dict(guidance_window=(0.8, 0.3))


def experts(scale: float, **settings) -> tuple[Expert, Expert]:
    return Expert.sol(guidance_scale=scale, **settings), Expert.lune(guidance_scale=scale, **settings)


@pytest.mark.parametrize("scale", [5.0, 1.0, 0.25])
@pytest.mark.parametrize("settings", [{}, dict(guidance_rescale=0.7)], ids=["plain", "rescaled"])
@pytest.mark.parametrize("router", ROUTERS, ids=["boundary", "crossfade", "back"])
def test_a_plan_with_another_guidance_is_the_one_made_with_it(router, settings, scale):
    before, after = (plan(experts(g, **settings), router, steps=9) for g in (3.0, scale))
    changed = with_guidance(before, experts(3.0, **settings, **WINDOWED), scale)
    assert changed == dataclasses.replace(after, steps=changed.steps)
    for mine, wanted in zip(changed.steps, after.steps, strict=True):
        assert mine.row == pytest.approx(wanted.row, rel=1e-12, abs=1e-15)
        assert dataclasses.replace(mine, row=(), calls=()) == dataclasses.replace(wanted, row=(), calls=())
        for call, made in zip(mine.calls, wanted.calls, strict=True):
            assert call.guidance_scale == max(scale, 1.0)
            assert call == dataclasses.replace(made, guidance_scale=call.guidance_scale)
    late = with_guidance(before, experts(3.0, **settings), scale, since=4)
    assert late.steps[:4] == before.steps[:4] and late.steps[4:] == changed.steps[4:]


@pytest.mark.parametrize(
    ("sol", "lune", "guided"),
    [(4.0, 1.0, "sol"), (1.0, 4.0, "lune"), (4.0, 4.0, "sol lune"), (1.0, 0.5, ""), (0.0, 2.0, "lune")],
)
def test_a_plan_is_guided_where_any_of_its_calls_is(sol, lune, guided):
    """And a guided call costs two passes through the model, whatever the other expert does."""
    chosen = Expert.sol(guidance_scale=sol), Expert.lune(guidance_scale=lune)
    compiled = plan(chosen, Boundary("sol", "lune", 0.7), steps={"sol": 5, "lune": 3})
    assert compiled.guided == bool(guided)
    assert compiled.model_calls == 8 + 5 * ("sol" in guided) + 3 * ("lune" in guided)
    assert {call.name for step in compiled.steps for call in step.calls if call.guided} == set(guided.split())
    windowed = dataclasses.replace(Expert.lune(guidance_scale=lune), guidance_window=(0.6, 0.55))
    assert plan(windowed, steps=40).guided == ("lune" in guided)


def test_both_ends_of_a_guidance_window_are_in_it():
    expert = Expert.lune(guidance_scale=4.0, **WINDOWED)
    levels = (1.0, math.nextafter(0.8, 1), 0.8, 0.5, 0.3, math.nextafter(0.3, 0), 0.0)
    assert [expert.guidance_at(noise) for noise in levels] == [1.0, 1.0, 4.0, 4.0, 4.0, 1.0, 1.0]


@pytest.mark.parametrize("router", ROUTERS, ids=["boundary", "crossfade", "back"])
def test_experts_fit_a_plan_whatever_guides_them(router):
    compiled = plan(experts(4.0, guidance_rescale=0.5, **WINDOWED), router, steps=9)
    for other in (experts(1.0), experts(9.0, solver="dpmpp_2m")):
        check_fits(compiled, other)
        check_fits(compiled, iter([*other, Expert.sd15()]))


@pytest.mark.parametrize(
    ("sol", "lune", "message"),
    [
        (Expert.sol(), None, "calls lune, but the experts are sol"),
        (None, None, "calls sol and lune, but the experts are sd15"),
        (
            dataclasses.replace(Expert.sol(), path=VPPath.scaled_linear()),
            Expert.lune(),
            "another sol: its noise path is",
        ),
        (
            dataclasses.replace(Expert.sol(), prediction="epsilon"),
            Expert.lune(),
            "another sol: it predicts v_prediction there, and this sol predicts epsilon",
        ),
        (
            Expert.sol(),
            dataclasses.replace(Expert.lune(), prediction="sample"),
            "another lune: it predicts flow_prediction there, and this lune predicts sample",
        ),
        (
            Expert.sol(),
            dataclasses.replace(Expert.lune(), prediction="reversed_flow_prediction"),
            "another lune: it predicts flow_prediction there, and this lune predicts reversed",
        ),
    ],
)
def test_experts_that_would_misread_a_plan_are_named(sol, lune, message):
    compiled = plan(experts(2.0), Boundary("sol", "lune", 0.7), steps={"sol": 5, "lune": 4})
    given = [expert for expert in (sol, lune) if expert is not None] or [Expert.sd15()]
    with pytest.raises(ValueError, match=message):
        check_fits(compiled, given)
    older = dataclasses.replace(compiled, made_from=None)  # one that doesn't say: its rows do
    with pytest.raises(ValueError, match=r"another|calls"):
        check_fits(older, given)


@pytest.mark.parametrize("column", ["p", "q_cond_0", "q_uncond_0"])
def test_a_row_that_reads_something_else_is_found(column):
    compiled = plan(experts(2.0), Boundary("sol", "lune", 0.7), steps={"sol": 5, "lune": 4})
    for index, name in ((2, "sol"), (7, "lune")):
        step = compiled.steps[index]
        row = [value * 1.001 if of == column else value for of, value in zip(COLUMNS, step.row, strict=True)]
        steps = list(compiled.steps)
        steps[index] = dataclasses.replace(step, row=tuple(row))
        with pytest.raises(ValueError, match=f"another {name}: at step {index}"):
            check_fits(dataclasses.replace(compiled, steps=tuple(steps)), experts(2.0))


def answering(model) -> tuple[Expert, Expert]:
    return tuple(dataclasses.replace(expert, model=model, solver="ddim") for expert in experts(3.0))


def shifted(x, timestep, text):
    """A model whose answer depends on its text, and on whether it is guided by how many there are."""
    return 0.3 * x + text.view(-1, 1)


COND, UNCOND = {"text": torch.tensor([1.0, 2.0])}, {"text": torch.tensor([-0.5, 0.25])}


def run_of(callback=None) -> SamplingRun:
    chosen = answering(shifted)
    compiled = plan(chosen, Boundary("sol", "lune", 0.7), steps=6)
    noise = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    return SamplingRun(compiled, chosen, noise, cond=COND, uncond=UNCOND, callback=callback)


@pytest.mark.parametrize("scale", [8.0, 1.0])
def test_a_run_follows_another_guidance_from_within_and_between_steps(scale):
    def follow(run: SamplingRun) -> None:
        run.follow(with_guidance(run.plan, experts(3.0), scale, since=run.index))

    inside = run_of(lambda state: follow(state["run"]) if state["step"] == 2 else None)
    between = run_of()
    between.advance(3)
    follow(between)
    torch.testing.assert_close(inside.advance(), between.advance(), rtol=1e-5, atol=1e-5)
    assert (inside.x - run_of().advance()).abs().max() > 0.01


def test_a_run_can_be_told_something_else_on_the_way():
    other = {"text": torch.tensor([5.0, -4.0])}
    inside = run_of(lambda state: state["run"].tell(other, UNCOND) if state["step"] == 1 else None)
    between = run_of()
    between.advance(2)
    between.tell(other, UNCOND)
    torch.testing.assert_close(inside.advance(), between.advance(), rtol=1e-5, atol=1e-5)
    assert (inside.x - run_of().advance()).abs().max() > 0.1


def test_a_run_has_two_inputs_a_model_and_no_more():
    """One that is read and one that is written, however many steps: memory doesn't grow with a plan."""
    seen = []

    def model(x, timestep):
        seen.append(x.data_ptr())
        return 0.1 * x

    expert = Expert.lune(model)
    sample(plan(expert, steps=12), expert, torch.ones(1, 4))
    assert len(seen) == 12 and len(set(seen)) == 2
    assert all(one != other for one, other in itertools.pairwise(seen))


def test_a_run_needs_a_state_or_all_that_makes_one():
    expert = Expert.lune(lambda x, timestep: x)
    for given in ({}, dict(shape=(1, 4)), dict(seeds=[1])):
        with pytest.raises(ValueError, match="give either x, or shape and seeds"):
            sample(plan(expert, steps=2), expert, **given)


def test_a_printed_plan_says_what_the_plan_says():
    compiled = plan(
        (Expert.sol(guidance_scale=4.5), Expert.lune(guidance_scale=2.0, guidance_rescale=0.5)),
        Spans((("sol", 0.8), ("lune", 0.0))),
        steps={"sol": 3, "lune": 2},
    )
    title, header, *lines = str(compiled).splitlines()
    assert title == "5 steps, 10 model calls per sample"
    assert [re.split(r"\s{2,}", line.strip()) for line in (header, lines[0])] == [
        re.split(r"\|", "step|expert|timestep|noise|alpha|sigma|to noise|guidance|solver|fresh noise"),
        [
            "0",
            "sol",
            "999",
            *_numbers(compiled.steps[0]),
            "4.5",
            "ddpm",
            f"{compiled.steps[0].coefficients['n']:.4f}",
        ],
    ]
    for index, (line, step) in enumerate(zip(lines, compiled.steps, strict=True)):
        cells = re.split(r"\s{2,}", line.strip())
        assert cells[0] == str(index) and cells[1] == step.calls[0].name
        whole = isinstance(step.calls[0].timestep, int)  # what it is told; of a real number, what fits
        assert re.fullmatch(r"\d+" if whole else r"\d+\.\d\d", cells[2])
        assert float(cells[2]) == pytest.approx(step.calls[0].timestep, abs=0.005)
        assert cells[3:7] == _numbers(step)
        assert cells[7] == ("4.5" if step.calls[0].name == "sol" else "2 rescaled 0.5")
        assert cells[8] == step.solver
    mixed = plan(experts(1.0), Crossfade("sol", "lune", 0.9, 0.4), steps=9)
    shared = next(index for index, step in enumerate(mixed.steps) if len(step.calls) == 2)
    first, second = (f"{call.weight:.0%} {call.name}" for call in mixed.steps[shared].calls)
    assert f"{first} + {second}" in str(mixed).splitlines()[shared + 2]


def _numbers(step) -> list[str]:
    return [f"{x:.4f}" for x in (step.level.noise, step.level.alpha, step.level.sigma, step.target.noise)]


@pytest.mark.parametrize("given", ["state", "shape"])
@pytest.mark.parametrize("router", ROUTERS, ids=["boundary", "crossfade", "back"])
def test_a_run_stays_on_the_device_of_its_state(router, given):
    """torch's "meta" device has shapes only: who reads a number there, or mixes it with the host's, fails."""
    seen = []

    def model(x, timestep, text):
        seen.append((x.device.type, x.dtype, timestep.device.type, timestep.dtype, text.device.type))
        return x

    chosen = tuple(
        dataclasses.replace(expert, model=model, dtype=dtype)
        for expert, dtype in zip(experts(3.0), (torch.float16, torch.bfloat16), strict=True)
    )
    cond, uncond = ({name: text.to("meta") for name, text in each.items()} for each in (COND, UNCOND))
    state = (
        dict(x=torch.empty(2, 12, device="meta")) if given == "state" else dict(shape=(2, 12), device="meta")
    )
    compiled = plan(chosen, router, steps=9)
    run = SamplingRun(compiled, chosen, **state, seeds=[1, 2], cond=cond, uncond=uncond)
    assert run.advance().device.type == "meta" and run.done
    wanted = [
        ("meta", torch.float16, "meta", torch.int64, "meta")
        if call.name == "sol"
        else ("meta", torch.bfloat16, "meta", torch.float32, "meta")
        for step in compiled.steps
        for call in step.calls
    ]
    assert seen == wanted
