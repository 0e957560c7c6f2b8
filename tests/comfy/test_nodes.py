"""The nodes' own logic, over stand-ins of ComfyUI, against this package's sampling and exact experts."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import stand_ins
import torch
from stand_ins import CONST, EPS, IMG_TO_IMG, V_PREDICTION, LatentFormat, Model, sampling_of

from moe_sampler import Boundary, Crossfade, Expert, FlowPath, Spans, VPPath, noised, plan, sample
from moe_sampler.sampling.paths import Level

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def comfyui(monkeypatch):
    for name, module in stand_ins.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    for record in (stand_ins.CFGGuider.opened, stand_ins.resident, stand_ins.shown):
        record.clear()
    monkeypatch.setattr(stand_ins, "interrupted", False)


def linear_sampling(kind: type = V_PREDICTION):
    """Sol's: ComfyUI's class with other betas."""
    made = sampling_of(stand_ins.ModelSamplingDiscrete, kind)
    path = VPPath.linear()
    made.set_sigmas(torch.from_numpy(path.sigmas / path.alphas))
    return made


def flow_sampling(shift: float = 2.0, multiplier: float = 1000.0):
    made = sampling_of(stand_ins.ModelSamplingDiscreteFlow, CONST)
    made.set_parameters(shift, multiplier)
    return made


@pytest.fixture
def believes(gentle_mixture):
    return lambda x, alpha, sigma: gentle_mixture.x0(x, alpha, sigma).float()


@pytest.fixture
def sol(believes):
    return Model(believes, linear_sampling())


@pytest.fixture
def lune(believes):
    return Model(believes, flow_sampling())


def setup(name, model, **settings):
    from moe_sampler.comfy.setups import ExpertSetup

    return ExpertSetup(name, model, **{"positive": 1.0, "negative": 0.8, **settings})


def run_of(setups, router=None, **settings):
    from moe_sampler.comfy.setups import RouterSetup, planned

    return planned(setups, None if router is None else RouterSetup(**router), **{"steps": 8, **settings})


def sampled(planned, latent, seed=3, own_noise=True):
    from moe_sampler.comfy.latents import sampled

    return sampled(planned, latent, seed, own_noise)


def empty(batch: int = 2):
    return {"samples": torch.zeros(batch, 4, 4, 4)}


def independent(mixture, experts, router, seeds, *, x=None, shown=1.0, hidden=0.8, **settings):
    """What this package's own sampling makes of experts that predict what they were trained on, guided by the
    row instead of by ComfyUI."""

    def with_model(expert):
        def model(x, timestep, share):
            level = expert.path.level(float(timestep))
            x0 = mixture.x0(x, level.alpha, level.sigma) * share
            epsilon = (x.double() - level.alpha * x0) / level.sigma
            made = {"v_prediction": level.alpha * epsilon - level.sigma * x0, "flow_prediction": epsilon - x0}
            return made[expert.prediction].float()

        return dataclasses.replace(expert, model=model)

    compiled = plan(experts, router, **settings)

    def told(share):
        return {"share": torch.full((len(seeds), 1, 1, 1), share)}

    shape = None if x is not None else (len(seeds), 4, 4, 4)
    state = x if x is None else noised(compiled, x, seeds=seeds)
    given = {"cond": told(shown), "uncond": told(hidden), "seeds": seeds}
    return compiled, sample(compiled, [with_model(e) for e in experts], state, shape=shape, **given)


def same(made, expected):
    torch.testing.assert_close(made, expected, rtol=2e-4, atol=2e-4)


# How models were trained


def test_named_schedules_are_read_exactly():
    from moe_sampler.comfy.levels import ModelLevels

    own = ModelLevels.of(sampling_of(stand_ins.ModelSamplingDiscrete, EPS))
    assert own.path == VPPath.scaled_linear()
    assert ModelLevels.of(linear_sampling()).path == VPPath.linear()


def test_any_table_of_sigmas_makes_a_path():
    """EDM's and zero-SNR's, and one that ends in a row of equal sigmas."""
    from moe_sampler.comfy.levels import ModelLevels

    made = sampling_of(stand_ins.ModelSamplingDiscrete, V_PREDICTION)
    edm = torch.linspace(-6.2, 4.8, 1000, dtype=torch.float64).exp()
    for sigmas in (
        edm,
        torch.cat([edm[:-3], edm[-3].expand(4)]),
        torch.cat([edm[:-1], torch.tensor([4518.0])]),
    ):
        made.set_sigmas(sigmas)
        levels = ModelLevels.of(made)
        kept = sigmas.float().unique()
        assert levels.path.num_train_timesteps == len(kept)
        for timestep in (0, 500, len(kept) - 1):
            sigma = levels.sigma(torch.tensor(timestep))
            torch.testing.assert_close(sigma, kept[timestep], rtol=1e-6, atol=0.0)
            noise = levels.path.level(timestep).noise
            assert noise == pytest.approx(float(sigma / (1 + sigma)), rel=1e-6)
            assert levels.sigma_at(noise) == pytest.approx(float(sigma), rel=1e-5)
            assert levels.noise_at(float(sigma)) == pytest.approx(noise, rel=1e-6)
    # Between timesteps sigma is interpolated in its logarithm, as the path does it.
    between = levels.path.level(500.25).noise
    assert levels.noise_at(float(levels.sigma(torch.tensor(500.25)))) == pytest.approx(between, rel=1e-6)
    for beyond in (1.0, 0.9999):  # sigma would be 9999
        assert levels.sigma_at(beyond) == pytest.approx(4518.0)


@pytest.mark.parametrize("k", [1.0, 2.0, 3.1582, 8.0])
def test_a_flow_models_shift_is_read_whatever_it_is_called(k):
    from moe_sampler.comfy.levels import ModelLevels

    flux = sampling_of(stand_ins.ModelSamplingFlux, CONST, float(torch.tensor(k, dtype=torch.float64).log()))
    assert ModelLevels.of(flux).shift == pytest.approx(k, rel=1e-4)
    assert ModelLevels.of(flux).path == FlowPath(1.0)
    levels = ModelLevels.of(flow_sampling(k))
    assert levels.shift == pytest.approx(k, rel=1e-4)
    assert levels.path == FlowPath(1000.0)
    assert levels.sigma(torch.tensor(250.0)) == 0.25
    assert levels.sigma_at(0.3) == levels.noise_at(0.3) == 0.3


def test_a_model_without_noise_levels_is_refused():
    from moe_sampler.comfy.levels import ModelLevels

    with pytest.raises(ValueError, match="no noise levels"):
        ModelLevels.of(sampling_of(stand_ins.ModelSamplingDiscrete, IMG_TO_IMG))
    made = linear_sampling()
    made.set_sigmas(torch.zeros(10))
    with pytest.raises(ValueError, match="positive and finite"):
        ModelLevels.of(made)


# What the nodes hand to each other


def test_an_experts_settings_are_the_planners(sol, lune):
    own = setup("sol", sol, solver="ddim", eta=0.5, guidance=4.0, guidance_window=(0.9, 0.2)).expert()
    expected = Expert("sol", VPPath.linear(), "sample", solver="ddim", eta=0.5, shift=1.0, guidance_scale=4.0)
    assert own == dataclasses.replace(expected, guidance_window=(0.9, 0.2))
    assert setup("lune", lune).expert().shift == 2.0
    assert setup("lune", lune, shift=5.0).expert().shift == 5.0
    assert setup("lune", lune).expert().guidance_window is None
    assert setup("lune", lune).expert().levels is None
    assert setup("lune", lune, spacing="beta").expert().levels == "beta"


def test_routers():
    from moe_sampler.comfy.setups import RouterSetup

    two = ["a", "b"]
    assert RouterSetup("handoff", at=0.6).router(two) == Boundary("a", "b", 0.6)
    assert RouterSetup("crossfade", 0.6, 0.4).router(two) == Crossfade("a", "b", 0.6, 0.4)
    assert RouterSetup("Wan 2.2 text to video").router(two) == Boundary("a", "b", 0.875)
    assert RouterSetup("Wan 2.2 image to video").router(two) == Boundary("a", "b", 0.9)
    three = Spans((("a", 0.7), ("b", 0.4), ("c", 0.0)))
    for text in ("a 0.7 b 0.4 c 0", "a: 0.7, b: 0.4, c: 0"):
        assert RouterSetup("spans", spans=text).router(["a", "b", "c"]) == three


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda sol, lune: setup("two words", sol), "one word"),
        (lambda sol, lune: setup("sol", sol, guidance=2.0, negative=None), "needs negative conditioning"),
        (lambda sol, lune: run_of([setup("sol", sol), setup("lune", lune)]), "need a MoE Router"),
        (lambda sol, lune: run_of([setup("sol", sol), setup("sol", lune)], {}), "two experts are called sol"),
        (lambda sol, lune: run_of([setup("sol", sol)], {}), "between two experts"),
        (
            lambda sol, lune: run_of(
                [setup("a", sol), setup("b", lune)], {"kind": "spans", "spans": "a 0.7 b"}
            ),
            'like "a 0.7 b 0"',
        ),
        (
            lambda sol, lune: run_of([setup("sol", sol, steps=3), setup("lune", lune)], {}),
            "sol has steps of its own, lune has not",
        ),
        (
            lambda sol, lune: run_of(
                [setup("sol", sol), setup("lune", dataclasses.replace(lune, latent_format=LatentFormat(16)))],
                {},
            ),
            "sol works on LatentFormat latents .4 channels. and lune on LatentFormat latents .16 channels.",
        ),
    ],
)
def test_mistakes_are_said_before_any_model_is_called(sol, lune, make, message):
    with pytest.raises(ValueError, match=message):
        make(sol, lune)
    assert not sol.calls and not lune.calls


# The sampler


def test_a_handoff_is_the_packages_own(sol, lune, gentle_mixture):
    """Guidance by ComfyUI, fresh noise by seed, the latents' scale undone."""
    setups = [
        setup("sol", sol, guidance=3.0, solver="ddpm", steps=4),
        setup("lune", lune, guidance=1.5, solver="dpmpp_2m", steps=5),
    ]
    planned = run_of(setups, {"at": 0.6})
    latent, denoised = sampled(planned, empty())
    experts = [Expert.sol(guidance_scale=3.0), Expert.lune(guidance_scale=1.5, solver="dpmpp_2m")]
    steps = {"sol": 4, "lune": 5}
    compiled, expected = independent(
        gentle_mixture, experts, Boundary("sol", "lune", 0.6), [3, 4], steps=steps
    )
    assert str(planned.plan) == str(compiled)
    same(latent["samples"], expected / 0.5)
    same(denoised["samples"], expected / 0.5)  # the last step goes to what is believed
    assert stand_ins.CFGGuider.opened == [sol, lune]  # each loaded once, when its part begins
    assert [guidance for _, guidance in sol.calls + lune.calls] == [3.0] * 4 + [1.5] * 5
    assert stand_ins.shown == [(step, 9) for step in range(9)]


def test_guidance_has_its_window(sol):
    planned = run_of([setup("sol", sol, guidance=3.0, guidance_window=(0.9, 0.5), solver="ddim")])
    sampled(planned, empty())
    scales = [step.calls[0].guidance_scale for step in planned.plan.steps]
    assert set(scales) == {1.0, 3.0}
    assert [guidance for _, guidance in sol.calls] == scales


def test_a_crossfade_loads_whoever_is_called(sol, lune, gentle_mixture):
    """The stand-in's device holds one model at a time, and says so if another is called."""
    setups = [setup("sol", sol, solver="ddim", guidance=2.0), setup("lune", lune, solver="ddim")]
    planned = run_of(setups, {"kind": "crossfade", "at": 0.9, "until": 0.3}, steps=9)
    latent, _ = sampled(planned, empty())
    experts = [Expert.sol(solver="ddim", guidance_scale=2.0), Expert.lune(solver="ddim")]
    router = Crossfade("sol", "lune", 0.9, 0.3)
    compiled, expected = independent(gentle_mixture, experts, router, [3, 4], steps=9)
    assert any(len(step.calls) == 2 for step in compiled.steps)
    same(latent["samples"], expected / 0.5)


def test_two_patches_of_one_model_take_turns(believes):
    """ComfyUI's clones share the network, and who patches it must be who is called."""
    first = Model(believes, linear_sampling())
    second = dataclasses.replace(first)
    second.model = first.model
    setups = [setup("one", first, solver="ddim"), setup("two", second, solver="ddim")]
    sampled(run_of(setups, {"kind": "crossfade", "at": 0.9, "until": 0.3}), empty())
    assert first.calls and second.calls


def test_from_an_image(sol, gentle_mixture):
    image = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    planned = run_of([setup("sol", sol, solver="ddim")], start=0.6, steps=5)
    latent, _ = sampled(planned, {"samples": image, "batch_index": [7, 1]})
    _, expected = independent(
        gentle_mixture, [Expert.sol(solver="ddim")], None, [10, 4], x=image * 0.5, start=0.6, steps=5
    )
    same(latent["samples"], expected / 0.5)
    assert latent["batch_index"] == [7, 1]


def test_comfyuis_noise(lune):
    planned = run_of([setup("lune", lune, solver="euler")], steps=1)
    latent, _ = sampled(planned, empty(), seed=11, own_noise=False)
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(11))
    same(latent["samples"], lune.x0(noise, 0.0, 1.0) / 0.5)


def test_what_is_masked_stays(sol, lune):
    image = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 4, 4)
    mask[..., :2] = 1.0
    setups = [setup("sol", sol, solver="ddpm"), setup("lune", lune, solver="euler")]
    made, _ = sampled(run_of(setups, {"at": 0.6}), {"samples": image, "noise_mask": mask})
    torch.testing.assert_close(made["samples"][..., 2:], image[..., 2:], rtol=1e-5, atol=1e-5)
    assert (made["samples"][..., :2] - image[..., :2]).abs().min() > 1e-3


def test_patches_are_told_the_runs_sigmas(sol, lune, monkeypatch):
    seen = {}
    predict = stand_ins.CFGGuider.predict_noise

    def watched(self, x, timestep, model_options, seed=None):
        seen.setdefault(self.model_patcher.model_sampling.__class__.__mro__[2], []).append(
            (float(timestep[0]), model_options["sample_sigmas"], seed)
        )
        return predict(self, x, timestep, model_options, seed)

    monkeypatch.setattr(stand_ins.CFGGuider, "predict_noise", watched)
    setups = [setup("sol", sol, solver="ddim"), setup("lune", lune, solver="euler")]
    sampled(run_of(setups, {"at": 0.6}), empty(), seed=17)
    for told in seen.values():
        for sigma, sigmas, seed in told:
            assert len(sigmas) == 9 and sigmas[-1] == 0.0 and seed == 17
            assert (sigmas - sigma).abs().min() <= 1e-5 * sigma


def test_the_state_stays_where_the_fused_step_runs(monkeypatch):
    from moe_sampler.comfy import running

    cpu, mps, cuda = (torch.device(kind) for kind in ("cpu", "mps", "cuda"))
    for there in (True, False):
        monkeypatch.setattr(running, "find_spec", lambda name, there=there: there or None)
        assert running.state_device(cpu) == running.state_device(mps) == cpu
        assert running.state_device(cuda) == (cuda if there else cpu)


def test_an_interrupt_stops_between_two_calls(sol, lune, monkeypatch):
    monkeypatch.setattr(stand_ins, "interrupted", True)
    setups = [setup("sol", sol, solver="ddim"), setup("lune", lune, solver="euler")]
    with pytest.raises(stand_ins.Interrupted):
        sampled(run_of(setups, {"at": 0.6}), empty())
    assert not sol.calls and sol.model.current_patcher is None


# The guider


class Euler:
    """k-diffusion's Euler, as ComfyUI's KSAMPLER runs it from pure noise."""

    def __init__(self, flow: bool) -> None:
        self.flow = flow

    def sample(self, model, sigmas, arguments, callback, noise, latent, mask, disable):
        x = noise * (1.0 if self.flow else (1.0 + sigmas[0] ** 2).sqrt())
        for sigma, following in itertools.pairwise(sigmas):
            x0 = model(x, sigma.expand(len(x)), arguments["model_options"], arguments["seed"])
            x = x0 + (x - x0) * (following / sigma)
        return x


@pytest.mark.parametrize("first", ["sol", "lune"])
@pytest.mark.parametrize("router", [{"at": 0.6}, {"kind": "crossfade", "at": 0.8, "until": 0.3}])
def test_the_guider_routes_by_noise_level(sol, lune, gentle_mixture, first, router):
    """Euler on sigmas is DDIM on noise levels, in whichever expert's convention; the last step is exact."""
    from moe_sampler.comfy.guider import RoutedGuider
    from moe_sampler.comfy.setups import RouterSetup

    order = ["sol", "lune"] if first == "sol" else ["lune", "sol"]
    models = {"sol": sol, "lune": lune}
    guidance = {"sol": 3.0, "lune": 1.0}
    levels = [VPPath.linear().level(t) for t in (999, 800, 600, 400, 200, 100)]
    noises = [level.noise for level in levels]
    sigmas = torch.tensor([*(n if first == "lune" else n / (1 - n) for n in noises), 0.0])
    setups = [setup(name, models[name], guidance=guidance[name]) for name in order]
    guider = RoutedGuider(setups, RouterSetup(**router))
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    made = guider.sample(noise, torch.zeros_like(noise), Euler(first == "lune"), sigmas, seed=0)

    made_of = Boundary(*order, 0.6) if "at" in router and len(router) == 1 else Crossfade(*order, 0.8, 0.3)
    x = noise.double()
    scale = levels[0].alpha + levels[0].sigma if first == "lune" else 1.0
    x = x * scale  # on the VP path, whoever begins
    for level, target in zip(levels, [*levels[1:], Level(1.0, 0.0)], strict=True):
        x0 = 0.0
        for name, weight in made_of(level.noise).items():
            own = gentle_mixture.x0(x, level.alpha, level.sigma)
            x0 = x0 + weight * own * (0.8 + guidance[name] * 0.2)
        x = target.alpha * x0 + target.sigma * (x - level.alpha * x0) / level.sigma
    same(made, (x / 0.5).float())


def test_the_guider_keeps_its_experts_windows_and_one_expert_needs_no_router(sol):
    from moe_sampler.comfy.guider import RoutedGuider

    guider = RoutedGuider([setup("sol", sol, guidance=3.0, guidance_window=(0.9, 0.5))], None)
    noise = torch.ones(1, 4, 4, 4)
    guider.sample(noise, torch.zeros_like(noise), Euler(False), torch.tensor([20.0, 4.0, 0.5, 0.0]), seed=0)
    assert [guidance for _, guidance in sol.calls] == [1.0, 3.0, 1.0]
    with pytest.raises(ValueError, match="need a MoE Router"):
        RoutedGuider([setup("a", sol), setup("b", sol)], None)


def test_the_guider_leaves_the_mask_to_the_sampler(sol, lune):
    """A soft mask laid on twice would be another mask."""
    from moe_sampler.comfy.guider import RoutedGuider
    from moe_sampler.comfy.setups import RouterSetup

    seen = []

    class Once(Euler):
        def sample(self, model, sigmas, arguments, callback, noise, latent, mask, disable):
            seen.append(mask)
            return super().sample(model, sigmas, arguments, callback, noise, latent, mask, disable)

    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    sigmas, made = torch.tensor([20.0, 4.0, 0.5, 0.0]), []
    for mask in (None, torch.full((1, 4, 4), 0.5)):
        setups = [setup("sol", sol), setup("lune", lune)]
        guider = RoutedGuider(setups, RouterSetup(at=0.6))
        made.append(
            guider.sample(noise, torch.zeros_like(noise), Once(False), sigmas, denoise_mask=mask, seed=0)
        )
    assert seen[0] is None and seen[1].unique().tolist() == [0.5]
    assert torch.equal(*made)


# The nodes


def test_a_workflow_by_the_nodes(sol, lune):
    from moe_sampler.comfy import nodes

    defaults = {
        slot.id: slot.options["default"]
        for slot in nodes.MoEExpert.define_schema().inputs
        if "default" in slot.options
    }
    given = {**defaults, "positive": 1.0, "negative": 0.5, "solver": "ddim"}
    (first,) = nodes.MoEExpert.execute(**{**given, "name": "sol", "model": sol}).args
    (both,) = nodes.MoEExpert.execute(**{**given, "name": "lune", "model": lune}, experts=first).args
    assert [own.name for own in both] == ["sol", "lune"]
    assert [own.spacing for own in both] == [None, None]
    (spaced,) = nodes.MoEExpert.execute(**{**given, "name": "a", "model": sol, "levels": "karras"}).args
    assert spaced[0].spacing == "karras"
    (router,) = nodes.MoERouter.execute(kind="handoff", at=0.7, until=0.5, spans="").args
    planned = nodes.MoEPlan.execute(both, steps=6, start=1.0, router=router)
    run, drawing, table = planned.args
    assert table == str(run.plan) and len(run.plan) == 6
    assert drawing.ndim == 4 and drawing.shape[-1] == 3 and 0.0 <= drawing.min() < drawing.max() <= 1.0
    assert planned.ui is drawing
    latent, denoised = nodes.MoESampler.execute(run, empty(), seed=1, noise="moe-sampler").args
    same(latent["samples"], sampled(run, empty(), seed=1)[0]["samples"])
    assert denoised["samples"].shape == latent["samples"].shape
    (guider,) = nodes.MoEGuider.execute(both, router).args
    assert guider.model_patcher is sol


def test_schemas_name_what_the_nodes_take():
    """Every input is an argument, and every choice one that is known."""
    import inspect

    from moe_sampler.comfy import nodes
    from moe_sampler.comfy.setups import ROUTERS, ExpertSetup, RouterSetup

    assert nodes._KINDS == ROUTERS
    for node in nodes.NODES:
        schema = node.define_schema()
        taken = inspect.signature(node.execute).parameters
        names = set(taken)
        if "settings" in taken:
            made = {"MoEExpert": ExpertSetup, "MoERouter": RouterSetup}[schema.node_id]
            names |= {field.name for field in dataclasses.fields(made)}
        assert {slot.id for slot in schema.inputs} <= names
        assert schema.display_name and schema.category and schema.description
    assert {node.define_schema().display_name for node in nodes.NODES} == {
        *("MoE Expert", "MoE Router", "MoE Plan", "MoE Sampler", "MoE Guider", "Load Sol/Lune"),
    }


def test_an_expert_of_our_loader_is_sampled_as_it_was_trained():
    from moe_sampler.comfy.levels import ModelLevels
    from moe_sampler.comfy.sol_lune import with_training
    from moe_sampler.loading.presets import TRAINING

    class Loaded:
        def __init__(self):
            self.model = type("Inner", (), {"model_config": None})
            self.patches = {}

        def clone(self):
            return Loaded()

        def add_object_patch(self, name, value):
            self.patches[name] = value

    for name, kind in (("sol", V_PREDICTION), ("lune", CONST), ("sd15", EPS)):
        loaded = Loaded()
        patched = with_training(loaded, TRAINING[name])
        assert not loaded.patches
        sampling = patched.patches["model_sampling"]
        expected = Expert.from_scheduler_config(name, TRAINING[name])
        assert isinstance(sampling, kind)
        assert ModelLevels.of(sampling).path == expected.path
        if name == "lune":
            assert ModelLevels.of(sampling).shift == expected.shift == 2.0


# How ComfyUI finds them


def fresh(code: str, cwd) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


LIKE_COMFYUI = f"""
import asyncio, importlib.util, json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch, stand_ins
sys.modules.update(stand_ins.modules())
spec = importlib.util.spec_from_file_location("/custom_nodes/moe-sampler", {str(ROOT / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules["/custom_nodes/moe-sampler"] = module
before = set(sys.modules)
spec.loader.exec_module(module)
quiet = set(sys.modules) - before
nodes = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
[node.define_schema() for node in nodes]
"""


def test_a_clone_brings_itself_and_little_else(tmp_path):
    said = fresh(
        LIKE_COMFYUI
        + """
new = sorted(name for name in set(sys.modules) - before if name.startswith("moe_sampler"))
heavy = {"diffusers", "transformers", "accelerate", "huggingface_hub", "PIL", "triton"} & set(sys.modules)
import moe_sampler, moe_sampler.kernels
print(json.dumps([sorted(quiet), new, sorted(heavy), moe_sampler.__file__, moe_sampler.kernels.__file__,
                  len(nodes), [name for name in ("kernels", "tinyflux") if name in sys.modules]]))
""",
        tmp_path,
    )
    quiet, new, heavy, package, kernels, count, strangers = json.loads(said)
    assert not [name for name in quiet if name.startswith(("moe_sampler", "comfy"))]
    assert set(new) == {
        *("moe_sampler", "moe_sampler._lazy", "moe_sampler.comfy", "moe_sampler.comfy.nodes"),
        *("moe_sampler.loading", "moe_sampler.loading.presets", "moe_sampler.sampling"),
        *("moe_sampler.sampling.solvers", "moe_sampler.sampling.spacing_names", "moe_sampler._numbers"),
    }
    assert not heavy and not strangers and count == 6
    assert package == str(ROOT / "moe_sampler" / "__init__.py")
    assert kernels == str(ROOT / "kernels" / "__init__.py")


def test_sampling_needs_nothing_that_comfyui_does_not_bring(tmp_path):
    """A plan, its drawing and a run without diffusers, accelerate or rich."""
    fresh(
        LIKE_COMFYUI
        + """
class Deny:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "accelerate", "rich", "typer", "triton", "peft"):
            raise ImportError(f"not among ComfyUI's: {name}")
sys.meta_path.insert(0, Deny())
import moe_sampler.comfy.guider, moe_sampler.comfy.sol_lune
from moe_sampler.comfy.nodes import MoEPlan, MoESampler
from moe_sampler.comfy.setups import ExpertSetup
flow = stand_ins.sampling_of(stand_ins.ModelSamplingDiscreteFlow, stand_ins.CONST)
model = stand_ins.Model(lambda x, alpha, sigma: 0.5 * x, flow)
expert = ExpertSetup("lune", model, 1.0, 1.0, guidance=2.0)
run, drawing, table = MoEPlan.execute((expert,), steps=3, start=1.0).args
latent, _ = MoESampler.execute(run, {"samples": torch.zeros(1, 4, 2, 2)}, seed=0, noise="moe-sampler").args
assert latent["samples"].isfinite().all()
""",
        tmp_path,
    )


def test_the_registry_is_told_what_it_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["comfy"]["DisplayName"]
    assert "moe_sampler.comfy" in project["tool"]["setuptools"]["packages"]
    asyncio.run(_entrypoint())


async def _entrypoint() -> None:
    from moe_sampler.comfy import comfy_entrypoint
    from moe_sampler.comfy.nodes import NODES

    assert await (await comfy_entrypoint()).get_node_list() == list(NODES)
