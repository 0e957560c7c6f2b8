"""The distributions of training times, against their closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from moe_sampler.tinyflux.training.noise_curve import NoiseCurve
from moe_sampler.tinyflux.training.time_settings import TimeSettings
from moe_sampler.tinyflux.training.times import sample_noise
from moe_sampler.training.draws import Draws
from moe_sampler.training.settings import SettingsError, from_tables

COUNT = 4096


def draws(step=0, places=range(COUNT), total=COUNT) -> Draws:
    return Draws(3, step, places, total)


def distance(noise: torch.Tensor, cdf) -> float:
    """Kolmogorov's, between what was drawn and a distribution function."""
    expected = np.sort(cdf(np.sort(noise.double().numpy())))
    steps = np.arange(len(expected) + 1) / len(expected)
    return max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())


def logit(s):
    return np.log(s) - np.log1p(-s)


# A shift by k moves the logit by ln k, whatever the distribution.
DISTRIBUTIONS = {
    "plain": ({}, lambda s: norm.cdf(logit(s))),
    "narrow and noisy": ({"mean": 0.7, "std": 0.5}, lambda s: norm.cdf((logit(s) - 0.7) / 0.5)),
    "shifted": ({"shift": 3.0}, lambda s: norm.cdf(logit(s) - math.log(3.0))),
    "uniform": ({"sampling": "uniform"}, lambda s: s),
    "uniform, shifted": (
        {"sampling": "uniform", "shift": 0.5},
        lambda s: 1 / (1 + np.exp(-(logit(s) + math.log(2.0)))),
    ),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_levels_have_their_distribution(name):
    settings, cdf = DISTRIBUTIONS[name]
    found = sample_noise(TimeSettings(stratified=False, **settings), draws())
    assert found.dtype == torch.float32 and found.shape == (COUNT,)
    # 1.95/√n is passed once in a thousand; the draws are fixed.
    assert 0.1 / COUNT**0.5 < distance(found, cdf) < 1.95 / COUNT**0.5
    stratified = sample_noise(TimeSettings(stratified=True, **settings), draws())
    assert distance(stratified, cdf) < 1.1 / COUNT
    # In random order: neighbours have nothing in common.
    ranks = stratified.argsort().argsort().double()
    assert abs(torch.corrcoef(torch.stack([ranks[1:], ranks[:-1]]))[0, 1]) < 0.06


@pytest.mark.parametrize("stratified", [False, True])
def test_a_sample_has_its_level_whatever_the_micro_batch(stratified):
    settings = TimeSettings(stratified=stratified, shift=2.0)
    whole = sample_noise(settings, draws(5, range(12), 12))
    parts = [sample_noise(settings, draws(5, range(i, i + 3), 12)) for i in (0, 3, 6, 9)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(sample_noise(settings, draws(6, range(12), 12)), whole)


@pytest.mark.parametrize("mean", [-60.0, 60.0])
def test_the_ends_are_never_reached(mean):
    found = sample_noise(TimeSettings(mean=mean), draws(0, range(8), 8))
    end = 1e-4 if mean < 0 else 1 - 1e-4
    assert found.tolist() == pytest.approx([end] * 8, abs=1e-7)
    assert (1 - found > 0).all() and (found < 1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"std": 0.0}, "std"),
        ({"shift": -1.0}, "shift"),
        ({"mean": math.nan}, "mean"),
        ({"sampling": "cosine"}, "logit_normal, uniform"),
        ({"shfit": 2.0}, 'did you mean "shift"'),
    ],
)
def test_times_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        from_tables(TimeSettings, settings)


def test_a_curve_is_linear_between_its_knots():
    curve = NoiseCurve.parse("1:0.8, 0.25:0, 0.5:0.6")
    levels = torch.linspace(0, 1, 41)
    expected = np.interp(levels.numpy(), [0.25, 0.5, 1.0], [0.0, 0.6, 0.8])
    np.testing.assert_allclose(curve(levels).numpy(), expected, atol=1e-6)
    assert NoiseCurve.parse("0.3")(levels).tolist() == pytest.approx([0.3] * 41)


@pytest.mark.parametrize("text", ["", "a", "1:2:3", "0.5:1,0.5:0", "2:1", "0.5:inf", "0.5:1,"])
def test_a_curve_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="curve"):
        NoiseCurve.parse(text)
