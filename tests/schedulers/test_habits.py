"""Where the schedulers' tensors live, what may change around them, and how often they do their work."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from moe_sampler import FusedDDIMScheduler, FusedDDPMScheduler, FusedFlowMatchEulerScheduler

SHAPE = (2, 4, 8, 8)
RUNS = [
    pytest.param(FusedDDPMScheduler, {}, {}, id="ddpm"),
    pytest.param(FusedDDIMScheduler, {}, dict(eta=1.0), id="ddim"),
    pytest.param(FusedDDIMScheduler, {}, {}, id="ddim without noise"),
    pytest.param(FusedFlowMatchEulerScheduler, {}, {}, id="flow"),
    pytest.param(FusedFlowMatchEulerScheduler, dict(stochastic_sampling=True), {}, id="stochastic flow"),
]


def start(seed: int, device: str = "cpu") -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(device)


def run(cls, config, options, device: str = "cpu") -> torch.Tensor:
    """A few steps, whose model answers a fixed tensor."""
    scheduler = cls(**config)
    scheduler.set_timesteps(4, device=device)
    assert scheduler.timesteps.device.type == device
    x = start(0, device)
    generator = torch.Generator().manual_seed(3) if device == "cpu" else None
    for t in scheduler.timesteps:
        output = scheduler.step(start(1, device), t, x, generator=generator, **options)
        x = output.prev_sample
        assert all(
            tensor.device.type == device and tensor.dtype == torch.float32 for tensor in output.values()
        )
    return x


@pytest.mark.parametrize(("cls", "config", "options"), RUNS)
def test_everything_is_where_the_sample_is(cls, config, options):
    """torch's "meta" device has shapes only: whatever stayed on the host would not mix with it."""
    assert run(cls, config, options, "meta").shape == SHAPE
    scheduler, x = cls(), start(0, "meta")
    scheduler.set_timesteps(4)
    times = scheduler.timesteps[:2]
    noised = scheduler.add_noise if hasattr(scheduler, "add_noise") else scheduler.scale_noise
    for result in (
        noised(x, noise=x, **{"timesteps" if hasattr(scheduler, "add_noise") else "timestep": times}),
        *([scheduler.get_velocity(x, x, times)] if hasattr(scheduler, "get_velocity") else []),
    ):
        assert result.device.type == "meta" and result.shape == SHAPE


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cls", "config", "options"), RUNS)
def test_torchs_default_dtype_is_no_business_of_theirs(cls, config, options, dtype):
    expected = run(cls, config, options)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(run(cls, config, options), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("one", [True, False])
def test_what_pipelines_read_of_a_scheduler_is_diffusers_own(one):
    """ControlNets, inversions and the like look behind the interface."""
    config = dict(set_alpha_to_one=one, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    fused, original = FusedDDIMScheduler(**config), diffusers.DDIMScheduler(**config)
    for scheduler in (fused, original):
        scheduler.set_timesteps(10)
    torch.testing.assert_close(fused.final_alpha_cumprod, torch.as_tensor(original.final_alpha_cumprod))
    torch.testing.assert_close(fused.alphas_cumprod, original.alphas_cumprod)
    torch.set_default_dtype(torch.float64)
    try:
        for t, previous in ((900, 800), (100, 0), (0, -100)):
            mine, theirs = (scheduler._get_variance(t, previous) for scheduler in (fused, original))
            torch.testing.assert_close(mine, theirs, atol=1e-7, rtol=1e-4)
        ddpm = FusedDDPMScheduler()
        dtypes = {ddpm._get_variance(5).dtype, fused.final_alpha_cumprod.dtype, ddpm.betas.dtype}
    finally:
        torch.set_default_dtype(torch.float32)
    assert dtypes == {torch.float32}


HALVES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("answer", HALVES, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("cls", [FusedDDPMScheduler, FusedDDIMScheduler, FusedFlowMatchEulerScheduler])
def test_a_step_comes_back_in_diffusers_dtype(cls, dtype, answer):
    """Where sample and model output have one each, too."""
    original = getattr(diffusers, cls.__name__.replace("Fused", "").replace("EulerS", "EulerDiscreteS"))
    results = []
    for scheduler in (cls(), original()):
        scheduler.set_timesteps(4)
        t = scheduler.timesteps[3]
        output = scheduler.step(
            start(1).to(answer), t, start(0).to(dtype), generator=torch.Generator().manual_seed(1)
        )
        results.append({name: value.dtype for name, value in output.items()})
    assert results[0] == results[1]


@pytest.mark.parametrize(("cls", "config", "options"), RUNS)
def test_a_config_is_compiled_once(cls, config, options, monkeypatch):
    """And again after it has changed, with the tables that follow from it."""
    compiled = []
    real = cls._compile_config
    monkeypatch.setattr(cls, "_compile_config", lambda self: (compiled.append(1), real(self))[1])
    scheduler = cls(**config)
    for _ in range(2):
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            scheduler.step(start(1), t, start(0), **options)
    assert len(compiled) == 1
    scheduler.register_to_config(num_train_timesteps=500)
    scheduler.set_timesteps(4)
    assert len(compiled) == 2 and scheduler.timesteps.max() <= 500


# Of another kind of noise level, and one that needs a package which isn't installed.
ON_BETAS = [
    each.name
    for each in KarrasDiffusionSchedulers
    if each.name not in ("EDMEulerScheduler", "DPMSolverSDEScheduler")
]


@pytest.mark.parametrize("name", ON_BETAS)
@pytest.mark.parametrize("cls", [FusedDDPMScheduler, FusedDDIMScheduler])
def test_a_relatives_config_is_understood(cls, name):
    """All of diffusers' schedulers on betas, with their defaults: how they step is their own business."""
    betas = dict(beta_start=0.0009, beta_end=0.013, beta_schedule="scaled_linear", num_train_timesteps=700)
    ours = cls.from_config(getattr(diffusers, name)(**betas).config)
    assert betas.items() <= dict(ours.config).items()
    with pytest.raises(ValueError, match="has no sigma_m"):
        cls.from_config(diffusers.EDMEulerScheduler().config)


def test_what_a_config_leaves_over_is_handed_back_on_request():
    config = {**diffusers.DDPMScheduler(beta_end=0.015).config}
    made, left = FusedDDPMScheduler.from_config(config, return_unused_kwargs=True, own=None)
    assert isinstance(made, FusedDDPMScheduler) and made.config["beta_end"] == 0.015 and left == {"own": None}
    assert isinstance(FusedDDPMScheduler.from_config(config), FusedDDPMScheduler)


@pytest.mark.parametrize("wrong", [[5, 5], [900, 400, 400, 3], [3, 900], []], ids=str)
def test_timesteps_of_ones_own_descend(wrong):
    scheduler = FusedDDPMScheduler()
    with pytest.raises(ValueError, match="descending"):
        scheduler.set_timesteps(timesteps=wrong)


@pytest.mark.parametrize("cls", [FusedDDPMScheduler, FusedDDIMScheduler])
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        (
            "DPMSolverMultistepScheduler",
            dict(
                solver_order=3,
                algorithm_type="sde-dpmsolver++",
                solver_type="heun",
                final_sigmas_type="sigma_min",
                lower_order_final=False,
                euler_at_final=True,
            ),
        ),
        ("UniPCMultistepScheduler", dict(solver_type="bh1", predict_x0=True, disable_corrector=[0, 1])),
        ("PNDMScheduler", dict(skip_prk_steps=True, set_alpha_to_one=True)),
        ("EulerDiscreteScheduler", dict(interpolation_type="log_linear")),
        ("DEISMultistepScheduler", dict(solver_order=3, solver_type="logrho", lower_order_final=False)),
    ],
)
def test_how_another_solver_steps_is_its_own_business(cls, name, steps):
    other = getattr(diffusers, name)(**steps)
    assert {**cls.from_config(other.config).config}["beta_end"] == 0.02
    assert steps.items() <= {**other.config}.items()


def test_sigmas_are_numbers_whatever_holds_them():
    """A half-precision array's sigmas are numbers like any, and computed with like any."""
    coarse = np.array([1.0, 0.7, 0.31, 0.1], dtype=np.float16)
    found = []
    for given in (coarse, coarse.astype(np.float64), torch.from_numpy(coarse), coarse.tolist()):
        scheduler = FusedFlowMatchEulerScheduler(shift=3.0)
        scheduler.set_timesteps(sigmas=given)
        found.append(torch.stack([scheduler.timesteps, scheduler.sigmas[:-1]]))
    exact = 3.0 * coarse.astype(np.float64) / (1.0 + 2.0 * coarse.astype(np.float64))
    np.testing.assert_allclose(found[0][1].numpy(), exact, rtol=1e-7)
    assert all(torch.equal(each, found[0]) for each in found)
    scheduler = FusedFlowMatchEulerScheduler(shift_terminal=0.1)
    scheduler.set_timesteps(sigmas=[1, 0.5])
    whole = scheduler.sigmas
    scheduler.set_timesteps(sigmas=np.array([1, 0]))
    assert whole[1] == pytest.approx(0.1) and scheduler.sigmas[1] == pytest.approx(0.1)
