"""The student guided by Sol and Lune: the weights, and what a plan makes of them."""

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from moe_sampler import Expert, plan, sample
from moe_sampler.tinyflux import GuidedRouter, tinyflux_expert
from moe_sampler.tinyflux.sampling.guided import guided_experts, guided_plan


def weights_at(router, noise):
    return {name: round(weight, 12) for name, weight in router(noise).items()}


def test_numbers_count_on_their_side_of_the_handoff():
    router = GuidedRouter(sol=0.6, lune=0.25, handoff=0.8)
    assert (
        weights_at(router, 1.0) == weights_at(router, math.nextafter(0.8, 1)) == {"tinyflux": 0.4, "sol": 0.6}
    )
    assert weights_at(router, 0.8) == weights_at(router, 0.0) == {"tinyflux": 0.75, "lune": 0.25}
    assert router.guides == ("sol", "lune")
    assert weights_at(GuidedRouter(), 0.9) == {"tinyflux": 1.0} and GuidedRouter().guides == ()


def test_knots_are_joined_by_straight_lines():
    """Values by hand: 0.2 + 0.4·(0.95 - 0.9)/0.1 and so on; constant beyond the ends."""
    router = GuidedRouter(sol=[(1.0, 0.6), (0.9, 0.2), (0.7, 0.0)], lune=[(0.7, 0.0), (0.5, 1.0), (0.1, 0.5)])
    expected = {1.0: 0.6, 0.95: 0.4, 0.9: 0.2, 0.8: 0.1, 0.7: 0.0}
    for noise, share in expected.items():
        assert router(noise).get("sol", 0.0) == pytest.approx(share, abs=1e-12)
    for noise, share in {0.7: 0.0, 0.6: 0.5, 0.5: 1.0, 0.3: 0.75, 0.1: 0.5, 0.0: 0.5}.items():
        assert router(noise).get("lune", 0.0) == pytest.approx(share, abs=1e-12)
    for noise in torch.linspace(0, 1, 101).tolist():
        weights = router(noise)
        assert sum(weights.values()) == pytest.approx(1.0, abs=1e-15) and len(weights) <= 2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sol": 1.2}, "Sol's weight lies between 0 and 1, got 1.2"),
        ({"lune": -0.1}, "Lune's weight"),
        ({"sol": math.nan}, "must be a finite number, got nan"),
        ({"sol": True}, "must be a finite number, got True"),
        ({"sol": "0.5"}, "a number from 0 to 1, or knots"),
        ({"sol": []}, "a number from 0 to 1, or knots"),
        ({"sol": [(1.5, 0.5)]}, "a noise level of Sol's weight"),
        ({"lune": [(0.5, 0.5), (0.5, 0.2)]}, "two weights at one noise level"),
        ({"handoff": 1.0}, "strictly between"),
        ({"sol": 0.5, "lune": [(1.0, 0.5)]}, "both have weight"),
        # They meet strictly between all knots: only in the middle of (0.4, 0.6) both count.
        ({"sol": [(0.4, 0.0), (0.6, 0.5)], "lune": [(0.4, 0.5), (0.6, 0.0)]}, "both have weight"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        GuidedRouter(**settings)


def experts():
    return tinyflux_expert(None), Expert.sol(), Expert.lune()


def test_a_plan_has_the_weights_of_its_nodes():
    student, *guides = experts()
    router = GuidedRouter(sol=0.3, lune=[(0.8, 0.0), (0.2, 0.4)], handoff=0.8)
    compiled = guided_plan(student, guides, router, 12)
    assert len(compiled) == 12 and compiled.experts == ("tinyflux", "sol", "lune")
    for step in compiled.steps:
        weights = {call.name: call.weight for call in step.calls}
        assert sum(weights.values()) == pytest.approx(1.0, abs=1e-12)
        assert weights == pytest.approx(dict(router(step.level.noise)), abs=1e-12)
        assert step.solver == "euler"  # the student leads everywhere
        told = {call.name: call.timestep for call in step.calls}
        assert told["tinyflux"] == pytest.approx(1 - step.level.noise, abs=1e-9)
        if "sol" in told:
            level = guides[0].path.level(told["sol"])
            assert isinstance(told["sol"], int) and level.noise == pytest.approx(step.level.noise, abs=1e-12)
        if "lune" in told:
            assert told["lune"] == pytest.approx(1000 * step.level.noise)


def test_who_has_more_than_half_leads():
    student, *guides = experts()
    compiled = guided_plan(student, guides, GuidedRouter(sol=0.7, lune=0.5, handoff=0.8), 10)
    for step in compiled.steps:
        assert step.solver == ("ddpm" if step.level.noise > 0.8 else "euler")
    # Across a jump and a crossing in one piece, every change of the lead is found.
    router = GuidedRouter(sol=[(1.0, 1.0), (0.8, 0.0)], lune=0.9, handoff=0.8)
    leads = [
        max(step.calls, key=lambda call: call.weight).name
        for step in guided_plan(student, guides, router, 20).steps
    ]
    assert list(dict.fromkeys(leads)) == ["sol", "tinyflux", "lune"]


def test_without_weights_the_student_is_alone():
    student, *guides = experts()
    assert guided_plan(student, guides, GuidedRouter(), 7) == plan(student, steps=7)
    with pytest.raises(ValueError, match="sol has a weight, but the experts are lune"):
        guided_plan(student, guides[1:], GuidedRouter(sol=0.2), 7)


def exact(expert, mean, std):
    """The expert with the denoiser of N(mean, std²), written out: E[x0 | x] by Bayes' rule in float64."""

    def model(x, timestep, **_):
        level = expert.path.level(timestep.item())
        a, s = level.alpha, level.sigma
        x0 = (std**2 * a * x.double() + s**2 * mean) / (a**2 * std**2 + s**2)
        noise = (x.double() - a * x0) / s if s > 0 else torch.zeros_like(x0)
        return {
            "v_prediction": a * noise - s * x0,
            "flow_prediction": noise - x0,
            "reversed_flow_prediction": x0 - noise,
        }[expert.prediction].to(x.dtype)

    return dataclasses.replace(expert, model=model)


@pytest.mark.parametrize("scale", [1.0, 2.0], ids=["plain", "with guidance"])
def test_experts_that_agree_change_nothing(scale):
    """Exact denoisers of one Gaussian: whatever the weights, the run is the student's own."""
    student, *guides = (
        exact(dataclasses.replace(expert, guidance_scale=scale), 0.4, 0.7) for expert in experts()
    )
    router = GuidedRouter(sol=[(1.0, 0.45), (0.8, 0.2), (0.7, 0.0)], lune=0.4, handoff=0.7)
    guided = guided_plan(student, guides, router, 16)
    assert {len(step.calls) for step in guided.steps} == {2}
    alone = plan(student, noise_levels=guided.noise_levels)
    assert alone.experts == ("tinyflux",)
    keys = {"shape": (2, 4, 6, 6), "seeds": [1, 2], "cond": {}, "uncond": {}}
    ours = sample(guided, [student, *guides], **keys)
    assert_close(ours, sample(alone, student, **keys), rtol=0, atol=1e-5)
    other = exact(guides[0], -0.4, 0.7)
    assert (ours - sample(guided, [student, other, guides[1]], **keys)).abs().max() > 0.01


def test_settings_by_name():
    asked = {}

    def guides(**settings):
        asked.update(settings)
        return experts()[1:]

    student, *others = guided_experts(
        None, ("sol", "lune"), guides, guidance_scale={"lune": 2.0, "tinyflux": 4.0}, shift=1.5
    )
    assert (student.guidance_scale, student.shift, student.solver) == (4.0, 1.5, "euler")
    assert [e.name for e in others] == ["sol", "lune"]
    assert asked == {
        "guidance_scale": {"sol": None, "lune": 2.0},
        "shift": {"sol": 1.5, "lune": 1.5},
        "solver": {"sol": None, "lune": None},
        "levels": {"sol": None, "lune": None},
        "reuse": {"sol": None, "lune": None},
    }
    with pytest.raises(ValueError, match="names sd15"):
        guided_experts(None, ("sol",), guides, solver={"sd15": "ddim"})
