"""Steps that are recorded whole, a model's call with the launch that ends it, and replayed for others."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import pytest
import torch
from tape import Tape, captured
from torch import nn
from unets import unet
from waits import waits_are_errors

from moe_sampler import Boundary, Expert, SamplingRun, plan
from moe_sampler.architectures.captured_model import CapturedModel, Recordings
from moe_sampler.architectures.expert_model import ExpertModel
from moe_sampler.errors import NonFiniteError
from moe_sampler.sampling.calls import with_guidance
from moe_sampler.sampling.stretches import MovingTable, take_step

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE, SEEDS = (2, 4, 8, 8), [5, 6]
COND = {"prompt_embeds": torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))}
UNCOND = {"prompt_embeds": torch.zeros(2, 5, 12)}
CASES = {
    "noise of a Sol, memory of a Lune": {},
    "no guidance": {"guidance_scale": 1.0},
    "guidance that ends": {"guidance_window": (1.0, 0.6)},
    "two memories": {"solver": "dpmpp_3m"},
    "three memories of states and noise": {"solver": "unip_3"},
    "two rows a step": {"solver": "heun"},
    "features are reused near the data": {"reuse": ((0.5, 1), (0.0, 2))},
    "a scheduler of diffusers": {"solver": "euler_a"},
}


@pytest.fixture(scope="module")
def models():
    return {"sol": unet(1), "lune": unet(2)}


def on_gpu(told):
    return {name: tensor.cuda() for name, tensor in told.items()}


class Both:
    """One run with steps that are recorded, and the same one as usual."""

    def __init__(self, models, steps=8, **settings):
        self.recorders = {}
        self.plan, self.fast = self._experts(models, self._captured, steps, settings)
        _, self.plain = self._experts(models, ExpertModel, steps, settings)

    def _captured(self, model):
        fast, recorder = captured(model)
        name = "lune" if "sol" in self.recorders else "sol"
        self.recorders[name] = recorder
        return fast

    def _experts(self, models, wrap, steps, settings):
        settings = {"guidance_scale": 3.0, **settings}
        sol = Expert.sol(wrap(models["sol"]), **{k: v for k, v in settings.items() if k != "solver"})
        lune = Expert.lune(wrap(models["lune"]), **{"solver": "dpmpp_2m", **settings})
        return plan([sol, lune], Boundary("sol", "lune", 0.75), steps=steps), [sol, lune]

    def run(self, fast, **settings):
        experts = self.fast if fast else self.plain
        given = {"shape": SHAPE, "seeds": SEEDS, "cond": COND, "uncond": UNCOND, **settings}
        return SamplingRun(settings.pop("plan", self.plan), experts, **given)


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_every_step_is_the_same_to_the_last_bit(models, settings):
    both = Both(models, **settings)
    for _ in range(2):  # recorded, and from what was recorded
        fast, plain = both.run(True), both.run(False)
        for until in (3, len(both.plan)):
            assert torch.equal(fast.advance(until), plain.advance(until))
            assert (fast.x0 is None) == (plain.x0 is None)
            assert fast.x0 is None or torch.equal(fast.x0, plain.x0)
        fast.check()


def test_one_recording_serves_any_number_of_steps(models, monkeypatch):
    both = Both(models)
    both.run(True).advance()
    counts = {name: recorder.count for name, recorder in both.recorders.items()}
    assert counts == {"sol": 1, "lune": 1}
    longer = Both(models, steps=40).plan
    experts = both.fast
    monkeypatch.setattr(ExpertModel, "__call__", None)  # no Python of a model's runs again
    run = SamplingRun(longer, experts, shape=SHAPE, seeds=[8, 9], cond=COND, uncond=UNCOND)
    before = sum(recorder.replays for recorder in both.recorders.values())
    run.advance()
    assert {name: recorder.count for name, recorder in both.recorders.items()} == counts
    assert sum(recorder.replays for recorder in both.recorders.values()) - before == len(longer)


def seen_by(both, fast, callback, **settings):
    """What a callback is shown, and the end of the run."""
    shown = []

    def watch(info):
        shown.append((info["step"], info["x"].clone(), info["x0"].clone()))
        return callback(info)

    run = both.run(fast, callback=watch, **settings)
    run.advance()
    while not run.done:
        run.interrupted = False
        run.advance()
    return [*shown, (-1, run.x, run.x0)]


def put_noise(info):
    return info["x"] * 1.25 if info["step"] in (1, 5) else None


def change_guidance(info):
    if info["step"] == 3:
        run = info["run"]
        run.follow(with_guidance(run.plan, run._experts.values(), 1.0, since=run.index))


def change_text(info):
    if info["step"] in (1, 5):
        info["run"].tell({"prompt_embeds": COND["prompt_embeds"] * 2}, UNCOND)


def interrupt(info):
    info["run"].interrupted = info["step"] in (0, 4, 5)


CALLBACKS = [lambda info: None, put_noise, change_guidance, change_text, interrupt]


@pytest.mark.parametrize("callback", CALLBACKS, ids=["watches", "latents", "guidance", "text", "interrupts"])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m", "euler"])
def test_a_callback_sees_and_changes_what_it_would(models, callback, solver):
    both = Both(models, solver=solver)
    for fast, plain in zip(seen_by(both, True, callback), seen_by(both, False, callback), strict=True):
        assert fast[0] == plain[0]
        assert torch.equal(fast[1], plain[1]) and torch.equal(fast[2], plain[2])


def test_a_run_without_a_callback_is_interrupted_too(models, monkeypatch):
    both = Both(models)
    run, replay, replays = both.run(True), Tape.replay, []

    def interrupting(tape):
        replay(tape)
        replays.append(tape)
        run.interrupted = len(replays) == 4  # as another thread would

    monkeypatch.setattr(Tape, "replay", interrupting)
    run.advance()
    assert run.index == 4
    assert torch.equal(run.x, both.run(False).advance(4))


def test_a_model_that_a_callback_changes_counts_from_the_next_step_on(models):
    both = Both(models)
    model = models["lune"]
    bias = model.conv_in.bias

    def change(info):
        if info["step"] == 5:
            model.conv_in.bias = nn.Parameter(bias + 1)

    try:
        fast = seen_by(both, True, change)
        model.conv_in.bias = bias
        plain = seen_by(both, False, change)
    finally:
        model.conv_in.bias = bias
    assert torch.equal(fast[-1][1], plain[-1][1])


def test_runs_take_turns_without_touching_one_another(models):
    both = Both(models)
    runs = [both.run(True, seeds=seeds) for seeds in ([1, 2], [3, 4])]
    for until in (2, 5, len(both.plan)):
        for run in runs:
            run.advance(until)
    for run, seeds in zip(runs, ([1, 2], [3, 4]), strict=True):
        assert torch.equal(run.x, both.run(False, seeds=seeds).advance())


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m", "euler"])
def test_a_callback_may_run_others_of_the_same_experts(models, solver):
    both = Both(models, solver=solver)

    def another(fast):
        return both.run(fast, seeds=[8, 9], callback=lambda info: None).advance()

    def run_another(info):
        if info["step"] in (1, 5):
            assert torch.equal(another(True), another(False))

    for fast, plain in zip(
        seen_by(both, True, run_another), seen_by(both, False, lambda info: None), strict=True
    ):
        assert torch.equal(fast[1], plain[1]) and torch.equal(fast[2], plain[2])


@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler"])
def test_a_callback_that_asks_for_no_x0_is_shown_what_a_solver_remembers(models, solver):
    both, shown = Both(models, solver=solver), {True: [], False: []}

    def look(fast, info):
        shown[fast].append(None if info["x0"] is None else info["x0"].clone())

    for fast in shown:
        both.run(fast, callback=partial(look, fast), keep_x0=False).advance()
    remembered = [(a, b) for a, b in zip(*shown.values(), strict=True) if a is not None or b is not None]
    assert all(torch.equal(a, b) for a, b in remembered) and bool(remembered) == (solver == "dpmpp_2m")


def test_a_callback_is_told_of_the_step_that_leaves_no_finite_state(models):
    checked = []

    def check(info):
        info["run"].check()
        checked.append(info["step"])

    run = Both(models).run(True, callback=check)
    run.advance(3)
    run.x[0, 0, 0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="at step 3 "):
        run.advance()
    assert checked == [0, 1, 2]


def test_the_step_that_leaves_no_finite_state_is_named(models):
    both = Both(models)
    run = both.run(True)
    run.advance(3)
    run.x[0, 0, 0, 0] = torch.inf
    run.advance()
    with pytest.raises(NonFiniteError, match="at step 3 "):
        run.check()


@pytest.mark.gpu
def test_on_a_gpu_replayed_steps_never_wait_for_it(models):
    both = Both({name: copy.deepcopy(model).cuda() for name, model in models.items()})
    wrapped = {expert.name: CapturedModel(Recordings(expert.model.model)) for expert in both.plain}
    both.fast = [dataclasses.replace(expert, model=wrapped[expert.name]) for expert in both.plain]
    given = {"device": "cuda", "cond": on_gpu(COND), "uncond": on_gpu(UNCOND)}
    expected = both.run(False, **given).advance()
    recorded, replayed = both.run(True, **given), both.run(True, **given)
    for run in (recorded, replayed):
        run.advance(1)  # the plan's table goes to the device
    recorded.advance()
    with waits_are_errors():
        replayed.advance()
    torch.testing.assert_close(replayed.x, expected, rtol=0, atol=1e-4)


def test_a_model_may_return_its_input():
    lune = Expert.lune(lambda sample, timestep: sample)
    made = plan(lune, steps=3)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    expected = SamplingRun(made, lune, x).advance()
    moving, state, model_input = MovingTable(made, made.table("cpu")), x.clone(), x.clone()
    told, own = torch.tensor(float(made.steps[0].calls[0].timestep)), moving.at(0)
    for step in range(3):
        given = {"conditioning": {}, "memories": [], "turns": False, "x0": None, "seeds": None}
        take_step(
            lambda sample, timestep: sample, x=state, model_input=model_input, timestep=told, **given, **own
        )
        assert told == moving.timesteps[step + 1]
    assert torch.equal(state, expected)
