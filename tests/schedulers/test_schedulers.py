"""The fused schedulers against diffusers' own: same model, same noise, whole loops."""

from __future__ import annotations

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm
from packaging.version import Version
from waits import waits_are_errors

from moe_sampler import FlowPath, FusedDDIMScheduler, FusedDDPMScheduler, FusedFlowMatchEulerScheduler, Level

SHAPE = (2, 4, 8, 8)
ORIGINALS = {
    FusedDDPMScheduler: diffusers.DDPMScheduler,
    FusedDDIMScheduler: diffusers.DDIMScheduler,
    FusedFlowMatchEulerScheduler: diffusers.FlowMatchEulerDiscreteScheduler,
}
FUSED = list(ORIGINALS)
VP = FUSED[:2]
SCALED = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
LATENT = dict(clip_sample=False)
ZERO_SNR = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
TRAINED = np.linspace(1e-4, 0.03, 500).tolist()


def start(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def vp_model(mixture, original):
    """The exact denoiser at the level diffusers' own table gives a timestep."""

    def model(x, t):
        abar = original.alphas_cumprod[int(t)].double().item()
        level = Level(abar**0.5, (1 - abar) ** 0.5)
        return mixture.predict(original.config.prediction_type, x, level)

    return model


def flow_model(mixture, original):
    total, inverted = original.config.num_train_timesteps, original.config.invert_sigmas
    path = FlowPath(timestep_scale=float(total), data_at_one=inverted)
    prediction = "reversed_flow_prediction" if inverted else "flow_prediction"
    return lambda x, t: mixture.predict(prediction, x, path.level(min(max(t.item(), 1.0), float(total))))


def loop(scheduler, model, x=None, **options):
    """The end of a run and every x0 on the way, with the noise of one generator."""
    x, x0s = start() if x is None else x, []
    options["generator"] = torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        output = scheduler.step(model(x, t), t, x, **options)
        x = output.prev_sample
        x0s.append(output.get("pred_original_sample"))
    return x, x0s


def assert_same_runs(fused, original, model, **options):
    """Equal to float32's rounding, whole loops long."""
    assert torch.allclose(fused.timesteps.double(), original.timesteps.double(), rtol=0, atol=1e-3)
    assert fused.timesteps.dtype == original.timesteps.dtype
    (mine, my_x0s), (theirs, their_x0s) = (loop(s, model, **options) for s in (fused, original))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    for my_x0, their_x0 in zip(my_x0s, their_x0s, strict=True):
        if their_x0 is not None:
            # Near pure noise an epsilon model's x0 is a difference of numbers near 100.
            torch.testing.assert_close(my_x0, their_x0, atol=2e-3, rtol=0)
    assert theirs.abs().max() < 5


@pytest.fixture
def noise_of_one_dtype(monkeypatch):
    """The same numbers from a generator, whatever the dtype of the run."""
    for module in (scheduling_ddim, scheduling_ddpm):
        real = module.randn_tensor

        def randn(shape, generator=None, device=None, dtype=None, real=real):
            return real(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

        monkeypatch.setattr(module, "randn_tensor", randn)


@pytest.fixture(scope="module")
def mixture(gentle_mixture):
    return gentle_mixture


CONFIGS = [
    {},
    LATENT,
    SCALED | LATENT | dict(steps_offset=1),
    SCALED | LATENT | dict(prediction_type="v_prediction", timestep_spacing="trailing"),
    LATENT | dict(prediction_type="sample", timestep_spacing="linspace"),
    dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
    dict(beta_schedule="squaredcos_cap_v2", clip_sample_range=2.0),
    LATENT | dict(trained_betas=TRAINED, num_train_timesteps=500),
    LATENT | dict(num_train_timesteps=200, prediction_type="v_prediction"),
    dict(clip_sample_range=0.4, prediction_type="v_prediction", timestep_spacing="trailing"),
    dict(clip_sample_range=0.4, prediction_type="sample"),
    ZERO_SNR | dict(prediction_type="v_prediction"),
    ZERO_SNR | SCALED | LATENT | dict(prediction_type="v_prediction"),
    ZERO_SNR | LATENT | dict(prediction_type="sample", beta_schedule="squaredcos_cap_v2"),
]
WAYS = [
    (FusedDDPMScheduler, dict(variance_type="fixed_large"), {}),
    (FusedDDPMScheduler, dict(variance_type="fixed_small_log"), {}),
    (FusedDDIMScheduler, {}, dict(eta=0.5)),
    (FusedDDIMScheduler, dict(set_alpha_to_one=False), dict(eta=0.5)),
    (FusedDDIMScheduler, {}, dict(eta=1.0, use_clipped_model_output=True)),
]


@pytest.mark.parametrize(
    ("cls", "config", "options"),
    [
        *((cls, config, {}) for config in CONFIGS for cls in VP),
        *((cls, config | extra, options) for cls, extra, options in WAYS for config in CONFIGS[:9:4]),
        *((cls, config | extra, options) for cls, extra, options in WAYS for config in CONFIGS[9:11]),
        *((FusedDDIMScheduler, config, dict(eta=0.5)) for config in CONFIGS[11:]),
    ],
)
def test_whole_loops_are_diffusers_own(mixture, noise_of_one_dtype, cls, config, options):
    fused, original = cls(**config), ORIGINALS[cls](**config)
    for steps in (1, 20):
        for scheduler in (fused, original):
            scheduler.set_timesteps(steps)
        assert_same_runs(fused, original, vp_model(mixture, original), **options)


@pytest.mark.parametrize("steps", [2, 20])
@pytest.mark.parametrize(
    "config",
    [
        {},
        dict(shift=3.0),
        dict(shift=3.0, num_train_timesteps=500),
        dict(use_dynamic_shifting=True),
        dict(use_dynamic_shifting=True, time_shift_type="linear"),
        dict(shift_terminal=0.1),
        dict(use_dynamic_shifting=True, shift_terminal=0.02),
        dict(invert_sigmas=True, shift=2.0),
        dict(use_karras_sigmas=True),
        dict(use_exponential_sigmas=True, shift=2.0),
        dict(use_beta_sigmas=True),
        dict(stochastic_sampling=True),
    ],
)
def test_whole_flows_are_diffusers_own(mixture, config, steps):
    if config.get("stochastic_sampling") and Version(diffusers.__version__) < Version("0.39"):
        pytest.skip("diffusers before 0.39 draws this noise from the global generator")
    fused = FusedFlowMatchEulerScheduler(**config)
    original = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    sigmas = np.linspace(1.0, 1.0 / steps, steps).tolist()
    for given in (dict(num_inference_steps=steps), dict(sigmas=sigmas)):
        for scheduler in (fused, original):
            scheduler.set_timesteps(**given, mu=0.9 if config.get("use_dynamic_shifting") else None)
        torch.testing.assert_close(fused.sigmas, original.sigmas, atol=1e-6, rtol=0)
        assert_same_runs(fused, original, flow_model(mixture, original))


def test_flows_with_timesteps_of_their_own(mixture):
    fused, original = FusedFlowMatchEulerScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()
    for given in (
        dict(timesteps=[900.0, 500.0, 100.0]),
        dict(timesteps=[900.0, 500.0, 100.0], sigmas=[1.0, 0.6, 0.0]),
        dict(sigmas=[0.8, 0.4, 0.4, 0.0], num_inference_steps=4),
    ):
        for scheduler in (fused, original):
            scheduler.set_timesteps(**given)
        assert_same_runs(fused, original, flow_model(mixture, original))


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("cls", VP)
def test_timesteps(cls, spacing):
    fused, original = cls(timestep_spacing=spacing), ORIGINALS[cls](timestep_spacing=spacing)
    assert torch.equal(fused.timesteps, original.timesteps)
    for steps in (1, 2, 3, 7, 25, 30, 48, 96, 100, 250, 999, 1000):
        fused.set_timesteps(steps)
        original.set_timesteps(steps)
        assert torch.equal(fused.timesteps, original.timesteps), steps
        assert fused.num_inference_steps == steps


def test_a_step_count_is_that_many_steps():
    """diffusers' trailing spacing adds a timestep of -1 for some step counts."""
    fused = FusedDDPMScheduler(timestep_spacing="trailing")
    for steps in (61, 103, 998):
        fused.set_timesteps(steps)
        assert len(fused.timesteps) == steps and fused.timesteps.min() >= 0


def test_ddpm_timesteps_of_ones_own(mixture):
    chosen = [987, 600, 321, 100, 5]
    fused, original = FusedDDPMScheduler(**LATENT), diffusers.DDPMScheduler(**LATENT)
    for scheduler in (fused, original):
        scheduler.set_timesteps(timesteps=chosen)
    assert fused.timesteps.tolist() == chosen and fused.custom_timesteps
    assert [fused.previous_timestep(t) for t in chosen] == [*chosen[1:], -1]
    assert_same_runs(fused, original, vp_model(mixture, original))
    # diffusers can't step from between the nodes; here it goes to the node below.
    assert fused.previous_timestep(400) == 321 and fused.previous_timestep(3) == -1


def test_timesteps_are_found_however_they_are_given(mixture):
    """Views of the schedule, slices of it, tensors of one's own and plain integers, in any order."""
    for cls in VP:
        fused, original = cls(**LATENT), ORIGINALS[cls](**LATENT)
        for scheduler in (fused, original):
            scheduler.set_timesteps(10)
        model = vp_model(mixture, original)
        for view in [fused.timesteps[4:][2], *fused.timesteps.flip(0)[:3], fused.timesteps[3:4]]:
            x, t = start(3), int(view)
            output, noise = model(x, t), torch.Generator
            expected = original.step(output, t, x, generator=noise().manual_seed(1)).prev_sample
            for given in (view, t, torch.tensor(t), torch.tensor(t, dtype=torch.int32)):
                mine = fused.step(output, given, x, generator=noise().manual_seed(1)).prev_sample
                torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)


def test_any_integer_timestep(mixture):
    for cls in VP:
        fused, original = cls(**SCALED), ORIGINALS[cls](**SCALED)
        if cls is FusedDDIMScheduler:
            for scheduler in (fused, original):
                scheduler.set_timesteps(30)
        for t in (999, 437, 12, 1, 0):
            x = start(t)
            output = vp_model(mixture, original)(x, t)
            ours, theirs = (
                s.step(output, t, x, generator=torch.Generator().manual_seed(t)) for s in (fused, original)
            )
            torch.testing.assert_close(ours.prev_sample, theirs.prev_sample, atol=1e-5, rtol=1e-5)


def test_steps_of_a_schedule_read_no_timestep(mixture, monkeypatch):
    """Nothing of the schedule is read back on its way through `step`, so nothing waits for a device."""
    model = {FusedFlowMatchEulerScheduler: lambda x, t: x}
    for cls in FUSED:
        fused = cls()
        fused.set_timesteps(5)
        schedule, x = fused.timesteps.untyped_storage().data_ptr(), start()
        timesteps = list(fused.timesteps)
        output = model.get(cls, lambda x, t: 0.1 * x)(x, None)
        with monkeypatch.context() as patched:
            for name in ("item", "tolist", "__int__", "__float__", "__bool__", "__index__", "nonzero"):
                real = getattr(torch.Tensor, name)

                def read(tensor, *args, real=real, schedule=schedule, **kwargs):
                    # No assert: pytest would print the tensor, fail in that, and keep torch's frame, which
                    # switches torch.func off for as long as it lives.
                    if tensor.untyped_storage().data_ptr() == schedule:
                        raise AssertionError("a timestep was read")
                    return real(tensor, *args, **kwargs)

                patched.setattr(torch.Tensor, name, read)
            for t in timesteps:
                x = fused.step(output, t, x).prev_sample
            with pytest.raises(AssertionError, match="was read"):
                int(timesteps[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cls", FUSED)
def test_steps_do_not_wait_for_the_device(cls):
    fused = cls()
    fused.set_timesteps(5, device="cuda")
    x = start().cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    fused.step(0.1 * x, fused.timesteps[0], x, generator=generator)  # the table goes to the device once
    fused.set_timesteps(5, device="cuda")
    fused.step(0.1 * x, fused.timesteps[0], x, generator=generator)
    with waits_are_errors():
        for t in fused.timesteps[1:]:
            x = fused.step(0.1 * x, t, x, generator=generator).prev_sample
    assert x.isfinite().all()


@pytest.mark.parametrize("cls", FUSED)
def test_step_leaves_its_arguments_alone_and_returns_diffusers_types(cls):
    fused, original = cls(), ORIGINALS[cls]()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for scheduler in (fused, original):
            scheduler.set_timesteps(4)
        x, output = start().to(dtype), start(1).to(dtype).to(memory_format=torch.channels_last)
        before = x.clone(), output.clone()
        outputs = []
        for scheduler, return_dict in ((fused, True), (original, True), (fused, False), (original, False)):
            scheduler.set_timesteps(4)
            noise = torch.Generator().manual_seed(2)
            outputs.append(
                scheduler.step(output, scheduler.timesteps[1], x, generator=noise, return_dict=return_dict)
            )
        assert torch.equal(x, before[0]) and torch.equal(output, before[1])
        ours, theirs, our_tuple, their_tuple = outputs
        assert type(ours) is type(theirs) and ours.keys() == theirs.keys()
        assert type(our_tuple) is tuple and len(our_tuple) == len(their_tuple)
        for mine, in_tuple, reference in zip(ours.values(), our_tuple, theirs.values(), strict=True):
            assert torch.equal(mine, in_tuple) and mine.dtype == reference.dtype == dtype
            assert mine.shape == x.shape and mine.data_ptr() != x.data_ptr()
            torch.testing.assert_close(mine.float(), reference.float(), atol=0.05, rtol=0.02)


def test_float16_state_is_computed_in_float32(mixture):
    """Nearer to the float32 run than diffusers' own steps in float16 are."""
    config = SCALED | LATENT | dict(prediction_type="v_prediction")
    fused, original, exact = FusedDDIMScheduler(**config), *(diffusers.DDIMScheduler(**config) for _ in "ab")
    x, output = start().half(), start(1).half()
    errors = []
    for scheduler, convert in ((exact, torch.float32), (fused, torch.float16), (original, torch.float16)):
        scheduler.set_timesteps(10)
        steps = [
            scheduler.step(output.to(convert), t, x.to(convert)).prev_sample for t in scheduler.timesteps
        ]
        errors.append(torch.stack(steps).float())
    mine, theirs = ((run - errors[0]).abs().max() for run in errors[1:])
    assert mine <= theirs and mine < 1e-3


@pytest.mark.parametrize("cls", FUSED)
def test_forward_noise(cls):
    fused, original = cls(), ORIGINALS[cls]()
    x, noise = start(), start(1)
    if cls is FusedFlowMatchEulerScheduler:
        for scheduler in (fused, original):
            scheduler.set_timesteps(10)
        timesteps = torch.stack([fused.timesteps[2], fused.timesteps[7]])
        torch.testing.assert_close(
            fused.scale_noise(x, timesteps, noise),
            original.scale_noise(x, original.timesteps[[2, 7]], noise),
            atol=1e-6,
            rtol=0,
        )
        with pytest.raises(ValueError, match="not one of the schedule's"):
            fused.scale_noise(x, torch.tensor([123.0, 4.0]), noise)
    else:
        for timesteps in (torch.tensor([3, 900]), torch.tensor([500])):
            for name in ("add_noise", "get_velocity"):
                mine, theirs = (getattr(s, name)(x, noise, timesteps) for s in (fused, original))
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
                half = getattr(fused, name)(x.half(), noise.half(), timesteps)
                assert half.dtype == torch.float16
                torch.testing.assert_close(half.float(), theirs, atol=5e-3, rtol=0)
        np.testing.assert_allclose(fused.betas, original.betas, rtol=1e-5)
        np.testing.assert_allclose(fused.alphas_cumprod, original.alphas_cumprod, rtol=2e-5)
    assert fused.scale_model_input(x, 5) is x
    assert len(fused) == len(original) == 1000 and fused.order == original.order
    assert fused.init_noise_sigma == getattr(original, "init_noise_sigma", 1.0)


def test_from_noise_that_starts_in_the_middle(mixture):
    """Image to image: some timesteps are skipped, then noise is added and taken off again."""
    for cls in VP:
        fused, original = cls(**LATENT), ORIGINALS[cls](**LATENT)
        runs = []
        for scheduler in (fused, original):
            scheduler.set_timesteps(20)
            x, generator = start(), torch.Generator().manual_seed(3)
            remaining = scheduler.timesteps[8:]
            x = scheduler.add_noise(x, start(1), remaining[:1])
            for t in remaining:
                x = scheduler.step(vp_model(mixture, original)(x, t), t, x, generator=generator).prev_sample
            runs.append(x)
        torch.testing.assert_close(*runs, atol=1e-5, rtol=0)


def test_every_eta_of_one_schedule_has_its_own_table(mixture):
    """And so has every way of clipping, in whatever order they are asked for."""
    config = dict(clip_sample_range=0.3)  # so small that clipping matters
    fused, original = FusedDDIMScheduler(**config), diffusers.DDIMScheduler(**config)
    for scheduler in (fused, original):
        scheduler.set_timesteps(10)
    x, z, t = start(3), start(4), fused.timesteps[8]
    output = vp_model(mixture, original)(x, t)
    seen = []
    for eta in (0.0, 1.0, 0.4, 0.0, 1.0):
        for clipped in (False, True):
            options = dict(eta=eta, use_clipped_model_output=clipped, variance_noise=z)
            mine, theirs = (s.step(output, t, x, **options).prev_sample for s in (fused, original))
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
            seen.append(mine)
    assert min((a - b).abs().max() for i, a in enumerate(seen[:6]) for b in seen[:i]) > 1e-3


def test_begin_index_and_step_index(mixture):
    fused, original = (cls(shift=2.0) for cls in (FusedFlowMatchEulerScheduler, ORIGINALS[FUSED[2]]))
    for begin in (None, 3):
        runs = []
        for scheduler in (fused, original):
            scheduler.set_timesteps(10)
            assert scheduler.step_index is None and scheduler.begin_index is None
            if begin is not None:
                scheduler.set_begin_index(begin)
            remaining = scheduler.timesteps[3:]
            x, indices = scheduler.scale_noise(start(), remaining[:1], start(1)), []
            for t in remaining:
                x = scheduler.step(flow_model(mixture, original)(x, t), t, x).prev_sample
                indices.append(scheduler.step_index)
            assert indices == list(range(4, 11)) and scheduler.begin_index == begin
            if begin is not None:
                scheduler.set_begin_index(begin)
                scheduler._step_index = 5
                x = x + scheduler.scale_noise(start(2), remaining[:1], start(4))
            runs.append(x)
        torch.testing.assert_close(*runs, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="all 10 steps are done"):
        fused.set_timesteps(10)
        for _ in range(11):
            fused.step(start(), fused.timesteps[0], start())


@pytest.mark.parametrize("cls", FUSED)
def test_configs_are_the_originals_own(cls, tmp_path):
    original = ORIGINALS[cls]
    ours, theirs = (inspect.signature(c.__init__).parameters for c in (cls, original))
    assert {n: p.default for n, p in ours.items()} == {n: p.default for n, p in theirs.items()}
    for name in ("step", "set_timesteps"):
        ours, theirs = (inspect.signature(getattr(c, name)).parameters for c in (cls, original))
        assert list(ours) == list(theirs)
        for key in theirs:
            assert ours[key].default == theirs[key].default
    assert cls._compatibles == original._compatibles

    settings = dict(num_train_timesteps=600) | (
        dict(shift=2.5, shift_terminal=0.1)
        if cls is FusedFlowMatchEulerScheduler
        else dict(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    )

    def values(scheduler):
        return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}

    fused = cls.from_config(original(**settings).config)
    assert values(fused) == values(original(**settings)) == values(original.from_config(fused.config))
    fused.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert written["_class_name"] == cls.__name__
    for loaded in (cls.from_pretrained(tmp_path), original.from_pretrained(tmp_path)):
        assert values(loaded) == values(fused)
    assert values(cls.from_config(fused.config, num_train_timesteps=700)) == values(fused) | {
        "num_train_timesteps": 700
    }


def test_a_saved_scheduler_steps_as_it_did(mixture, tmp_path):
    for cls, config in (
        (FusedDDPMScheduler, LATENT | dict(trained_betas=np.array(TRAINED), num_train_timesteps=500)),
        (FusedDDIMScheduler, SCALED | dict(clip_sample_range=0.7)),
    ):
        fused = cls(**config)
        fused.save_config(tmp_path)
        loaded = cls.from_pretrained(tmp_path)
        model = vp_model(mixture, fused)
        for scheduler in (fused, loaded):
            scheduler.set_timesteps(5)
        assert torch.equal(loop(fused, model)[0], loop(loaded, model)[0])


def test_stable_diffusions_own_config(mixture):
    """PNDM's, as published: what says how PNDM steps is no business of DDIM's."""
    pndm = diffusers.PNDMScheduler(**SCALED, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    fused = FusedDDIMScheduler.from_config(pndm.config, clip_sample=False)
    original = diffusers.DDIMScheduler.from_config(pndm.config, clip_sample=False)
    assert fused.config.steps_offset == 1 and not fused.config.set_alpha_to_one
    for scheduler in (fused, original):
        scheduler.set_timesteps(20)
    assert_same_runs(fused, original, vp_model(mixture, original))
    assert type(diffusers.PNDMScheduler.from_config(fused.config)) is diffusers.PNDMScheduler
    for name in (
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ):
        other = getattr(diffusers, name)(**SCALED)
        assert FusedDDPMScheduler.from_config(other.config).config.beta_start == SCALED["beta_start"]


def test_a_config_that_is_changed_later_counts(mixture):
    """As Stable Diffusion's pipelines do with an outdated one."""
    fused, original = FusedDDIMScheduler(), diffusers.DDIMScheduler()
    for scheduler in (fused, original):
        scheduler.register_to_config(steps_offset=1, clip_sample=False)
        scheduler.set_timesteps(10)
    assert fused.timesteps[-1] == 1
    assert_same_runs(fused, original, vp_model(mixture, original))
    fused.register_to_config(thresholding=True)
    with pytest.raises(ValueError, match="thresholding=True"):
        fused.step(start(), 500, start())


@pytest.mark.parametrize(
    ("cls", "config", "message"),
    [
        (FusedDDPMScheduler, dict(variance_type="learned"), "variance_type='learned'"),
        (FusedDDPMScheduler, dict(variance_type="learned_range"), "variance_type"),
        (FusedDDPMScheduler, dict(variance_type="fixed_large_log"), "variance_type"),
        (FusedDDPMScheduler, dict(beta_schedule="laplace"), "beta_schedule='laplace'"),
        (FusedDDPMScheduler, dict(prediction_type="flow_prediction"), "prediction_type"),
        (FusedDDIMScheduler, dict(thresholding=True), "thresholding=True"),
        (FusedDDIMScheduler, dict(timestep_spacing="traling"), "timestep_spacing='traling'"),
        (FusedDDIMScheduler, dict(clip_sample_range=0.0), "clip_sample_range"),
        (FusedFlowMatchEulerScheduler, dict(time_shift_type="cubic"), "time_shift_type='cubic'"),
        (FusedFlowMatchEulerScheduler, dict(shift=0.0), "shift=0.0"),
        (FusedFlowMatchEulerScheduler, dict(shift_terminal=1.0), "shift_terminal"),
        (FusedFlowMatchEulerScheduler, dict(use_beta_sigmas=True, use_karras_sigmas=True), "exclude"),
    ],
)
def test_configs_that_are_refused(cls, config, message):
    with pytest.raises(ValueError, match=message):
        cls(**config)
    with pytest.raises(ValueError, match=message):
        cls.from_config(config)
    with pytest.raises(TypeError):
        cls(unheard_of=1)


@pytest.mark.parametrize("cls", VP)
def test_zero_terminal_snr_and_epsilon(cls):
    """Only the very first level is out of an epsilon model's reach; diffusers divides by its zero there."""
    config, x = dict(rescale_betas_zero_snr=True, clip_sample=False), start()
    fused, original = cls(**config), ORIGINALS[cls](**config)
    for scheduler in (fused, original):
        scheduler.set_timesteps(10)  # "leading" begins at 900
    mine, theirs = (
        s.step(0.1 * x, 900, x, generator=torch.Generator()).prev_sample for s in (fused, original)
    )
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    message = "rescale_betas_zero_snr=True .* timestep 999: no signal is left there, and an epsilon model"
    with pytest.raises(ValueError, match=message):
        fused.step(x, 999, x)
    with pytest.raises(ValueError, match=message):
        cls(timestep_spacing="trailing", **config).set_timesteps(10)


@pytest.mark.parametrize("cls", VP)
def test_as_many_betas_as_timesteps_where_they_are_used(cls, tmp_path):
    """diffusers' own test saves two betas beside a thousand timesteps."""
    scheduler = cls(trained_betas=np.array([0.1, 0.3]))
    scheduler.save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).betas.tolist() == scheduler.betas.tolist()
    assert scheduler.betas.tolist() == pytest.approx([0.1, 0.3])
    with pytest.raises(ValueError, match="trained_betas has 2 values"):
        scheduler.set_timesteps(10)


@pytest.mark.parametrize("cls", VP)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("first", "last"), [(0.01, 0.2), (0.1, 2.0), (0.5, 0.9)])
def test_betas_that_leave_float32_before_the_last_timestep(cls, prediction, first, last):
    """diffusers' own wherever it has numbers, and numbers where it divides nothing by nothing."""
    config = dict(beta_start=first, beta_end=last, prediction_type=prediction)
    fused, original, x = cls(**config), ORIGINALS[cls](**config), start()
    torch.testing.assert_close(fused.alphas_cumprod, original.alphas_cumprod, rtol=1e-4, atol=0)
    assert (original.alphas_cumprod == 0).any()
    fused.set_timesteps(20)
    original.set_timesteps(20)
    compared = 0
    for t in original.timesteps.tolist():
        mine, theirs = (
            s.step(0.1 * x, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
            for s in (fused, original)
        )
        assert mine.isfinite().all()
        if theirs.isfinite().all():
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
            compared += 1
    assert compared >= 2


@pytest.mark.parametrize("cls", VP)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(beta_start=0.0), "beta_start=0.0, beta_end=0.02: betas must be positive"),
        (dict(beta_start=0.5, beta_end=1.5, num_train_timesteps=6), "beta_end=1.5: .* below 1 while any"),
        (dict(beta_end=float("nan")), "beta_end=nan: betas must be positive"),
        (dict(trained_betas=[0.1, -0.1, 0.2]), "does not support these trained_betas: betas must"),
        (dict(trained_betas=[0.1, 1.2]), "does not support these trained_betas"),
        (dict(trained_betas=[]), "does not support these trained_betas"),
    ],
)
def test_betas_that_are_none(cls, config, message):
    with pytest.raises(ValueError, match=message):
        cls(**config)


def test_beta_schedules_and_lengths_are_diffusers_own():
    for config in (
        dict(beta_schedule="sigmoid"),
        dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50),
        dict(num_train_timesteps=1),
        dict(num_train_timesteps=5, rescale_betas_zero_snr=True),
        dict(trained_betas=TRAINED, rescale_betas_zero_snr=True),
    ):
        fused, original = FusedDDPMScheduler(**config), diffusers.DDPMScheduler(**config)
        torch.testing.assert_close(fused.betas, original.betas, atol=1e-5, rtol=0)
        torch.testing.assert_close(fused.alphas_cumprod, original.alphas_cumprod, atol=1e-6, rtol=1e-5)
    x = start()
    one, original = (c(num_train_timesteps=1) for c in (FusedDDPMScheduler, diffusers.DDPMScheduler))
    torch.testing.assert_close(one.step(0.1 * x, 0, x)[0], original.step(0.1 * x, 0, x)[0])


@pytest.mark.parametrize(
    ("cls", "steps", "first", "total"),
    [(FusedDDPMScheduler, None, 998, 387.9466), (FusedDDIMScheduler, 10, 8, 354.5418)],
)
def test_diffusers_own_loop_with_noise(cls, steps, first, total):
    """The numbers of its test suite: from the middle of a run to the data, where float32 is coarse."""
    x = (torch.arange(768) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)
    noise = (torch.arange(768).flip(-1) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)
    scheduler = cls(clip_sample=True)
    if steps:
        scheduler.set_timesteps(steps)
    timesteps, generator = scheduler.timesteps[first:], torch.manual_seed(0)
    x = scheduler.add_noise(x, noise, timesteps[:1])
    for t in timesteps:
        x = scheduler.step(x * t / (t + 1), t, x, generator=generator).prev_sample
    assert x.abs().sum().item() == pytest.approx(total, abs=1e-3)


def test_the_variance_and_previous_timestep_that_pipelines_ask_for():
    fused, original = (c(variance_type="fixed_small") for c in (FusedDDPMScheduler, diffusers.DDPMScheduler))
    for t in (487, 999):
        torch.testing.assert_close(fused._get_variance(t), original._get_variance(t), atol=1e-7, rtol=1e-5)
    assert fused._get_variance(0) == 0
    fused.set_timesteps(timesteps=[100, 87, 50, 1, 0])
    before = [fused.previous_timestep(t).item() for t in fused.timesteps]
    assert before == [87, 50, 1, 0, -1]
    fused, original = FusedDDIMScheduler(), diffusers.DDIMScheduler()
    for pair in ((420, 400), (980, 960), (487, 486), (999, 998)):
        torch.testing.assert_close(
            fused._get_variance(*pair), original._get_variance(*pair), atol=1e-6, rtol=1e-4
        )


def test_settings_of_other_schedulers_that_would_matter_are_refused():
    with pytest.raises(ValueError, match="has no timestep_type"):
        FusedDDIMScheduler.from_config(diffusers.EulerDiscreteScheduler(timestep_type="continuous").config)
    karras = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True).config
    flow = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction"
    ).config
    for cls in VP:
        with pytest.raises(ValueError, match="has no use_karras_sigmas"):
            cls.from_config(karras)
        with pytest.raises(ValueError, match="has no use_flow_sigmas"):
            cls.from_config(flow)
        with pytest.raises(ValueError, match="has no shift"):
            cls.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    with pytest.raises(ValueError, match="has no beta_"):
        FusedFlowMatchEulerScheduler.from_config(diffusers.DDPMScheduler(beta_start=0.001).config)


def test_clear_errors():
    ddpm, ddim, flow = (cls() for cls in FUSED)
    x = start()
    with pytest.raises(ValueError, match="call set_timesteps first"):
        ddim.step(x, 10, x)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        flow.step(x, torch.tensor(1000.0), x)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="between 1 and"):
            ddim.set_timesteps(steps)
    for given in ({}, dict(num_inference_steps=5, timesteps=[3])):
        with pytest.raises(ValueError, match="either num_inference_steps or timesteps"):
            ddpm.set_timesteps(**given)
    for chosen, message in (([1, 2], "descending"), ([1000, 1], "0..999"), ([5, -1], "0..999")):
        with pytest.raises(ValueError, match=message):
            ddpm.set_timesteps(timesteps=chosen)
    for t, message in (
        (1000, "outside"),
        (-1, "outside"),
        (3.5, "integers"),
        (torch.tensor(3.0), "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            ddpm.step(x, t, x)
    with pytest.raises(ValueError, match="sample's shape"):
        ddpm.step(torch.cat([x, x]), 10, x)
    with pytest.raises(ValueError, match="learned variances"):
        ddpm.step(torch.cat([x, x], 1), 10, x)
    with pytest.raises(TypeError, match="float64"):
        ddpm.step(x.double(), 10, x)
    with pytest.raises(RuntimeError, match="no derivative"):
        ddpm.step(x.clone().requires_grad_(), 10, x)
    ddim.set_timesteps(10)
    with pytest.raises(ValueError, match="eta"):
        ddim.step(x, 10, x, eta=1.5)
    with pytest.raises(ValueError, match="not both"):
        ddim.step(x, 10, x, eta=1.0, generator=torch.Generator(), variance_noise=x)
    for given in (
        {},
        dict(sigmas=[]),
        dict(num_inference_steps=3, sigmas=[1.0]),
        dict(sigmas=[1, 0], timesteps=[1]),
    ):
        with pytest.raises(ValueError, match="as many of each"):
            flow.set_timesteps(**given)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        flow.set_timesteps(sigmas=[1.5, 0.5])
    with pytest.raises(ValueError, match="from noise to data"):
        flow.set_timesteps(sigmas=[0.5, 0.8])
    with pytest.raises(ValueError, match="needs mu"):
        FusedFlowMatchEulerScheduler(use_dynamic_shifting=True).set_timesteps(4)
    with pytest.raises(ValueError, match="below 1"):
        FusedFlowMatchEulerScheduler(shift_terminal=0.1).set_timesteps(1)
    flow.set_timesteps(4)
    for index in (0, torch.tensor(0)):
        with pytest.raises(ValueError, match="not the index"):
            flow.step(x, index, x)
    with pytest.raises(ValueError, match="s_churn"):
        flow.step(x, flow.timesteps[0], x, s_churn=1.0)
    with pytest.raises(ValueError, match="per_token"):
        flow.step(x, flow.timesteps[0], x, per_token_timesteps=x)
    with pytest.raises(ValueError, match="share"):
        FusedFlowMatchEulerScheduler(invert_sigmas=True).scale_noise(x, flow.timesteps[:1], x)
    with pytest.raises(ValueError, match="shift must be positive"):
        flow.set_shift(0.0)


def stable_diffusion(demo_pipeline, scheduler, cls=diffusers.StableDiffusionPipeline):
    """diffusers' pipeline on the demo's components, with Sol's UNet."""
    pipe = cls(
        vae=demo_pipeline.vae,
        text_encoder=demo_pipeline.text_encoder,
        tokenizer=demo_pipeline.tokenizer,
        unet=demo_pipeline.unet_sol,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize(
    ("cls", "settings", "call", "most"),
    [
        (FusedDDPMScheduler, {}, {}, 1e-4),
        # Behind the first step the UNet, in float64 too, makes 2e-4 of what one rounding made of the state.
        (FusedDDPMScheduler, {}, dict(num_inference_steps=None, timesteps=[999, 500, 100]), 1e-3),
        (FusedDDIMScheduler, {}, dict(eta=0.5), 1e-4),
        (FusedDDIMScheduler, dict(clip_sample=True, steps_offset=0), {}, 1e-4),  # the pipeline corrects both
    ],
)
def test_in_stable_diffusion(demo_pipeline, cls, settings, call, most):
    config = dict(prediction_type="v_prediction", clip_sample=False, steps_offset=1) | settings
    images = []
    for scheduler in (cls(**config), ORIGINALS[cls](**config)):
        pipe = stable_diffusion(demo_pipeline, scheduler)
        images.append(
            pipe(
                "a castle with two towers, at dusk",
                generator=torch.Generator().manual_seed(1),
                output_type="np",
                **dict(num_inference_steps=3, guidance_scale=3.0) | call,
            ).images
        )
    np.testing.assert_allclose(*images, atol=most)
    assert np.ptp(images[0]) > 0.5


def test_in_image_to_image(demo_pipeline):
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = []
    for cls in (FusedDDIMScheduler, diffusers.DDIMScheduler):
        scheduler = cls(prediction_type="v_prediction", clip_sample=False, steps_offset=1)
        pipe = stable_diffusion(demo_pipeline, scheduler, diffusers.StableDiffusionImg2ImgPipeline)
        images.append(
            pipe(
                "a castle",
                image=picture,
                strength=0.6,
                num_inference_steps=6,
                guidance_scale=2.0,
                generator=torch.Generator().manual_seed(5),
                output_type="np",
            ).images
        )
    np.testing.assert_allclose(*images, atol=1e-4)


def test_a_pipeline_with_a_fused_scheduler_is_saved_and_loaded(demo_pipeline, tmp_path):
    fused = FusedDDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    pipe = stable_diffusion(demo_pipeline, fused)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path, tokenizer=pipe.tokenizer, safety_checker=None
    )
    assert type(loaded.scheduler) is FusedDDIMScheduler
    assert loaded.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("config", [dict(shift=3.0), dict(use_dynamic_shifting=True)])
def test_in_flux(config):
    """A flow pipeline: sigmas, mu and a begin index come from it."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ).eval()
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=1, latent_channels=1, shift_factor=0.0, scaling_factor=1.0
    ).eval()
    embeds = dict(prompt_embeds=torch.randn(1, 6, 32), pooled_prompt_embeds=torch.randn(1, 32))
    images = []
    for cls in (FusedFlowMatchEulerScheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        pipe = diffusers.FluxPipeline(
            scheduler=cls(**config),
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=transformer,
        )
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        settings = dict(height=16, width=16, num_inference_steps=4, output_type="np")
        images.append(pipe(**embeds, **settings, generator=generator).images)
        assert pipe.scheduler.step_index == 4 and pipe.scheduler.begin_index == 0
    np.testing.assert_allclose(*images, atol=1e-4)
    assert np.ptp(images[0]) > 0.1


@pytest.mark.parametrize("scheduler", [FusedDDIMScheduler, FusedDDPMScheduler, FusedFlowMatchEulerScheduler])
def test_a_scheduler_is_made_from_a_config_that_is_given(scheduler):
    with pytest.raises(ValueError, match="give the config"):
        scheduler.from_config()
