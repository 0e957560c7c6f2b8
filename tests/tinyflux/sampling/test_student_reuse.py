"""A student whose middle blocks' work is reused: planned, priced, and the same image however it is made."""

from __future__ import annotations

import pytest
import torch
from tinyflux_helpers import trained
from torch.testing import assert_close

from moe_sampler.demo import experts_path
from moe_sampler.tinyflux import StudentPipeline, TinyFluxConfig, tinyflux_expert
from moe_sampler.tinyflux.sampling.expert import StudentModel
from moe_sampler.tinyflux.sampling.reuse import reuse_share

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["a castle", "a portrait"]
SMALL = {"num_double_layers": 2, "num_single_layers": 2}
QUICK = {"num_inference_steps": 4, "seed": 3, "output_type": "latent"}


def student(**blocks):
    return trained(TinyFluxConfig.demo(**(SMALL | blocks)))


def told(model, batch: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    config = model.config
    return {
        "sample": torch.randn(batch, config["in_channels"], 6, 4),
        "timestep": torch.tensor(0.3),
        "encoder_hidden_states": torch.randn(batch, 5, config["joint_attention_dim"]),
        "pooled_projections": torch.randn(batch, config["pooled_projection_dim"]),
    }


@torch.no_grad()
@pytest.mark.parametrize(("doubles", "singles"), [(0, 3), (3, 0), (2, 1), (1, 3)])
def test_outer_blocks_and_what_the_others_added_are_the_whole(doubles, singles):
    model = student(num_double_layers=doubles, num_single_layers=singles)
    works, inputs = StudentModel(model), told(model)
    expected = works(**inputs)
    recorded, features = works.recording(**inputs)
    assert torch.equal(recorded, expected) and torch.equal(works(**inputs), expected)
    assert_close(works.reusing(features=features, **inputs), expected, rtol=1e-4, atol=1e-5)
    # What is not reused is fresh: the first and the last block, at another time.
    later = inputs | {"timestep": torch.tensor(0.8)}
    made = works.reusing(features=features, **later)
    assert not torch.allclose(made, expected, atol=1e-3)
    middle = [*model.double_blocks, *model.single_blocks][1]
    for parameter in middle.parameters():
        parameter.mul_(2)
    assert torch.equal(works.reusing(features=features, **later), made)


@pytest.mark.parametrize(("doubles", "singles"), [(0, 1), (1, 1)])
def test_a_student_without_middle_blocks_is_refused(doubles, singles):
    model = student(num_double_layers=doubles, num_single_layers=singles)
    with pytest.raises(ValueError, match=f"has {doubles + singles} blocks, and none between"):
        tinyflux_expert(model, reuse=2)


def test_a_student_that_is_compiled_as_a_whole_says_so():
    model = student()
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="compile its blocks instead"):
        tinyflux_expert(model, reuse=2)


def test_the_price_is_what_is_multiplied():
    """Of n like blocks two are fresh, beside what is around them: 1 / share grows evenly with n."""

    def share(blocks: int) -> float:
        return reuse_share(TinyFluxConfig.demo(num_double_layers=0, num_single_layers=blocks))

    four, six, eight = (1 / share(blocks) for blocks in (4, 6, 8))
    assert six - four == pytest.approx(eight - six) and 0.9 < six - four < 1
    assert 2 / 4 < share(4) < 2 / 4 + 0.1


@pytest.fixture(scope="module")
def pipe(tmp_path_factory, demo_pipeline):
    folder = tmp_path_factory.mktemp("student")
    student().save_pretrained(folder)
    made = StudentPipeline.from_pretrained(folder, demo_pipeline)
    made.set_progress_bar_config(disable=True)
    return made


def passes(plan) -> str:
    return "".join("r" if call.reuses else "F" for step in plan.steps for call in step.calls)


def test_same_seed_same_image_however_it_is_made(pipe):
    alone = [pipe(p, **QUICK | {"seed": 3 + i}, reuse=2).images[0] for i, p in enumerate(PROMPTS)]
    queue = pipe(PROMPTS, **QUICK, reuse=2, batch_size=1)
    assert passes(queue.plan) == "FrFr" and queue.plan.cost < queue.plan.model_calls
    given = pipe(PROMPTS, seed=3, output_type="latent", plan=queue.plan, batch_size=1).images
    full = pipe(PROMPTS, **QUICK, batch_size=1).images
    for index, expected in enumerate(alone):
        assert_close(queue.images[index], expected, rtol=1e-5, atol=1e-5)  # texts are as long as the longest
        assert torch.equal(given[index], queue.images[index])
        assert not torch.allclose(full[index], expected, atol=1e-4)
    assert_close(pipe(PROMPTS, **QUICK, reuse=2).images, torch.stack(alone), rtol=1e-4, atol=1e-4)
    assert torch.equal(pipe(PROMPTS, **QUICK, reuse=1, batch_size=1).images, full)


def test_beside_an_expert_and_for_a_budget(pipe):
    settings = QUICK | {"sol_weight": 0.5, "handoff": 0.5}
    own = pipe(PROMPTS[0], **settings, reuse={"tinyflux": 2})
    assert {c.name for step in own.plan.steps for c in step.calls if c.reuses} == {"tinyflux"}
    both = pipe(PROMPTS[0], **settings, reuse=2)
    assert {c.name for step in both.plan.steps for c in step.calls if c.reuses} == {"tinyflux", "sol"}
    assert torch.isfinite(both.images).all()
    found = pipe(PROMPTS[0], **QUICK, budget=6.5).plan
    assert found.cost <= 6.5 < 8 and len(found) == 4
    assert found == pipe.plan(4, budget=6.5)
    with pytest.raises(ValueError, match="the plan decides reuse"):
        pipe(PROMPTS[0], plan=found, reuse=2)


def test_a_student_with_experts_beside_it_says_what_a_name_means():
    alone = StudentPipeline.from_pretrained(student(), encoders=experts_path())
    with pytest.raises(ValueError, match="reuse names sol"):
        alone("a castle", reuse={"sol": 2})
