"""Levels from measured curvature, on curves and models whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.demo import curvature
from bench.demo.curvature import CLEANEST, SOL_STEPS, STEP_ERRORS, Curve, even_in_log_snr, plan_of
from bench.pages import renew
from moe_sampler import Expert, plan, sample

pytestmark = pytest.mark.usefixtures("one_thread")


def log_snr(levels):
    return np.log(1.0 / np.asarray(levels) - 1.0)


@pytest.mark.parametrize(("solver", "power"), [("euler", 1), ("dpmpp_2m", 2)])
def test_derivatives_are_those_of_the_predictions(solver, power):
    noise = even_in_log_snr(400, 0.9)
    at = log_snr(noise)
    x0 = np.stack([np.exp(-0.5 * at), np.ones_like(at)], axis=1)
    curve = Curve.of(solver, noise, x0)
    variance = np.mean(x0[-1] ** 2)
    expected = 0.5**power * np.exp(-0.5 * at) / np.sqrt(2) / np.sqrt(1 + np.exp(-2 * at) / variance)
    np.testing.assert_allclose(curve.density[3:-3], expected[3:-3], rtol=1e-3)
    assert curve.rest[-1] == 0.0 and (np.diff(curve.rest) < 0).all()


@pytest.mark.parametrize("order", [1, 2])
def test_steps_err_alike(order):
    at = np.linspace(-2.0, 6.0, 4001)
    curve = Curve(order, 0.5, at, np.exp(-at), np.zeros_like(at))
    found = curve.levels(9)
    assert found[0] == pytest.approx(1 / (1 + np.exp(-2.0))) and list(found) == sorted(found, reverse=True)
    share = np.exp(-log_snr(found) / (order + 1))  # the integral of density^(1 / (p + 1)), but for a factor
    np.testing.assert_allclose(np.diff(share), np.diff(share)[0], rtol=1e-3)


def test_more_steps_go_further_down():
    at = np.linspace(-2.0, 6.0, 400)
    curve = Curve(2, 0.5, at, np.exp(-at), np.exp(-at) - np.exp(-6.0))
    last = [curve.levels(count)[-1] for count in (3, 6, 12, 24)]
    assert last == sorted(last, reverse=True) and last[-1] < 0.5 * last[0]


@pytest.mark.parametrize("solver", list(STEP_ERRORS))
def test_placed_levels_beat_even_ones_where_the_curvature_is_uneven(solver):
    """Data around -1 and 1: predictions decide for one of them in a small part of the run."""

    def model(x, timestep):
        s = float(timestep) / 1000
        alpha, variance, spread = 1 - s, (1 - s) ** 2 * 0.09 + s**2, 0.09
        near = torch.tanh(alpha * x / variance) * s**2 / variance
        return (x - near - alpha * spread * x / variance) / s

    def run(levels, solver):
        expert, seen = Expert.lune(model, solver=solver, levels=levels), []
        start = torch.linspace(-1.0, 1.0, 64).reshape(64, 1)
        compiled = plan(expert, steps=len(levels), start=levels[0])
        made = sample(compiled, expert, start, callback=lambda state: seen.append(state["x0"].clone()))
        return made, torch.stack(seen).numpy()

    fine = even_in_log_snr(200, 0.7)
    right, x0 = run(fine, "dpmpp_2m")
    even, placed = even_in_log_snr(10, 0.7), Curve.of(solver, fine, x0).levels(10)
    errors = [(run(levels, solver)[0] - right).square().mean().sqrt() for levels in (even, placed)]
    assert errors[1] < 0.5 * errors[0]


def test_measured_and_written(demo_pipeline, monkeypatch):
    sizes = {"CALLS": (2,), "SEEDS": (0, 1), "SOL_STEPS": 1, "PILOT_STEPS": 4, "LONG_STEPS": 3}
    for name, value in sizes.items():
        monkeypatch.setattr(curvature, name, value)
    monkeypatch.setattr(curvature, "NAMES", ("uniform", "curvature"))
    monkeypatch.setattr(curvature, "STEP_ERRORS", {"dpmpp_2m": STEP_ERRORS["dpmpp_2m"]})
    texts = curvature.prompts(0, 1)
    curves = curvature.follow(demo_pipeline, texts)
    found = curvature.measure(demo_pipeline, texts, curves)
    assert (
        set(curves) == {"dpmpp_2m"} and len(found) == 2 and all(own.shape == (2, 1) for own in found.values())
    )
    assert all((own > 0.0).all() for own in found.values())
    page = renew(
        "<!-- measured: curvature --><!-- end: curvature -->",
        "curvature",
        curvature.block(found, curves, 1, 1),
    )
    assert page.count("| dpmpp_2m |") == 2 and "**" in page


def test_another_number_of_steps_is_refused(demo_pipeline):
    assert len(plan_of(demo_pipeline, "euler", (0.9, 0.5, CLEANEST), 3)) == SOL_STEPS + 3
    with pytest.raises(ValueError, match="make 2 steps instead of 3"):
        plan_of(demo_pipeline, "euler", (0.9, 0.5), 3)
