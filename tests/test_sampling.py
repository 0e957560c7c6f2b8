from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_sampler import Boundary, Crossfade, Expert, SamplingRun, plan, sample
from moe_sampler.sampling import initial_latents

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


class _Record(TorchDispatchMode):
    """Every operator torch is asked for; what happens inside one is its own business."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_step_is_the_model_and_one_launch_and_nothing_is_read_back():
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
    with _Record() as record:
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
        # From the first step on; planning and moving the table may copy.
        torch.cuda.set_sync_debug_mode("error")
        started.append(True)

    sample(compiled, experts, x, seeds=torch.tensor([1, 2], device="cuda"))  # compiles the kernels
    try:
        on_gpu = sample(compiled, experts, x, seeds=torch.tensor([1, 2], device="cuda"), callback=strict)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(started) == 8
    on_cpu = sample(compiled, experts, x.cpu(), seeds=[1, 2])
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-4, rtol=0)
