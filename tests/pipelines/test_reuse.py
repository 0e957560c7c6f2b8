"""Reuse of features and budgets through the pipeline: the same image however it is made."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from moe_sampler import Boundary, Crossfade, HybridPipeline, SamplingPlan
from moe_sampler.demo import experts_path
from moe_sampler.pipelines.budget import within_budget
from moe_sampler.pipelines.settings import enter_plan, hybrid_plan

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["a castle", "a portrait"]
QUICK = dict(seed=3, num_inference_steps=6, reuse=3, output_type="latent")


def passes(compiled: SamplingPlan) -> str:
    return "".join("r" if call.reuses else "F" for step in compiled.steps for call in step.calls)


def test_same_seed_same_image_however_it_is_made(demo_pipeline):
    pipe = demo_pipeline
    alone = [pipe(p, **QUICK | {"seed": 3 + i}).images[0] for i, p in enumerate(PROMPTS)]
    queue = pipe(PROMPTS, **QUICK, batch_size=1)
    plain = pipe(PROMPTS, **QUICK | {"reuse": None}, batch_size=1).images
    given = pipe(PROMPTS, seed=3, output_type="latent", batch_size=1, plan=queue.plan).images
    offloaded = HybridPipeline.from_pretrained(experts_path(), offload="expert")
    offloaded.set_progress_bar_config(disable=True)
    files = offloaded(PROMPTS, **QUICK, batch_size=1).images
    for index, expected in enumerate(alone):
        for images in (queue.images, given, files):
            assert torch.equal(images[index], expected)
        assert not torch.equal(plain[index], expected)
    assert passes(queue.plan) == "FFrrFr"  # a step of Sol's, then Lune's
    together = pipe(PROMPTS, **QUICK).images
    fresh = pipe(PROMPTS, **QUICK | {"reuse": None}).images
    # In a batch a model's own rounding differs, with reuse as without.
    assert (together - torch.stack(alone)).abs().max() < 10 * (fresh - plain).abs().max() + 1e-5


def test_reuse_is_close_to_full_and_closer_than_fewer_steps_at_its_cost(demo_pipeline):
    solver = {"sol": "ddpm", "lune": "euler"}
    call = dict(prompt=PROMPTS[0], seed=5, output_type="np", solver=solver, num_inference_steps=24)
    full = demo_pipeline(**call)
    reused = demo_pipeline(**call, reuse=2)
    fewer = demo_pipeline(**call | {"num_inference_steps": 14})
    assert full.plan.cost == full.plan.model_calls == 48 and fewer.plan.cost == 28
    assert 24 < reused.plan.cost < 28

    def far(other) -> float:
        return float(np.sqrt(np.mean((other.images - full.images) ** 2)))

    assert 0 < far(reused) < 0.6 * far(fewer)


def test_by_expert_with_crossfades_and_callbacks(demo_pipeline):
    pipe = demo_pipeline
    router = Crossfade("sol", "lune", 0.95, 0.5)
    call = dict(prompt=PROMPTS[:1], seed=3, num_inference_steps=4, router=router, output_type="latent")
    run = pipe(**call, reuse={"lune": 2})
    assert {c.name for s in run.plan.steps for c in s.calls if c.reuses} == {"lune"}
    assert torch.isfinite(run.images).all()

    def guide_late(pipe, step, timestep, kwargs):
        if step == 2:
            pipe._guidance_scale = 1.0
        return {"latents": kwargs["latents"]}  # written anew, as it was

    expected = pipe(**call, reuse=2).images
    assert torch.equal(pipe(**call, reuse=2, callback_on_step_end=lambda *_: {}).images, expected)
    changed = pipe(**call, reuse=2, callback_on_step_end=guide_late).images
    assert torch.isfinite(changed).all() and not torch.equal(changed, expected)


def test_a_lora_acts_in_calls_that_reuse(tmp_path):
    pipe = HybridPipeline.from_pretrained(experts_path())
    pipe.set_progress_bar_config(disable=True)
    before = pipe(PROMPTS[0], **QUICK).images
    lune: UNet2DConditionModel = pipe.unet_lune
    name = "up_blocks.2.resnets.1.conv1"  # of the outermost layer
    shape = lune.get_submodule(name).weight.shape
    torch.manual_seed(0)
    tensors = {
        f"unet.{name}.lora_A.weight": torch.randn(2, *shape[1:]) * 0.1,
        f"unet.{name}.lora_B.weight": torch.randn(shape[0], 2, 1, 1) * 0.1,
    }
    pipe.load_lora_weights(tensors, expert="lune")
    adapted = pipe(PROMPTS[0], **QUICK).images
    assert not torch.equal(adapted, before)
    pipe.unload_lora_weights()
    assert torch.equal(pipe(PROMPTS[0], **QUICK).images, before)


@pytest.mark.parametrize(
    "budget, most, window",
    [
        (30, 24, None),
        (12, 24, None),
        (6.5, 24, None),
        (4, 16, (0.4, 0.3)),  # four steps cost more, seven don't
    ],
)
def test_a_budget_is_kept_with_as_many_steps_as_it_pays_for(demo_pipeline, budget, most, window):
    experts = demo_pipeline.experts(guidance_window=window)
    found = demo_pipeline.plan(experts=experts, num_inference_steps=most, budget=budget)
    steps = len(found)
    assert found.cost <= budget
    # Tried one by one: no plan with more steps fits, and of those with as many none has more full calls.
    for every in (1, 2, 3):
        experts = demo_pipeline.experts(guidance_window=window, reuse=every)
        for count in range(2, most + 1):
            other = demo_pipeline.plan(experts=experts, num_inference_steps=count)
            if other.cost <= budget:
                assert count <= steps
                assert count < steps or passes(other).count("F") <= passes(found).count("F")
    call = dict(num_inference_steps=most, budget=budget, guidance_window=window)
    made = demo_pipeline(PROMPTS[0], seed=1, output_type="latent", **call)
    assert made.plan == found


def test_budgets_beside_other_settings(demo_pipeline):
    pipe = demo_pipeline
    own = pipe.plan(budget=20, experts=pipe.experts(reuse=4))
    assert passes(own)[4:].startswith("Frrr") or "Frrr" in passes(own)
    assert pipe.plan(num_inference_steps=10, budget=1000) == pipe.plan(num_inference_steps=10)
    assert pipe.plan(num_inference_steps=10, budget=1000).cost == 20
    late = pipe.plan(budget=8, strength=0.5)
    assert late.from_image and 4 < late.cost <= 8
    listed = pipe.plan(expert="lune", sigmas=[0.9, 0.7, 0.5, 0.3], budget=5)
    assert len(listed) == 4 and listed.cost <= 5
    with pytest.raises(ValueError, match=r"cost at least 4\.4 full passes, more than 2"):
        pipe.plan(expert="lune", sigmas=[0.9, 0.7, 0.5, 0.3], budget=2)
    with pytest.raises(ValueError, match="the cheapest costs 4"):
        pipe.plan(budget=1)
    with pytest.raises(ValueError, match="not by expert"):
        pipe.plan(num_inference_steps={"sol": 3, "lune": 4}, budget=10)
    with pytest.raises(ValueError, match="the plan decides reuse, budget"):
        pipe(PROMPTS[0], plan=own, reuse=2, budget=4)
    with pytest.raises(ValueError, match="reuse names nobody"):
        pipe(PROMPTS[0], reuse={"nobody": 2})


def test_an_unfit_number_of_steps_is_passed_over(demo_pipeline):
    """Two experts need two steps: with one there is no plan, and that is no error."""
    experts = demo_pipeline.experts(guidance_scale=1.0)
    tried = []

    def compiled(own, count):
        tried.append(count)
        return hybrid_plan(own, demo_pipeline.config, num_inference_steps=count)

    found = within_budget(2, experts, 3, compiled)
    assert found.steps == 2 and found.plan.cost == 2 and 2 in tried
    whole = hybrid_plan(experts, demo_pipeline.config, router=Boundary("sol", "lune", 0.5))
    assert enter_plan(experts, whole, 0.5).cost == len(whole.steps) // 2
