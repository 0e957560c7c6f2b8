from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from moe_sampler import Boundary, Crossfade, Expert, SamplingRun, noised, plan, sample
from moe_sampler.kernels import philox_normal
from moe_sampler.sampling.initial import initial_latents

SHAPE = (4, 5, 7)


def stochastic_duo(mixture, **settings) -> tuple[Expert, Expert]:
    return (
        mixture.give_model(Expert.sol(**settings)),
        mixture.give_model(Expert.lune(solver="ddim", eta=0.7, **settings)),
    )


def run(experts, router, seeds, **settings) -> torch.Tensor:
    return sample(
        plan(experts, router, steps=12), experts, shape=(len(seeds), *SHAPE), seeds=seeds, **settings
    )


@pytest.mark.parametrize("router", [Boundary("sol", "lune", 0.7), Crossfade("sol", "lune", 0.8, 0.5)])
def test_same_seed_same_image_alone_and_in_any_batch(mixture, router):
    experts = stochastic_duo(mixture)
    batch = run(experts, router, [3, 7, 3, 2**63 + 5, -1])
    for index, seed in enumerate([3, 7, 3, 2**63 + 5, -1]):
        assert torch.equal(run(experts, router, [seed])[0], batch[index])
    assert not torch.equal(batch[0], batch[1])


def test_guidance_in_the_table_is_guidance_by_hand(mixture):
    """uncond + g (cond - uncond), each expert with its own scale, also where they are mixed."""
    scales = {"sol": 2.5, "lune": 1.75}

    def shifted(expert: Expert):
        def model(x, timestep, target):
            # Conditioning that acts: the exact prediction of a translated mixture.
            level = expert.path.level(timestep.item())
            target = target.view(-1, 1, 1, 1)
            return mixture.predict(expert.prediction, x - level.alpha * target, level) - (
                level.sigma * target if expert.prediction == "v_prediction" else target
            )

        return model

    def by_hand(model, scale):
        def guided(x, timestep, target):
            cond, uncond = model(x, timestep, target), model(x, timestep, torch.zeros_like(target))
            return uncond + scale * (cond - uncond)

        return guided

    presets = (Expert.sol(solver="ddim"), Expert.lune())
    folded = [dataclasses.replace(e, model=shifted(e), guidance_scale=scales[e.name]) for e in presets]
    manual = [dataclasses.replace(e, model=by_hand(shifted(e), scales[e.name])) for e in presets]
    router = Crossfade("sol", "lune", 0.8, 0.5)
    cond, uncond = {"target": torch.tensor([0.5, -0.3])}, {"target": torch.zeros(2)}
    expected = run(manual, router, [1, 2], cond=cond)
    torch.testing.assert_close(
        run(folded, router, [1, 2], cond=cond, uncond=uncond), expected, atol=2e-5, rtol=0
    )
    assert not torch.allclose(expected, run(manual, router, [1, 2], cond=uncond), atol=0.05)


def test_unguided_experts_get_one_copy_and_guided_ones_two():
    seen: list[tuple[str, int, float]] = []

    def spy(name):
        def model(x, timestep, c):
            seen.append((name, x.shape[0], c.flatten()[0].item()))
            assert c.shape[0] == x.shape[0]
            return torch.zeros_like(x)

        return model

    experts = (Expert.sol(spy("sol"), guidance_scale=4.0), Expert.lune(spy("lune")))
    compiled = plan(experts, Boundary("sol", "lune", 0.7), steps={"sol": 2, "lune": 2})
    cond, uncond = {"c": torch.ones(3, 1)}, {"c": torch.zeros(3, 1)}
    sample(compiled, experts, shape=(3, 2, 2), seeds=[1, 2, 3], cond=cond, uncond=uncond)
    assert seen == [("sol", 6, 0.0)] * 2 + [("lune", 3, 1.0)] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_state_stays_float32_whatever_the_model_eats(mixture, dtype):
    router = Boundary("sol", "lune", 0.7)
    seen = set()

    def cast(expert):
        def model(x, timestep):
            seen.add(x.dtype)
            return expert.model(x.float(), timestep).to(dtype)

        return dataclasses.replace(expert, model=model, dtype=dtype)

    experts = stochastic_duo(mixture)
    exact, low = run(experts, router, [5]), run([cast(e) for e in experts], router, [5])
    assert seen == {dtype} and low.dtype == torch.float32
    assert 0 < (exact - low).abs().mean() < 0.02


def test_a_model_may_return_its_input(mixture):
    experts = (Expert.lune(lambda x, t: x),)
    compiled = plan(experts, steps=6)
    x = initial_latents(compiled, (2, *SHAPE), [1, 2])
    expected = x.clone()
    for step in compiled.steps:
        expected = expected * (1 - (step.level.noise - step.target.noise))
    torch.testing.assert_close(sample(compiled, experts, x), expected)
    assert torch.equal(x, initial_latents(compiled, (2, *SHAPE), [1, 2]))  # the caller's tensor is left alone


def test_outputs_may_be_tensors_tuples_or_diffusers_outputs():
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    wrappers = (lambda o: o, lambda o: (o,), lambda o: UNet2DConditionOutput(sample=o))
    results = []
    for wrap in wrappers:
        expert = Expert.lune(lambda x, t, wrap=wrap: wrap(0.5 * x))
        results.append(sample(plan(expert, steps=3), expert, shape=(1, 4), seeds=[0]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_callback_sees_every_step_and_may_replace_the_state(mixture):
    experts = stochastic_duo(mixture)
    router = Boundary("sol", "lune", 0.7)
    steps, previews = [], []

    def watch(info):
        steps.append((info["step"], info["plan_step"].calls[0].name))
        previews.append(info["x0"].clone())

    result = run(experts, router, [5], callback=watch)
    assert [index for index, _ in steps] == list(range(12)) and {name for _, name in steps} == {"sol", "lune"}
    torch.testing.assert_close(previews[-1], result)

    frozen = torch.full((1, *SHAPE), 0.25)
    inputs = []
    lune = Expert.lune(lambda x, t: inputs.append(x.clone()) or torch.zeros_like(x))
    replaced = sample(plan(lune, steps=3), lune, shape=(1, *SHAPE), seeds=[5], callback=lambda info: frozen)
    assert torch.equal(replaced, frozen) and torch.equal(inputs[1], frozen) and torch.equal(inputs[2], frozen)


def test_a_callback_that_leaves_x0_alone_changes_no_bit(mixture):
    """The prediction is there only where a multistep solver needs it, so Sol's steps don't notice Lune's."""
    sol, lune = stochastic_duo(mixture)
    for solver in (lune.solver, "dpmpp_2m"):
        experts = (sol, dataclasses.replace(lune, solver=solver))
        compiled, kept = plan(experts, Boundary("sol", "lune", 0.7), steps=12), []

        def watch(info, kept=kept):
            if info["x0"] is not None:
                kept.append(info["plan_step"].calls[0].name)

        start = dict(shape=(1, *SHAPE), seeds=[5])
        watched = SamplingRun(compiled, experts, **start, callback=watch, keep_x0=False).advance()
        assert torch.equal(watched, sample(compiled, experts, **start))
        assert kept.count("sol") <= 1 and ("lune" in kept) == (solver == "dpmpp_2m")


def test_injected_noise_is_asked_for_only_where_the_plan_adds_noise(mixture):
    expert = mixture.give_model(Expert.lune())
    compiled = plan(expert, steps=4)

    def noise(step):
        pytest.fail("an Euler step needs no noise")

    sample(compiled, expert, torch.zeros(1, *SHAPE), noise=noise)
    sol = mixture.give_model(Expert.sol())
    asked = []
    sample(
        plan(sol, steps=4),
        sol,
        torch.zeros(1, *SHAPE),
        noise=lambda i: asked.append(i) or torch.zeros(1, *SHAPE),
    )
    assert asked == [0, 1, 2]  # the last step lands on the data


def test_errors_come_before_any_model_call():
    def model(x, timestep, **_):
        pytest.fail("called a model")

    sol, lune = Expert.sol(model), Expert.lune(model, guidance_scale=2.0)
    hybrid = plan((sol, lune), Boundary("sol", "lune", 0.7), steps=6)
    x, seeds = torch.zeros(2, 4), [1, 2]
    ok = {"c": torch.zeros(2, 1)}
    for message, call in {
        "expert 'lune'": lambda: sample(hybrid, [sol], x),
        "expert 'sol'": lambda: sample(hybrid, [Expert.sol(), lune], x),
        "x, or shape and seeds": lambda: sample(hybrid, [sol, lune]),
        "as many seeds": lambda: sample(hybrid, [sol, lune], x, seeds=[1], cond=ok, uncond=ok),
        "give seeds": lambda: sample(hybrid, [sol, lune], x, cond=ok, uncond=ok),
        "give `uncond`": lambda: sample(hybrid, [sol, lune], x, seeds=seeds, cond=ok),
        "same keys": lambda: sample(hybrid, [sol, lune], x, seeds=seeds, cond=ok, uncond={"d": x}),
        "has batch 3": lambda: sample(
            hybrid, [sol, lune], x, seeds=seeds, cond={"c": torch.zeros(3, 1)}, uncond=ok
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="float32"):
        sample(hybrid, [sol, lune], x.half(), seeds=seeds, cond=ok, uncond=ok)


def conditioned(mixture, expert: Expert) -> Expert:
    """Conditioning that acts: the exact prediction of the mixture moved by `target`, [B, 1]."""

    def model(x, timestep, target):
        level = expert.path.level(timestep.item())
        target = target.view(-1, *[1] * (x.ndim - 1))
        x0 = mixture.x0(x - level.alpha * target, level.alpha, level.sigma).float() + target
        epsilon = (x - level.alpha * x0) / level.sigma
        return level.alpha * epsilon - level.sigma * x0 if expert.path.discrete else epsilon - x0

    return dataclasses.replace(expert, model=model)


def test_each_expert_may_have_conditioning_of_its_own(mixture):
    seen = []

    def spy(name):
        def model(x, timestep, **conditioning):
            seen.append((name, {key: value.flatten().tolist() for key, value in conditioning.items()}))
            return torch.zeros_like(x)

        return model

    experts = (Expert.sol(spy("sol"), guidance_scale=4.0), Expert.lune(spy("lune")))
    compiled = plan(experts, Boundary("sol", "lune", 0.7), steps={"sol": 1, "lune": 1})
    shape, one, two = (1, 2, 2), torch.ones(1, 1), torch.full((1, 1), 2.0)
    arguments = dict(shape=shape, seeds=[0])
    cond = {"sol": {"layout": one}, "lune": {"texture": two}}
    sample(compiled, experts, **arguments, cond=cond, uncond={"sol": {"layout": 0 * one}})
    assert seen == [("sol", {"layout": [0.0, 1.0]}), ("lune", {"texture": [2.0]})]
    seen.clear()
    sample(compiled, experts, **arguments, cond={"c": one}, uncond={"sol": {"c": two}, "lune": {}})
    assert seen == [("sol", {"c": [2.0, 1.0]}), ("lune", {"c": [1.0]})]
    seen.clear()
    sample(compiled, experts, **arguments, cond={"sol": {}, "lune": {"c": one}}, uncond={"sol": {}})
    assert seen == [("sol", {}), ("lune", {"c": [1.0]})]

    for message, wrong in {
        "names 'luna'": dict(cond={"luna": {}}, uncond={}),
        "nothing for expert 'lune'": dict(cond={"sol": {"c": one}}, uncond={"c": one}),
        "uncond has nothing for expert 'sol'": dict(cond={"c": one}, uncond={"lune": {"c": one}}),
        "mixes tensors and mappings": dict(cond={"sol": {"c": one}, "c": one}, uncond={}),
        "same keys": dict(cond=cond, uncond={"c": one}),
        "one shape": dict(cond={"c": one}, uncond={"c": torch.ones(1, 2)}),
        "has batch 2": dict(cond={"c": one}, uncond={"sol": {"c": torch.ones(2, 1)}}),
    }.items():
        with pytest.raises(ValueError, match=message):
            SamplingRun(compiled, experts, **arguments, **wrong)


def test_negative_conditioning_of_one_expert_leaves_the_other_alone(mixture):
    experts = [
        dataclasses.replace(conditioned(mixture, e), guidance_scale=2.0)
        for e in (Expert.sol(solver="ddim"), Expert.lune())
    ]
    target, none, other = (torch.full((1, 1), value) for value in (0.4, 0.0, -0.6))
    states = {}
    for name, (sol, lune) in {"same": (none, none), "lune": (none, other), "sol": (other, none)}.items():
        uncond = {"sol": {"target": sol}, "lune": {"target": lune}}
        compiled = plan(experts, Boundary("sol", "lune", 0.7), steps=8)
        handoff = next(i for i, step in enumerate(compiled.steps) if step.calls[0].name == "lune")
        going = SamplingRun(
            compiled, experts, shape=(1, *SHAPE), seeds=[4], cond={"target": target}, uncond=uncond
        )
        states[name] = going.advance(handoff).clone(), going.advance().clone()
    assert torch.equal(states["lune"][0], states["same"][0])
    assert not torch.allclose(states["lune"][1], states["same"][1], atol=0.05)
    assert not torch.allclose(states["sol"][0], states["same"][0], atol=0.05)


def test_a_guidance_window_spares_calls_and_acts_inside_only(mixture):
    calls = []

    def counted(expert):
        model = expert.model

        def count(x, timestep, target):
            calls.append((timestep.item() / 1000, x.shape[0]))
            return model(x, timestep, target)

        return dataclasses.replace(expert, model=count)

    lune = dataclasses.replace(conditioned(mixture, Expert.lune()), guidance_scale=3.0)
    windowed = counted(dataclasses.replace(lune, guidance_window=(0.85, 0.4)))
    cond, uncond = {"target": torch.full((2, 1), 0.4)}, {"target": torch.zeros(2, 1)}
    result = run([windowed], None, [1, 2], cond=cond, uncond=uncond)
    assert {(0.4 <= s <= 0.85, batch) for s, batch in calls} == {(True, 4), (False, 2)}

    def by_hand(x, timestep, target):
        inside = 0.4 <= timestep.item() / 1000 <= 0.85
        cond, uncond = lune.model(x, timestep, target), lune.model(x, timestep, 0 * target)
        return uncond + 3.0 * (cond - uncond) if inside else cond

    manual = dataclasses.replace(lune, model=by_hand, guidance_scale=1.0)
    torch.testing.assert_close(result, run([manual], None, [1, 2], cond=cond), atol=2e-5, rtol=0)


@pytest.mark.parametrize("router", [Boundary("sol", "lune", 0.7), Crossfade("sol", "lune", 0.8, 0.5)])
def test_guidance_rescale_is_by_expert_and_sample(mixture, router):
    """Against diffusers' own function, between a model and an unguided step."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    presets = (Expert.sol(solver="ddim"), Expert.lune())
    experts = [conditioned(mixture, e) for e in presets]
    rescales = {"sol": 0.7, "lune": 0.0}

    def by_hand(expert):
        def model(x, timestep, target):
            cond, uncond = expert.model(x, timestep, target), expert.model(x, timestep, 0 * target)
            guided = uncond + 4.0 * (cond - uncond)
            return rescale_noise_cfg(guided, cond, rescales[expert.name]) if rescales[expert.name] else guided

        return dataclasses.replace(expert, model=model)

    cond, uncond = {"target": torch.tensor([[0.5], [-0.3]])}, {"target": torch.zeros(2, 1)}
    expected = run([by_hand(e) for e in experts], router, [1, 2], cond=cond)
    ours = [dataclasses.replace(e, guidance_scale=4.0, guidance_rescale=rescales[e.name]) for e in experts]
    mine = run(ours, router, [1, 2], cond=cond, uncond=uncond)
    torch.testing.assert_close(mine, expected, atol=5e-5, rtol=0)
    plain = [dataclasses.replace(e, guidance_scale=4.0) for e in experts]
    assert not torch.allclose(mine, run(plain, router, [1, 2], cond=cond, uncond=uncond), atol=0.05)


def test_a_rescaled_sample_is_the_same_alone_and_in_any_batch(mixture):
    """Its standard deviation is its own, added up in the same order whatever else is there."""
    expert = dataclasses.replace(
        Expert.lune(lambda x, t, c: torch.tanh(x) + c.view(-1, 1, 1)),
        guidance_scale=3.0,
        guidance_rescale=0.7,
    )
    compiled = plan(expert, steps=3)

    def made(seeds):
        c = torch.ones(len(seeds), 1)
        shape = (len(seeds), 50, 333)
        return sample(compiled, expert, shape=shape, seeds=seeds, cond={"c": c}, uncond={"c": 0.5 * c})

    batch = made([3, 7, 9])
    for index, seed in enumerate([3, 7, 9]):
        assert torch.equal(made([seed])[0], batch[index])


@pytest.mark.parametrize("elements", [1, 24, 100, 1 << 18])
def test_noise_drawn_ahead_is_every_steps_own(monkeypatch, elements):
    """However much is drawn together, and where only some of the steps add noise."""
    monkeypatch.setattr("moe_sampler.sampling.inputs.NoiseAhead._ELEMENTS", elements)
    experts = [Expert.sol(lambda x, t: torch.tanh(x)), Expert.lune(lambda x, t: torch.tanh(x))]
    fade = Crossfade("lune", "sol", 0.8, 0.5)
    compiled = plan(experts, fade, steps=12)
    shape, seeds = (2, *SHAPE), [4, 9]
    assert 2 < sum(step.adds_noise for step in compiled.steps) < 12
    own = sample(
        compiled,
        experts,
        initial_latents(compiled, shape, seeds),
        noise=lambda step: philox_normal(shape, seeds, step),
    )
    run = SamplingRun(compiled, experts, shape=shape, seeds=seeds)
    for until in range(3, 13, 3):  # and however the run pauses
        run.advance(until)
    assert torch.equal(run.x, own)


def test_a_constant_prediction_is_not_rescaled():
    expert = Expert.lune(lambda x, t: torch.zeros_like(x), guidance_scale=3.0, guidance_rescale=1.0)
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(plan(expert, steps=2), expert, x, uncond={}), x)


@pytest.mark.parametrize("start", [1.0, 0.8, 0.4])
def test_an_image_noised_and_denoised_keeps_its_distribution(start):
    """Data N(0.8, 0.6^2), exact denoisers: what comes out is distributed as what went in, at any level."""
    std, mean = 0.6, 0.8

    def exact(expert):
        def model(x, timestep):
            level = expert.path.level(timestep.item())
            gain = level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2)
            return mean + gain * (x - level.alpha * mean)

        return dataclasses.replace(expert, model=model, prediction="sample")

    experts = [exact(Expert.sol(solver="heun")), exact(Expert.lune(solver="heun"))]
    compiled = plan(experts, Boundary("sol", "lune", 0.7), steps=20, start=start)
    assert compiled.steps[0].calls[0].name == ("sol" if start > 0.7 else "lune")
    x0 = mean + std * torch.randn(4, 20000, generator=torch.Generator().manual_seed(5))
    state = noised(compiled, x0, seeds=[1, 2, 3, 4])
    level = compiled.start_level
    assert level.noise == pytest.approx(start, abs=0.01)
    assert state.mean().item() == pytest.approx(level.alpha * mean, abs=0.02)
    assert state.var().item() == pytest.approx(level.alpha**2 * std**2 + level.sigma**2, rel=0.02)
    result = sample(compiled, experts, state)
    assert result.mean().item() == pytest.approx(mean, abs=0.01)
    assert result.std().item() == pytest.approx(std, abs=0.01)
    # The less noise, the more of the image is left: the exact correlation of x0 with its state.
    kept = level.alpha * std / (level.alpha**2 * std**2 + level.sigma**2) ** 0.5
    found = torch.corrcoef(torch.stack([x0.flatten(), result.flatten()]))[0, 1].item()
    assert found == pytest.approx(kept, abs=0.01)


def test_noise_for_an_image_is_the_noise_of_its_seed():
    x0, whole, late = torch.ones(2, 3), plan(Expert.lune(), steps=4), plan(Expert.lune(), steps=4, start=0.6)
    assert torch.equal(noised(whole, x0, seeds=[1, 2]), initial_latents(whole, (2, 3), [1, 2]))
    noise = initial_latents(whole, (2, 3), [1, 2])
    expected = 0.4 * x0 + 0.6 * noise
    torch.testing.assert_close(noised(late, x0, seeds=[1, 2]), expected)
    assert torch.equal(noised(late, x0, seeds=[1, 2]), noised(late, x0, noise=noise))
    assert torch.equal(noised(late, x0, seeds=[1, 2])[1:], noised(late, x0[1:], seeds=[2]))
    for wrong, message in (
        ({}, "either seeds or noise"),
        ({"seeds": [1, 2], "noise": noise}, "either seeds or noise"),
        ({"seeds": [1]}, "as many seeds"),
        ({"noise": noise[:1]}, "noise must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            noised(late, x0, **wrong)
    with pytest.raises(TypeError, match="float32"):
        noised(late, x0.half(), seeds=[1, 2])


def low_precision(expert: Expert, dtype: torch.dtype) -> Expert:
    def model(x, timestep):
        return expert.model(x.float(), timestep).to(dtype)

    return dataclasses.replace(expert, model=model, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("router", [Boundary("sol", "lune", 0.7), Crossfade("sol", "lune", 0.8, 0.5)])
def test_a_run_may_pause_between_any_two_steps(mixture, router, dtype):
    """Batches side by side, each advanced in turn: to the last bit what they are uninterrupted."""
    experts = (Expert.sol(), Expert.lune(solver="dpmpp_2m"))
    experts = [low_precision(mixture.give_model(e), dtype) for e in experts]
    compiled = plan(experts, router, steps=12)
    batches = {seed: SamplingRun(compiled, experts, shape=(2, *SHAPE), seeds=[seed, 9]) for seed in (1, 2)}
    for until in (0, 1, 5, 5, 9, 12):
        for paused in batches.values():
            assert paused.advance(until) is paused.x and paused.index == until
    for seed, finished in batches.items():
        assert finished.done and torch.equal(finished.x, run(experts, router, [seed, 9]))
        for wrong in (11, 13, 2.0, True):
            with pytest.raises(ValueError, match="at step 12 of 12"):
                finished.advance(wrong)


def test_a_queued_run_is_checked_and_costs_its_state_only(mixture):
    sol = mixture.give_model(Expert.sol())
    queued = SamplingRun(plan(sol, steps=4), sol, shape=(1, *SHAPE), seeds=[1])
    held = {name for name, value in vars(queued).items() if isinstance(value, torch.Tensor)}
    assert held == {"x"} and queued.x0 is None and queued.index == 0


def test_an_interrupted_run_calls_no_more_models_and_goes_on_where_it_stopped(mixture):
    experts = stochastic_duo(mixture)
    compiled = plan(experts, Boundary("sol", "lune", 0.7), steps=12)
    seen = []

    def stop(info):
        seen.append(info["step"])
        info["run"].interrupted = info["step"] == 4

    stopped = SamplingRun(compiled, experts, shape=(1, *SHAPE), seeds=[3], callback=stop)
    state = stopped.advance().clone()
    assert seen == [0, 1, 2, 3, 4] and stopped.index == 5 and not stopped.done
    assert torch.equal(stopped.advance(), state) and len(seen) == 5
    whole = {}
    run(
        experts,
        Boundary("sol", "lune", 0.7),
        [3],
        callback=lambda i: whole.update({i["step"]: i["x"].clone()}),
    )
    assert torch.equal(state, whole[4])
    stopped.interrupted = False
    assert torch.equal(stopped.advance(), whole[11])


def test_a_callbacks_state_must_have_the_states_shape(mixture):
    lune = mixture.give_model(Expert.lune())
    with pytest.raises(ValueError, match="a callback's state"):
        sample(plan(lune, steps=2), lune, shape=(2, 4), seeds=[0, 1], callback=lambda info: torch.zeros(4))


def test_a_step_is_the_model_and_one_launch_and_nothing_is_read_back(recorded):
    """Two guided experts, mixed, with fresh noise: still one operator a step beside the models'."""

    def model(x, timestep, c):
        return torch.tanh(x)

    experts = [
        dataclasses.replace(preset(model), guidance_scale=2.0, solver="ddpm")
        for preset in (Expert.sol, Expert.lune)
    ]
    compiled = plan(experts, lambda s: {"sol": 0.5, "lune": 0.5}, steps=6)
    cond = {"c": torch.zeros(2, 1)}
    marks: list[int] = []
    with recorded() as record:
        sample(
            compiled,
            experts,
            shape=(2, *SHAPE),
            seeds=[1, 2],
            cond=cond,
            uncond=cond,
            callback=lambda info: marks.append(len(record.names)),
        )
    for begin, end in itertools.pairwise(marks[1:]):  # by then every buffer is there
        assert record.names[begin:end] == ["aten::tanh", "aten::tanh", "moe_sampler::sampler_step_"]
    assert not {"aten::_local_scalar_dense", "aten::nonzero"} & set(record.names[marks[0] :])


def test_a_rescale_reads_nothing_back_either(recorded):
    expert = Expert.lune(
        lambda x, timestep, c: torch.tanh(x) + c.view(-1, 1, 1, 1), guidance_scale=3.0, guidance_rescale=0.7
    )
    marks: list[int] = []
    with recorded() as record:
        sample(
            plan(expert, steps=4),
            expert,
            shape=(2, *SHAPE),
            seeds=[1, 2],
            cond={"c": torch.ones(2, 1)},
            uncond={"c": torch.zeros(2, 1)},
            callback=lambda info: marks.append(len(record.names)),
        )
    assert "aten::std.correction" in record.names[marks[0] : marks[1]]
    assert not {"aten::_local_scalar_dense", "aten::nonzero"} & set(record.names[marks[0] :])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_loop_never_waits_for_the_device():
    def model(x, timestep):
        return torch.tanh(x) + timestep * 0

    experts = (Expert.sol(model), Expert.lune(model))
    compiled = plan(experts, Crossfade("sol", "lune", 0.8, 0.5), steps=8)
    x = initial_latents(compiled, (2, *SHAPE), [1, 2], "cuda")
    started: list[bool] = []

    def strict(info):
        # From the first step on; planning and moving the table may copy. After the last one a run reads its
        # flag of what wasn't finite.
        last = info["step"] == len(compiled) - 1
        torch.cuda.set_sync_debug_mode("default" if last else "error")
        started.append(True)

    sample(compiled, experts, x, seeds=torch.tensor([1, 2], device="cuda"))  # compiles the kernels
    try:
        on_gpu = sample(compiled, experts, x, seeds=torch.tensor([1, 2], device="cuda"), callback=strict)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(started) == 8
    on_cpu = sample(compiled, experts, x.cpu(), seeds=[1, 2])
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-4, rtol=0)
