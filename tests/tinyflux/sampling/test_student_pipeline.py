"""Images of a student, alone and guided: the pipeline and the command."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tinyflux_helpers import trained
from torch.testing import assert_close
from typer.testing import CliRunner

from moe_sampler import SamplingPlan, plan, sample
from moe_sampler.cli import app
from moe_sampler.demo import experts_path, student_path
from moe_sampler.errors import NonFiniteError
from moe_sampler.tinyflux import StudentEncoders, StudentPipeline, TinyFluxConfig, tinyflux_expert
from moe_sampler.tinyflux.features.latent_space import same_latents
from moe_sampler.tinyflux.sampling.fitting import default_side
from moe_sampler.viewing.images import read_settings

PROMPTS = ["a castle at dusk", "a portrait"]
SMALL = {"num_double_layers": 1, "num_single_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("student")
    trained(TinyFluxConfig.demo(**SMALL)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder, demo_pipeline):
    made = StudentPipeline.from_pretrained(folder, demo_pipeline)
    made.set_progress_bar_config(disable=True)
    return made


def test_alone_it_is_the_sampler_with_the_null_condition(pipe, folder):
    """The same latents as the pieces put together by hand; no expert is called."""
    made = pipe(PROMPTS, num_inference_steps=3, guidance_scale=2.0, seed=5, output_type="latent")
    student = tinyflux_expert(pipe.student, guidance_scale=2.0)
    text = pipe.encoders.text(PROMPTS)
    assert not text.mask.all()
    out = sample(
        plan(student, steps=3),
        student,
        shape=(2, 4, 16, 16),
        seeds=[5, 6],
        cond={
            "encoder_hidden_states": text.states,
            "pooled_projections": text.pooled,
            "encoder_attention_mask": text.mask,
        },
        uncond=pipe.student.null_condition(2, text.states.shape[1], mask=True),
    )
    # Not to the bit: tensors with other strides may be added up in another order.
    assert_close(made.images, out, rtol=1e-5, atol=1e-5)
    assert made.seeds == [5, 6] and made.plan.experts == ("tinyflux",)
    alone = StudentPipeline.from_pretrained(folder, encoders=experts_path())
    alone.set_progress_bar_config(disable=True)
    again = alone(PROMPTS, num_inference_steps=3, guidance_scale=2.0, seed=5, output_type="latent")
    assert_close(again.images, out, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="sol has a weight, but the experts are none"):
        alone(PROMPTS, sol_weight=0.5)


def test_full_weights_are_the_experts_own_run(pipe, demo_pipeline):
    negatives = {"sol": "a city", "lune": "blur"}
    shared = {"handoff": 0.8, "seed": 3, "output_type": "latent", "negative_prompt": negatives}
    made = pipe(
        PROMPTS,
        num_inference_steps={"sol": 2, "lune": 3},
        sol_weight=1.0,
        lune_weight=1.0,
        **shared,
    )
    theirs = demo_pipeline(PROMPTS, sol_steps=2, lune_steps=3, **shared)
    assert made.plan == theirs.plan
    assert torch.equal(made.images, theirs.images)


def test_a_little_weight_moves_the_images_a_little(pipe):
    keys = {
        "num_inference_steps": 4,
        "seed": 1,
        "output_type": "latent",
        "guidance_scale": 1.0,
        "handoff": 0.8,
    }
    alone, little, much = (
        pipe(PROMPTS[0], lune_weight=weight, **keys).images for weight in (0.0, 0.01, 0.45)
    )
    near, far = (little - alone).norm(), (much - alone).norm()
    assert 0 < near < 0.1 * far


def test_batches_prompts_and_seeds(pipe):
    keys = {"num_inference_steps": 2, "sol_weight": 0.4, "output_type": "latent"}
    whole = pipe(PROMPTS, num_images_per_prompt=2, seed=[7, 8, 9, 10], **keys)
    parts = pipe(PROMPTS, num_images_per_prompt=2, seed=7, batch_size=3, **keys)
    assert_close(parts.images, whole.images, rtol=1e-4, atol=1e-4)
    one = pipe(PROMPTS[1], seed=9, **keys)
    assert_close(one.images[0], whole.images[2], rtol=1e-4, atol=1e-4)
    (images,) = pipe(PROMPTS[0], num_inference_steps=1, height=32, width=48, seed=0, return_dict=False)
    assert images[0].size == (48, 32)


def test_a_negative_prompt_replaces_the_null_condition(pipe):
    keys = {"num_inference_steps": 2, "seed": 1, "output_type": "latent", "guidance_scale": 2.0}
    none, shared, own, others = (
        pipe(PROMPTS[0], negative_prompt=negative, **keys).images
        for negative in (None, "a city", {"tinyflux": "a city"}, {"sol": "a city"})
    )
    assert torch.equal(shared, own) and torch.equal(none, others)
    assert (none - own).abs().max() > 1e-3


def test_callbacks_see_every_step_and_may_stop(pipe):
    seen = []

    def stop(pipeline, step, timestep, tensors):
        seen.append((step, round(timestep, 6), sorted(tensors)))
        pipeline._interrupt = step == 1
        return {}

    pipe(PROMPTS[0], num_inference_steps=5, seed=0, callback_on_step_end=stop, output_type="latent")
    times = [step.calls[0].timestep for step in pipe.plan(5).steps]
    assert seen == [(0, round(times[0], 6), ["latents"]), (1, round(times[1], 6), ["latents"])]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompt": []}, "non-empty list"),
        ({"height": 30}, "multiple of"),
        ({"seed": [1, 2, 3]}, "2 images need 2 seeds"),
        ({"output_type": "jpeg"}, "unknown output_type"),
        ({"guidance_scale": {"sd15": 2}}, "names sd15"),
        ({"sol_weight": 1.5}, "between 0 and 1"),
        ({"handoff": 0}, "strictly between"),
        ({"num_inference_steps": 1, "sol_weight": 0.9}, "1 steps cannot serve 2 spans"),
        ({"batch_size": 0}, "batch_size"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, "latents must have shape"),
    ],
)
def test_bad_calls_end_before_any_work(pipe, monkeypatch, settings, message):
    monkeypatch.setattr(type(pipe), "encode_prompt", None)
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": PROMPTS, **settings})


def test_a_given_plan(pipe, folder):
    """To the bit what the settings make; a student without the plan's experts refuses it."""
    call = dict(seed=2, output_type="latent")
    made = pipe(PROMPTS, num_inference_steps=3, sol_weight=0.4, guidance_scale=2.0, handoff=0.8, **call)
    read = SamplingPlan.from_json(made.plan.to_json())
    assert torch.equal(pipe(PROMPTS, plan=read, **call).images, made.images)
    alone = StudentPipeline.from_pretrained(folder, encoders=experts_path())
    for wrong, settings, message in (
        (alone, {}, "the plan calls sol, but the experts are tinyflux"),
        (pipe, {"sol_weight": 0.2, "shift": 2.0}, "decides sol_weight, shift"),
        (pipe, {"upstream_schedule": True}, "decides upstream_schedule"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong(PROMPTS, plan=read, **settings)


def test_parts_that_do_not_fit(folder, tmp_path, demo_pipeline):
    encoders = StudentEncoders.load(experts_path(), experts_path())
    with pytest.raises(ValueError, match="in_channels is 8, but the VAE's latents have 4"):
        StudentPipeline(trained(TinyFluxConfig.demo(in_channels=8, **SMALL)), encoders)
    with pytest.raises(ValueError, match="joint_attention_dim is 64"):
        StudentPipeline(trained(TinyFluxConfig.demo(joint_attention_dim=64, **SMALL)), encoders)
    with pytest.raises(TypeError, match="must be a TinyFlux"):
        StudentPipeline(demo_pipeline.unet_sol, encoders)
    with pytest.raises(ValueError, match="give encoders= or experts="):
        StudentPipeline.from_pretrained(folder)
    assert same_latents(encoders.vae, demo_pipeline.vae)
    assert same_latents(encoders.vae.half(), demo_pipeline.vae)
    with torch.no_grad():
        next(encoders.vae.float().encoder.parameters()).add_(0.01)
    assert not same_latents(encoders.vae, demo_pipeline.vae)
    with pytest.raises(ValueError, match="different latents"):
        StudentPipeline(trained(TinyFluxConfig.demo(**SMALL)), encoders, demo_pipeline)


def test_the_side_that_a_pipeline_was_made_for(tmp_path):
    assert default_side(experts_path()) == 16
    assert default_side(tmp_path) is None
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"sample_size": 128}))
    assert default_side(tmp_path) == 128


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["tinyflux", "sample", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_the_command(pipe, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = run(
        "--student", folder, *PROMPTS, "-o", "x.png", "--steps", 2, "--seed", 4, "--zoom", 1, "--trace"
    ).stdout
    assert shown.split() == ["x-1.png", "x-1.trace.png", "x-2.png", "x-2.trace.png"]
    assert Image.open("x-2.png").size == (64, 64)
    alone = read_settings(tmp_path / "x-2.png")
    assert (alone["prompt"], alone["seed"], alone["num_inference_steps"]) == (PROMPTS[1], 5, 2)
    assert alone["student"] == str(folder) and alone["guidance_scale"] == {"tinyflux": 3.0}

    weights = (
        "--sol-weight",
        "1:0.6,0.8:0",
        "--lune-weight",
        "0.3",
        "--handoff",
        0.8,
        "--guidance",
        "lune=2",
    )
    run("--student", folder, "--like", "x-2.png", "-o", "guided.png", "--steps", 4, *weights)
    guided = read_settings(tmp_path / "guided.png")
    assert guided["sol_weight"] == [[1.0, 0.6], [0.8, 0.0]] and guided["lune_weight"] == 0.3
    assert guided["seed"] == 5 and guided["num_inference_steps"] == 4
    assert guided["guidance_scale"] == {"tinyflux": 3.0, "sol": 2.5, "lune": 2.0}
    assert "--trust" in run("--like", "guided.png", "-o", "again.png", code=2).output
    run("--like", "guided.png", "--trust", "-o", "again.png")
    assert read_settings(tmp_path / "again.png") == guided
    pixels = [np.asarray(Image.open(name)) for name in ("guided.png", "again.png", "x-2.png")]
    assert (pixels[0] == pixels[1]).all() and (pixels[0] != pixels[2]).any()

    (tmp_path / "plan.json").write_text(pipe.plan(3, lune_weight=0.5, handoff=0.8).to_json())
    run("--student", folder, PROMPTS[0], "--plan", "plan.json", "--seed", 2, "-o", "planned.png", "--zoom", 1)
    made = pipe(PROMPTS[0], num_inference_steps=3, lune_weight=0.5, handoff=0.8, seed=2)
    assert (np.asarray(Image.open("planned.png")) == np.asarray(made.images[0])).all()
    run("--student", folder, "--like", "planned.png", "-o", "planned-2.png")
    assert (np.asarray(Image.open("planned-2.png")) == np.asarray(made.images[0])).all()
    refused = run("--student", folder, PROMPTS[0], "--plan", "plan.json", "--lune-weight", 0.2, code=2)
    assert "--plan decides what --lune-weight would" in refused.output

    result = CliRunner().invoke(app, ["generate", "--like", "guided.png", "-o", "no.png"])
    assert result.exit_code == 2 and "tinyflux sample --like" in result.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "give a prompt"),
        (("a castle", "--sol-weight", "1:0.5:3"), "give a number, or knots LEVEL:WEIGHT"),
        (("a castle", "--sol-weight", "0.5", "--lune-weight", "1:1"), "both have weight"),
        (
            ("a castle", "--lune-weight", "0.7", "--sol-weight", "0.7", "--steps", "1"),
            "1 steps cannot serve 2",
        ),
        (("a castle", "--guidance", "sol=2"), "names sol, but the experts are tinyflux"),
        (("a castle", "-o", "nowhere/x.png"), "nowhere is not a folder"),
        (("a castle", "--offload", "expert"), "leave out --offload"),
        (("a castle", "-o", "x.safetensors", "--trace"), "go with images"),
        (("a castle", "--steps", "2", "--steps", "sol=3"), "not both"),
        (("a castle", "-n", "0"), "a whole number from 1 to 10000, got 0"),
    ],
)
def test_the_command_refuses_before_it_loads(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run("--student", "no-such-student", *arguments, code=2)
    assert message in " ".join(result.output.split()) and not list(tmp_path.iterdir())


def test_the_command_has_a_student_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder by that name is not meant
    quick = ("--steps", 3, "--zoom", 1)
    run("a castle at dusk", *quick, "-o", "a.png")
    assert read_settings(tmp_path / "a.png")["student"] == "demo"
    run("--like", "a.png", "-o", "b.png")  # nothing to be trusted
    pipe = StudentPipeline.from_pretrained(student_path(), encoders=experts_path())
    made = np.asarray(pipe("a castle at dusk", num_inference_steps=3, seed=0).images[0])
    assert all((np.asarray(Image.open(tmp_path / name)) == made).all() for name in ("a.png", "b.png"))


@pytest.mark.parametrize("bad", ["tinyflux", "lune", "CLIPTextModel", "the VAE"])
def test_nan_is_named_and_never_painted(pipe, bad):
    spoilt = copy.deepcopy(pipe.student), copy.deepcopy(pipe.hybrid), copy.deepcopy(pipe.encoders)
    own = StudentPipeline(spoilt[0], spoilt[2], spoilt[1])
    own.set_progress_bar_config(disable=True)
    model = {
        "tinyflux": own.student,
        "lune": own.hybrid.expert_unet("lune"),
        "CLIPTextModel": own.encoders.clip.model,
        "the VAE": own.encoders.vae.decoder,
    }[bad]
    with torch.no_grad():
        list(model.parameters())[-1].fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=f"{bad}.* has NaN or infinite weights"):
        own(PROMPTS[0], num_inference_steps=2, lune_weight=0.4, seed=1)


def test_torchs_seed_decides_where_none_is_given(pipe):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        first = pipe(PROMPTS[0], num_inference_steps=2, output_type="latent")
        torch.manual_seed(4)
        again = pipe(PROMPTS[0], num_inference_steps=2, output_type="latent")
    assert torch.equal(first.images, again.images) and first.seeds == again.seeds


def test_guidance_of_one_or_less_is_none(pipe):
    keys = {"num_inference_steps": 2, "seed": 1, "output_type": "latent", "lune_weight": 0.4}
    none = pipe(PROMPTS[0], guidance_scale=1.0, **keys)
    assert not none.plan.guided
    for scale in (0, 0.5):
        assert torch.equal(none.images, pipe(PROMPTS[0], guidance_scale=scale, **keys).images)
