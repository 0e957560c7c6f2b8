from __future__ import annotations

import math

import numpy as np
import pytest

from moe_sampler import Expert, FlowPath, Level, VPPath, plan
from moe_sampler.sampling.predictions import PREDICTIONS, x0_coefficients
from moe_sampler.sampling.scheduler_configs import path_from_scheduler_config, vp_path_from_config

PATHS = [VPPath.linear(), VPPath.scaled_linear(), FlowPath(), FlowPath(1.0, data_at_one=True)]


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_timesteps_and_levels_are_inverse(path):
    last = path.num_train_timesteps - 1 if path.discrete else path.timestep_scale
    for timestep in np.linspace(0.003 * last, 0.997 * last, 57):
        assert path.timestep(path.level(timestep)) == pytest.approx(timestep, abs=1e-9 * last)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("noise", [0.02, 0.3, 0.5, 0.7, 0.99])
def test_a_noise_level_is_the_same_on_every_path(path, noise):
    level = path.at(noise)
    assert level.noise == pytest.approx(noise, rel=1e-14)
    assert level.half_log_snr == pytest.approx(math.log((1 - noise) / noise), abs=1e-12)
    norm = level.alpha**2 + level.sigma**2 if path.discrete else level.alpha + level.sigma
    assert norm == pytest.approx(1.0, rel=1e-14)


def test_levels_at_the_ends():
    assert Level(0.0, 1.0).half_log_snr == -math.inf and Level(0.0, 1.0).noise == 1.0
    assert Level(1.0, 0.0).half_log_snr == math.inf and Level(1.0, 0.0).noise == 0.0
    path = VPPath.linear()
    assert path.timestep(Level(0.0, 1.0)) == 999 and path.timestep(Level(1.0, 0.0)) == 0
    for beyond in (-1, 1000, math.nan):
        with pytest.raises(ValueError, match="outside"):
            path.level(beyond)
    with pytest.raises(ValueError, match="outside"):
        FlowPath().level(1001)


def test_abar_by_its_definition():
    betas = np.linspace(1e-4, 0.02, 1000)
    abar = 1.0
    for t, beta in enumerate(betas):
        abar *= 1 - beta
        level = VPPath.linear().level(t)
        assert level.alpha == pytest.approx(math.sqrt(abar), rel=1e-12)
        assert level.sigma == pytest.approx(math.sqrt(1 - abar), rel=1e-11)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_from_every_prediction_on_every_path(path, prediction):
    x0, epsilon = 0.37, -1.21
    for noise in (0.1, 0.5, 0.9):
        level = path.at(noise)
        output = {
            "epsilon": epsilon,
            "v_prediction": level.alpha * epsilon - level.sigma * x0,
            "flow_prediction": epsilon - x0,
            "reversed_flow_prediction": x0 - epsilon,
            "sample": x0,
        }[prediction]
        p, q = x0_coefficients(prediction, level)
        assert p * (level.alpha * x0 + level.sigma * epsilon) + q * output == pytest.approx(x0, abs=1e-13)


def test_paths_from_scheduler_configs():
    import diffusers

    def read(scheduler):
        return path_from_scheduler_config({**scheduler.config, "_class_name": type(scheduler).__name__})

    assert read(diffusers.DDPMScheduler()) == VPPath.linear()
    sd15 = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert read(sd15) == VPPath.scaled_linear()
    assert read(diffusers.DDPMScheduler(trained_betas=[0.1, 0.2, 0.3])) == VPPath((0.1, 0.2, 0.3))
    assert read(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)) == FlowPath()
    assert read(diffusers.DDIMScheduler(steps_offset=1)).steps_offset == 1
    for config in (
        dict(beta_schedule="squaredcos_cap_v2"),
        dict(beta_schedule="sigmoid"),
        dict(rescale_betas_zero_snr=True),
        dict(rescale_betas_zero_snr=True, trained_betas=[0.1, 0.2, 0.3]),
    ):
        scheduler = diffusers.DDPMScheduler(**config)
        expected = scheduler.alphas_cumprod.double().numpy()
        assert read(scheduler).alphas ** 2 == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="beta_schedule"):
        path_from_scheduler_config(
            {**sd15.config, "_class_name": "DDPMScheduler", "beta_schedule": "laplace"}
        )
    for betas in ((0.1, 1.2), (1.0, 0.5), (0.0, 0.1), ()):
        with pytest.raises(ValueError, match="beta"):
            VPPath(betas)


def test_a_path_without_signal_at_its_end():
    path = vp_path_from_config({"rescale_betas_zero_snr": True})
    assert path.level(999) == Level(0.0, 1.0) and path.betas[-1] == 1.0
    # The first level stays, the others lose signal in proportion (arXiv:2305.08891, algorithm 1).
    before = VPPath.linear().alphas
    wanted = before[0] * (before - before[-1]) / (before[0] - before[-1])
    assert path.alphas == pytest.approx(wanted, abs=1e-12)
    assert path.timestep(Level(0.0, 1.0)) == 999
    noises = [path.level(t).noise for t in (997.0, 998.0, 998.3, 998.6, 998.9, 999.0)]
    assert noises == sorted(noises) and len(set(noises)) == 6
    for t in (0, 3.5, 700.2, 998.5, 999):
        assert path.timestep(path.level(t)) == pytest.approx(t, abs=1e-9)


def test_experts_from_scheduler_configs():
    config = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "clip_sample": True}
    expert = Expert.from_scheduler_config("x", config | {"timestep_spacing": "leading"}, guidance_scale=3.0)
    assert (expert.solver, expert.prediction, expert.spacing) == ("ddim", "v_prediction", "leading")
    assert expert.clip_sample_range == 1.0 and expert.guidance_scale == 3.0
    flow = Expert.from_scheduler_config("x", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert (flow.solver, flow.prediction, flow.shift) == ("euler", "flow_prediction", 3.0)
    assert Expert.from_scheduler_config("x", config, solver="dpmpp_2m", shift=None).solver == "dpmpp_2m"
    with pytest.raises(ValueError, match="LCMScheduler"):
        Expert.from_scheduler_config("x", {"_class_name": "LCMScheduler"})


def test_a_path_of_your_own():
    class Cosine:
        """alpha = cos(pi / 2 * t), in continuous time."""

        discrete = False

        def at(self, noise):
            norm = math.hypot(noise, 1 - noise)
            return Level((1 - noise) / norm, noise / norm)

        def timestep(self, level):
            return math.atan2(level.sigma, level.alpha) / (math.pi / 2)

        def level(self, timestep):
            return Level(math.cos(math.pi / 2 * timestep), math.sin(math.pi / 2 * timestep))

        def initial_scale(self, level):
            return level.sigma

        def grid(self, steps, start, end, shift, spacing):
            return [start + (end - start) * i / steps for i in range(steps)]

    from moe_sampler import plan

    compiled = plan(Expert("mine", Cosine(), "v_prediction"), steps=4)
    assert [c.timestep for s in compiled.steps for c in s.calls] == pytest.approx(
        [1.0, math.atan2(3, 1) / (math.pi / 2), 0.5, math.atan2(1, 3) / (math.pi / 2)]
    )
    with pytest.raises(TypeError, match="VPPath"):
        Expert("mine", object(), "v_prediction")


def test_nodes_are_trailing_unless_said_otherwise():
    """As plans have them: a grid of one's own router or figure is a plan's."""
    path = VPPath.linear()
    assert path.grid(7) == path.grid(7, spacing="trailing") != path.grid(7, spacing="leading")
    assert path.grid(7) == list(plan(Expert("one", path, "epsilon"), steps=7).noise_levels)
    flow = FlowPath()
    assert flow.grid(7) == list(plan(Expert("one", flow, "flow_prediction", shift=1.0), steps=7).noise_levels)


@pytest.mark.parametrize("path", [VPPath.linear(), VPPath.scaled_linear(num_train_timesteps=50)], ids=repr)
def test_the_nearest_timestep_is_the_nearest(path):
    """By ln(alpha / sigma), among all there are; beyond the ends it is the end."""
    every = np.array([path.level(t).half_log_snr for t in range(path.num_train_timesteps)])
    for noise in np.linspace(1e-4, 1 - 1e-4, 301).tolist():
        wanted = int(np.abs(every - math.log((1 - noise) / noise)).argmin())
        assert path.nearest_timestep(noise) == wanted, noise
