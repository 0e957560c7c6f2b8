"""CFG-Zero* and APG in runs, against diffusers' guiders; and what asks for them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_sampler import Boundary, Crossfade, Expert, SamplingPlan, SamplingRun, plan, sample
from moe_sampler.sampling.calls import check_fits, with_guidance
from moe_sampler.sampling.guiders import Guider, read_guider
from moe_sampler.sampling.predictions import x0_coefficients

SHAPE, SEEDS = (2, 4, 6, 6), [3, 8]
COND = {"c": torch.tensor([[1.0], [0.4]])}
UNCOND = {"c": torch.tensor([[0.1], [-0.2]])}
APG = "apg eta 0.25 norm_threshold 6 momentum -0.5"
APART = dict(cond=COND, uncond=UNCOND, seeds=SEEDS)


def model(x, timestep, c):
    return torch.tanh(x + c.view(-1, 1, 1, 1)) + 0.3 * c.view(-1, 1, 1, 1) * x.flip(-1)


def lune(**settings) -> Expert:
    return Expert.lune(model, **{"guidance_scale": 4.0, **settings})


def sol(**settings) -> Expert:
    return Expert.sol(model, **{"guidance_scale": 4.0, "solver": "ddim", **settings})


def run(experts, router=None, **settings) -> torch.Tensor:
    return sample(plan(experts, router, steps=8, **settings), experts, shape=SHAPE, **APART)


def oracle(module: str, name: str, **settings):
    """One of diffusers' guiders, told which step it is."""
    guiders = pytest.importorskip(f"diffusers.guiders.{module}", reason="diffusers has guiders from 0.35 on")
    return getattr(guiders, name)(**settings)


def guided_by_hand(expert: Expert, guide, steps: int) -> Expert:
    """An unguided expert whose model does the guidance: guide(step, x, cond, uncond, p, q)."""
    step = iter(range(steps))

    def by_hand(x, timestep, c):
        level = expert.path.level(timestep.item())
        cond, uncond = (expert.model(x, timestep, own["c"]) for own in (COND, UNCOND))
        return guide(next(step), x, cond, uncond, *x0_coefficients(expert.prediction, level))

    return dataclasses.replace(expert, model=by_hand, guidance_scale=1.0, guider=None)


def zero_star_oracle(zero_init_steps: int):
    settings = {"guidance_scale": 4.0, "zero_init_steps": zero_init_steps}
    return oracle("classifier_free_zero_star_guidance", "ClassifierFreeZeroStarGuidance", **settings)


def zero_star(guider):
    def guide(step, x, cond, uncond, p, q):
        guider.set_state(step, 8, torch.tensor(0))
        return guider.forward(cond, uncond).pred

    return guide


def projected(guider):
    """On predictions of x0, which is what the paper's algorithm takes."""

    def guide(step, x, cond, uncond, p, q):
        guider.set_state(step, 8, torch.tensor(0))
        guider.prepare_inputs({})
        return (guider.forward(p * x + q * cond, p * x + q * uncond).pred - p * x) / q

    return guide


@pytest.mark.parametrize("make", [lune, sol], ids=["flow", "ddpm"])
def test_zero_star_is_diffusers_own(make):
    guider = zero_star_oracle(zero_init_steps=0)
    expected = run(guided_by_hand(make(), zero_star(guider), 8))
    ours = run(make(guider="cfg_zero_star"))
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(ours, run(make()), atol=0.02)


def test_zero_init_is_diffusers_own_and_calls_no_model():
    """Euler on the flow: a zero velocity moves nothing."""
    guider = zero_star_oracle(zero_init_steps=2)
    expected = run(guided_by_hand(lune(), zero_star(guider), 8))
    ours = lune(guider="cfg_zero_star zero_init_steps 2")
    torch.testing.assert_close(run(ours), expected, atol=2e-5, rtol=1e-5)
    compiled = plan(ours, steps=8)
    assert (len(compiled), compiled.cost, compiled.initial_scale, compiled.from_image) == (6, 12, 1.0, False)
    assert SamplingPlan.from_json(compiled.to_json()) == compiled


@pytest.mark.parametrize("make", [lune, sol], ids=["flow", "ddpm"])
def test_apg_is_diffusers_own_on_x0(make):
    guider = oracle(
        "adaptive_projected_guidance",
        "AdaptiveProjectedGuidance",
        guidance_scale=3.0,  # beyond the conditional prediction, which the original formulation starts from
        adaptive_projected_guidance_momentum=-0.5,
        adaptive_projected_guidance_rescale=6.0,
        eta=0.25,
        use_original_formulation=True,
    )
    guider._prepare_batch = lambda *args: None  # the inputs are there already
    expected = run(guided_by_hand(make(), projected(guider), 8))
    ours = run(make(guider=APG))
    torch.testing.assert_close(ours, expected, atol=5e-5, rtol=1e-5)
    assert not torch.allclose(ours, run(make()), atol=0.02)


@pytest.mark.parametrize("router", [Boundary("sol", "lune", 0.7), Crossfade("sol", "lune", 0.8, 0.5)])
def test_all_of_the_parallel_part_is_plain_guidance(router):
    """In a mixture too, where two paths meet."""
    apg = [each(guider="apg eta 1") for each in (sol, lune)]
    torch.testing.assert_close(run(apg, router), run([sol(), lune()], router), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("guider", ["cfg_zero_star", APG])
def test_a_sample_is_the_same_alone_in_a_batch_and_paused(guider):
    experts, router = [sol(guider=guider), lune(guider=guider)], Boundary("sol", "lune", 0.7)
    compiled = plan(experts, router, steps=8)
    together = sample(compiled, experts, shape=SHAPE, **APART)
    paused = SamplingRun(compiled, experts, shape=SHAPE, **APART)
    for until in range(1, 9):
        paused.advance(until)
    assert torch.equal(paused.x, together)
    for i, seed in enumerate(SEEDS):
        cond, uncond = ({"c": own["c"][i : i + 1]} for own in (COND, UNCOND))
        alone = sample(compiled, experts, shape=(1, *SHAPE[1:]), seeds=[seed], cond=cond, uncond=uncond)
        assert torch.equal(alone[0], together[i])


def test_momentum_begins_anew_in_every_stretch_of_guidance():
    """The step after a pause of the guidance is what it is without any momentum."""
    scales = [4.0, 4.0, 1.0, 4.0]
    kinds = [lune(guider=text) for text in ("apg momentum -0.5", "apg")]
    made = []
    for expert in kinds:
        compiled = plan(expert, steps=4)
        unguided = with_guidance(compiled, [expert], 1.0)
        steps = [(compiled if scale > 1 else unguided).steps[i] for i, scale in enumerate(scales)]
        own = dataclasses.replace(compiled, steps=tuple(steps), made_from=None)
        going = SamplingRun(own, expert, shape=SHAPE, **APART)
        going.advance(3)
        going.x.copy_(torch.linspace(-1, 1, going.x.numel()).view(SHAPE))
        made.append((going.advance().clone(), run(expert)))
    assert torch.equal(made[0][0], made[1][0])
    assert not torch.allclose(made[0][1], made[1][1], atol=1e-3)


def test_rescaling_comes_after_the_guider():
    guided, cond = run(lune(guider="apg", guidance_rescale=1.0)), run(lune(guidance_scale=1.0))
    assert not torch.equal(guided, run(lune(guider="apg"))) and torch.isfinite(guided).all()
    compiled = plan(lune(guider="apg", guidance_rescale=0.5), steps=2)
    assert "4 apg rescaled 0.5" in str(compiled) and cond.shape == guided.shape


def test_guiders_are_in_the_plan_and_what_it_was_made_from():
    windowed = lune(guider=APG, guidance_window=(0.8, 0.3))
    compiled = plan(windowed, steps=8)
    again = SamplingPlan.from_json(compiled.to_json())
    assert again == compiled and again.made_from == compiled.made_from
    assert {call.guider for s in compiled.steps for call in s.calls if call.guided} == {read_guider("x", APG)}
    assert all(
        c.guider is None and c.to_x0 == (0, 1) for s in compiled.steps for c in s.calls if not c.guided
    )
    check_fits(compiled, [windowed])
    check_fits(compiled, [lune()])  # the plan has its own
    with pytest.raises(ValueError, match="made for another lune"):
        check_fits(
            dataclasses.replace(compiled, made_from=None), [dataclasses.replace(lune(), prediction="sample")]
        )
    body = compiled.to_json().replace('"eta": 0.25', '"eta": 0.5')
    with pytest.raises(ValueError, match="digest"):
        SamplingPlan.from_json(body)


def test_another_scale_on_the_way_keeps_the_guider():
    compiled = plan(lune(guider=APG), steps=8)
    assert (
        with_guidance(compiled, [lune(guider=APG)], 7.0).steps
        == plan(lune(guider=APG, guidance_scale=7.0), steps=8).steps
    )
    assert not with_guidance(compiled, [lune(guider=APG)], 1.0).guided


@pytest.mark.parametrize(
    "text, guider",
    [
        ("cfg", None),
        ("apg", Guider("apg")),
        (APG, Guider("apg", 0.25, 6.0, -0.5)),
        ("cfg_zero_star zero_init_steps 1", Guider("cfg_zero_star", zero_init_steps=1)),
        (Guider("apg", eta=1), Guider("apg", 1.0)),
        (None, None),
    ],
)
def test_words(text, guider):
    assert read_guider("x", text) == guider
    assert guider is None or read_guider("x", str(guider)) == guider


@pytest.mark.parametrize(
    "text, message",
    [
        ("pag", "sol: guider: a guider is cfg, cfg_zero_star or apg, got 'pag'"),
        ("", "a guider is cfg, cfg_zero_star or apg"),
        (3, "a guider is cfg, cfg_zero_star or apg, got 3"),
        ("apg eta", "takes each setting once, with its value, as in apg eta 0"),
        ("apg eta 0 eta 1", "takes each setting once"),
        ("apg zero_init_steps 1", "apg has no zero_init_steps: it has eta, norm_threshold, momentum"),
        ("apg eta much", "eta must be a number, got 'much'"),
        ("apg eta 1.5", "eta must lie between 0 and 1, got 1.5"),
        ("apg eta nan", "eta must be a finite number"),
        ("apg norm_threshold -1", "must not be negative"),
        ("apg momentum -1", "momentum must lie between -1 and 1"),
        ("cfg_zero_star zero_init_steps 0.5", "must be a whole number"),
        ("cfg_zero_star zero_init_steps 1", "zero_init_steps is for flow paths"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(ValueError, match=message):
        sol(guider=text)


def test_a_kind_of_no_guidance():
    refused = "lune: guider apg is a kind of guidance, and the guidance scale of 1 is"
    with pytest.raises(ValueError, match=refused):
        lune(guider="apg", guidance_scale=1.0)
    with pytest.raises(ValueError, match="cfg_zero_star has no eta"):
        Guider("cfg_zero_star", eta=0.5)


@pytest.mark.parametrize(
    "made",
    [
        lambda own: plan([sol(), own], Boundary("sol", "lune", 0.7), steps=8),
        lambda own: plan(own, steps=8, start=0.6),
        lambda own: plan(own, steps=2),
        lambda own: plan(dataclasses.replace(own, solver="unipc"), steps=8),
    ],
    ids=["another begins", "from an image", "no step left", "a scheduler's levels"],
)
def test_zero_init_where_there_is_none(made):
    with pytest.raises(ValueError, match="2 zero_init_steps are for a run that begins from noise alone"):
        made(lune(guider="cfg_zero_star zero_init_steps 2"))
