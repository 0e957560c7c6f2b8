"""The experts' objectives against diffusers' schedulers and the formulas by hand."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from moe_sampler.expert_training import ExpertSettings, LevelSettings, Objective
from moe_sampler.kernels import philox_normal
from moe_sampler.loading.parts import scheduler_from_config
from moe_sampler.training.draws import Draws
from moe_sampler.training.settings import SettingsError

MANY = Draws(0, 0, range(20_000), 20_000)


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(count, 4, 5, 3, generator=generator) for _ in range(2))


@pytest.mark.parametrize(
    "kind, betas, schedule, bounds",
    [
        ("sol", None, "linear", (1e-4, 0.02)),
        ("sol", "scaled_linear", "scaled_linear", (0.00085, 0.012)),
        ("epsilon", None, "scaled_linear", (0.00085, 0.012)),
        ("epsilon", "linear", "linear", (1e-4, 0.02)),
    ],
)
def test_the_ddpm_objectives_are_diffusers(kind, betas, schedule, bounds):
    objective = Objective(kind, ExpertSettings(beta_schedule=betas))
    x0, noise = batch()
    levels = objective.draw(Draws(1, 2, range(6), 6))
    assert levels.told.dtype == torch.int64
    pair = objective.pair(x0, levels, noise=noise)
    reference = DDPMScheduler(beta_schedule=schedule, beta_start=bounds[0], beta_end=bounds[1])
    timesteps = levels.told
    torch.testing.assert_close(pair.noisy, reference.add_noise(x0, noise, timesteps), rtol=1e-5, atol=1e-6)
    target = noise if kind == "epsilon" else reference.get_velocity(x0, noise, timesteps)
    torch.testing.assert_close(pair.target, target, rtol=1e-5, atol=1e-6)
    assert torch.equal(pair.timestep, timesteps)
    alphas = reference.alphas_cumprod.double()[timesteps].sqrt()
    share = (1 - alphas**2).sqrt() / (alphas + (1 - alphas**2).sqrt())
    torch.testing.assert_close(levels.noise, share, rtol=1e-3, atol=1e-5)


def test_lune_is_the_flow_told_1000_times_s():
    objective = Objective("lune")
    x0, noise = batch()
    s = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)
    levels = objective.at(s)
    pair = objective.pair(x0, levels, noise=noise)
    column = s.float().view(-1, 1, 1, 1)
    torch.testing.assert_close(pair.noisy, x0 + column * (noise - x0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pair.target, noise - x0)
    torch.testing.assert_close(pair.timestep, 1000 * s.float())
    assert torch.equal(levels.noise, s)


@pytest.mark.parametrize("kind", ["sol", "lune", "epsilon"])
def test_the_answer_gives_back_the_data(kind):
    objective = Objective(kind)
    x0, noise = batch()
    levels = objective.draw(Draws(3, 0, range(6), 6))
    pair = objective.pair(x0, levels, noise=noise)
    recovered = objective.x0(pair.target, pair.noisy, levels)
    # An epsilon divides its rounding error by alpha, which is small where there is much noise.
    error = (recovered - x0).abs().amax((1, 2, 3)) * (levels.alpha if kind == "epsilon" else 1)
    assert error.max() < 1e-5


def test_noise_comes_from_the_seeds():
    objective = Objective("sol")
    x0, _ = batch()
    draws = Draws(0, 5, range(6), 6)
    levels, seeds = objective.draw(draws), draws.seeds("noise")
    ours = objective.pair(x0, levels, seeds=seeds)
    theirs = objective.pair(x0, levels, noise=philox_normal(x0.shape, seeds))
    torch.testing.assert_close(ours.noisy, theirs.noisy)
    torch.testing.assert_close(ours.target, theirs.target)


def quantiles(values) -> np.ndarray:
    return np.quantile(np.asarray(values, dtype=np.float64), np.linspace(0.05, 0.95, 19))


def test_uniform_levels():
    told = Objective("epsilon").draw(MANY).told
    np.testing.assert_allclose(quantiles(told), np.linspace(50, 950, 19), atol=1.5)
    assert told.min() == 0 and told.max() == 999
    flow = Objective("lune", levels=LevelSettings(density="uniform")).draw(MANY)
    np.testing.assert_allclose(quantiles(flow.noise), np.linspace(0.05, 0.95, 19), atol=1e-3)


@pytest.mark.parametrize("kind", ["sol", "lune"])
@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
def test_shifted_levels(kind, shift):
    """The flow's density on both paths, as diffusers shifts sigmas."""
    drawn = Objective(kind, levels=LevelSettings(density="shifted", shift=shift)).draw(MANY)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=20, shift=shift)
    expected = scheduler.sigmas.flip(0)[:-1].numpy()[:19]
    # A DDPM path has a thousand levels, the noisiest of them 0.006 apart.
    np.testing.assert_allclose(quantiles(drawn.noise), expected, atol=1e-3 if kind == "lune" else 7e-3)


def test_focused_levels():
    settings = LevelSettings(density="focus", focus=0.5, focus_share=0.9)
    noise = Objective("lune", levels=settings).draw(MANY).noise.numpy()
    # Nine tenths below one half, and half of the last tenth too.
    assert (noise < 0.5).mean() == pytest.approx(0.95, abs=0.01)
    assert np.histogram(noise, 10, (0, 1))[0][5:] / 20_000 == pytest.approx([0.01] * 5, abs=0.004)


def test_the_nearest_timestep_is_taken():
    objective = Objective("sol")
    shares = objective.path.sigmas / (objective.path.alphas + objective.path.sigmas)
    wanted = np.random.default_rng(0).uniform(size=300)
    found = objective.at(torch.from_numpy(wanted))
    nearest = np.abs(shares[None] - wanted[:, None]).argmin(1)
    np.testing.assert_array_equal(found.told.numpy(), nearest)


def test_min_snr_weighs_the_error_of_x0():
    """min(SNR, gamma) times the squared error of x0, for every prediction (arXiv:2303.09556)."""
    gamma = 3.0
    x0, noise = batch()
    generator = torch.Generator().manual_seed(9)
    for kind in ("sol", "lune", "epsilon"):
        objective = Objective(kind, levels=LevelSettings(density="uniform", min_snr_gamma=gamma))
        levels = objective.at(torch.linspace(0.1, 0.7, 6, dtype=torch.float64))
        pair = objective.pair(x0, levels, noise=noise)
        answer = pair.target + 0.1 * torch.randn(x0.shape, generator=generator)
        snr = (levels.alpha / levels.sigma).double() ** 2
        error = (objective.x0(answer, pair.noisy, levels) - x0).double().square().mean((1, 2, 3))
        ours = objective.errors(answer, pair.target, levels)
        torch.testing.assert_close(ours.double(), snr.clamp(max=gamma) * error, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["sol", "lune", "epsilon"])
def test_the_scheduler_says_what_was_trained(kind):
    scheduler = scheduler_from_config(Objective(kind, levels=LevelSettings(shift=2.5)).scheduler)
    if kind == "lune":
        assert scheduler.config.shift == 2.5
    else:
        wanted = {"sol": "v_prediction", "epsilon": "epsilon"}[kind]
        assert scheduler.config.prediction_type == wanted


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Objective("luna"), 'no kind of expert "luna"; did you mean "lune"'),
        (lambda: Objective("lune", ExpertSettings(beta_schedule="linear")), "leave beta_schedule out"),
        (lambda: LevelSettings(shift=0.0), "shift must be positive"),
        (lambda: LevelSettings(focus=0.0), "focus must lie"),
        (lambda: LevelSettings(focus_share=1.1), "focus_share must lie"),
        (lambda: LevelSettings(min_snr_gamma=-1.0), "min_snr_gamma must be positive"),
        (lambda: ExpertSettings(caption_dropout=2.0), "caption_dropout must lie"),
        (lambda: ExpertSettings(num_inference_steps=0), "num_inference_steps must be at least 1"),
    ],
)
def test_wrong_settings_say_so(make, message):
    with pytest.raises(SettingsError, match=message):
        make()
