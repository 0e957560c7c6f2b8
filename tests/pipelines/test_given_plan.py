"""Plans that a call brings along: run as they are, or refused before any work."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

from moe_sampler import Boundary, Crossfade, Expert, FlowPath, SamplingPlan, VPPath, plan

PROMPT = "a castle with two towers, at dusk"
BLUE = Image.new("RGB", (64, 64), "blue")


def test_a_plan_is_the_settings_it_was_made_of(demo_pipeline):
    settings = dict(guidance_scale={"sol": 1.0, "lune": 3.0}, guidance_window={"lune": (0.8, 0.2)})
    route = dict(num_inference_steps=4, router=Crossfade("sol", "lune", 0.9, 0.5))
    made = demo_pipeline(PROMPT, seed=3, output_type="latent", **settings, **route)
    read = SamplingPlan.from_json(made.plan.to_json())
    assert read == made.plan
    assert torch.equal(demo_pipeline(PROMPT, seed=3, output_type="latent", plan=read).images, made.images)


def test_a_plan_made_by_hand_runs_with_any_guidance(demo_pipeline):
    """Guidance, solver and shift are the plan's; the pipeline's own don't count."""
    sol, lune = demo_pipeline.experts(guidance_scale=1.0)
    own = [sol, dataclasses.replace(lune, solver="heun", shift=4.0, guidance_scale=2.0, guidance_rescale=0.5)]
    compiled = plan(own, Boundary("sol", "lune", 0.8), steps=4)
    assert demo_pipeline(PROMPT, seed=1, plan=compiled, output_type="latent").plan is compiled


def test_a_plan_from_an_image(demo_pipeline):
    call = dict(image=BLUE, seed=2, output_type="latent")
    made = demo_pipeline(PROMPT, num_inference_steps=4, strength=0.5, **call)
    assert made.plan.from_image
    assert torch.equal(demo_pipeline(PROMPT, plan=made.plan, **call).images, made.images)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert demo_pipeline(PROMPT, plan=made.plan, latents=latents, output_type="latent").plan == made.plan


def whole(**settings) -> SamplingPlan:
    experts = Expert.sol(solver="dpmpp_2m"), Expert.lune()
    experts = [dataclasses.replace(e, **settings.get(e.name, {})) for e in experts]
    return plan(experts, Boundary("sol", "lune", 0.7), steps=6)


def cut(count: int) -> SamplingPlan:
    made = whole()
    return dataclasses.replace(made, steps=made.steps[count:])


def bare(made: SamplingPlan) -> SamplingPlan:
    """As a plan made by hand is: without what it was compiled from."""
    return dataclasses.replace(made, made_from=None)


BENT = VPPath((*VPPath.linear().betas[:500], *(beta * 1.01 for beta in VPPath.linear().betas[500:])))
"""Sol's path to the middle: a plan that works below doesn't see that it is another."""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(plan=plan(Expert.lune(name="luna"), steps=2)), "calls luna, but the experts are sol, lune"),
        (
            dict(plan=plan(Expert.sd15(name="sol"), steps=2)),
            "made for another sol: it predicts epsilon there",
        ),
        (dict(plan=whole(sol={"prediction": "epsilon"})), "another sol: .* this sol predicts v_prediction"),
        (dict(plan=whole(sol={"path": VPPath.linear(end=0.0200001)})), "beta_end = 0.0200001 there"),
        (dict(plan=whole(sol={"path": VPPath.linear(num_train_timesteps=999)})), "timesteps = 999 there"),
        (dict(plan=whole(sol={"path": BENT})), "of 1000 trained betas there, and this sol's is beta_sch"),
        (
            dict(plan=plan(dataclasses.replace(Expert.sol(), path=BENT), noise_levels=(0.5, 0.2))),
            "sol: its noise path is of 1000 tr",
        ),
        (dict(plan=whole(lune={"path": FlowPath(500.0)})), "timestep_scale = 500.0 there, and this lune's"),
        (dict(plan=bare(whole(lune={"path": FlowPath(500.0)}))), "timestep or prediction type is not the"),
        (dict(plan=bare(whole(sol={"prediction": "epsilon"}))), "timestep or prediction type is not the"),
        (dict(plan=whole(lune={"prediction": "reversed_flow_prediction"})), "made for another lune"),
        (dict(plan=cut(1)), "its beginning was cut off"),
        (dict(plan=cut(6)), "no steps"),
        (dict(plan=plan(Expert.lune(), steps=2, start=0.5)), "with an image: give image"),
        (dict(plan=whole(), image=BLUE), "no image would be left"),
        (dict(plan=plan(Expert.lune(), steps=2, start=0.5), image=BLUE, strength=0.5), "decides strength"),
        (dict(plan=whole(), num_inference_steps=4), "decides num_inference_steps"),
        (dict(plan=whole(), sol_steps=2, lune_steps=2), "decides num_inference_steps"),
        (dict(plan=whole(), handoff=0.5), "decides handoff"),
        (dict(plan=whole(), router=Crossfade("sol", "lune", 0.9, 0.4)), "decides router"),
        (dict(plan=whole(), expert="sol"), "decides expert"),
        (dict(plan=whole(), sol_guidance=2.0), "decides guidance_scale"),
        (dict(plan=whole(), solver="ddim", eta=0.5, shift=2.0), "decides shift, solver, eta"),
        (dict(plan=whole(), guidance_rescale=0.5), "decides guidance_rescale"),
        (dict(plan=whole(), guider="apg"), "decides guider"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(demo_pipeline, monkeypatch, call, message):
    monkeypatch.setattr(type(demo_pipeline), "encode_texts", None)
    monkeypatch.setattr(type(demo_pipeline), "_image_latents", None)
    with pytest.raises(ValueError, match=message):
        demo_pipeline(PROMPT, **call)


def test_a_plan_is_no_text(demo_pipeline):
    with pytest.raises(TypeError, match=r"SamplingPlan\.from_json reads one"):
        demo_pipeline(PROMPT, plan=whole().to_json())
