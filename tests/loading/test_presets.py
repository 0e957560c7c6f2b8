"""Presets: what is known by name agrees with the experts as the package builds them."""

from __future__ import annotations

import dataclasses

import diffusers
import pytest
import torch

from moe_sampler import Boundary, Expert, plan
from moe_sampler.architectures.unet import SD15_UNET
from moe_sampler.loading.parts import scheduler_from_config
from moe_sampler.loading.presets import PRESETS, TRAINING, preset, training_config
from moe_sampler.loading.weights import empty_model
from moe_sampler.pipelines.settings import default_settings, hybrid_experts, hybrid_plan


@pytest.mark.parametrize("kind", TRAINING)
def test_training_by_name_is_the_expert_of_that_name(kind):
    """Also after diffusers' scheduler has had the config, as it has in a pipeline."""
    wanted = getattr(Expert, kind)()
    scheduler = scheduler_from_config(training_config(kind))
    saved = {**scheduler.config, "_class_name": type(scheduler).__name__}
    for config in (training_config(kind), saved):
        read = Expert.from_scheduler_config(kind, config)
        # A shift is nothing to a discrete path, a spacing nothing to a continuous one.
        unused = {"shift": wanted.shift} if wanted.path.discrete else {"spacing": wanted.spacing}
        read = dataclasses.replace(read, **unused)
        for field in dataclasses.fields(Expert):
            if field.name != "path":
                assert getattr(read, field.name) == getattr(wanted, field.name), field.name
        if wanted.path.discrete:
            assert read.path.alphas == pytest.approx(wanted.path.alphas, rel=1e-12)
        else:
            assert read.path == wanted.path


def test_the_unet_is_stable_diffusions():
    unet = empty_model(SD15_UNET, "test", torch.float16)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    assert len(unet.state_dict()) == 686 and unet.config.sample_size == 64
    assert unet.state_dict()["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape == (
        1280,
        768,
    )


@pytest.mark.parametrize(
    ("scheduler", "kept"),
    [
        (
            diffusers.PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
            "epsilon",
        ),
        (diffusers.EulerDiscreteScheduler(prediction_type="v_prediction"), "v_prediction"),
        (diffusers.UniPCMultistepScheduler(trained_betas=[0.1, 0.2, 0.3]), "epsilon"),
    ],
)
def test_how_a_pipeline_happens_to_sample_is_not_how_it_was_trained(scheduler, kept):
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    expert = Expert.from_scheduler_config("x", training_config(config))
    assert expert.prediction == kept and expert.solver == "dpmpp_2m" and expert.spacing == "trailing"
    assert expert.path.alphas == pytest.approx(scheduler.alphas_cumprod.double().numpy() ** 0.5, rel=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "PNDM",
            "LMSDiscrete",
            "EulerDiscrete",
            "EulerAncestralDiscrete",
            "KDPM2Discrete",
            "UniPCMultistep",
        ),
        *("KDPM2AncestralDiscrete", "DEISMultistep", "DPMSolverSinglestep", "DPMSolverSDE"),
    ],
)
def test_of_a_scheduler_that_only_samples_the_facts_of_training_are_kept(name):
    """And where it leaves them out, diffusers' defaults of all of them."""
    name = f"{name}Scheduler"
    bare = training_config({"_class_name": name})
    betas = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
    own = {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "trailing"}
    assert bare == {**own, **betas}
    facts = {"num_train_timesteps": 500, "beta_schedule": "scaled_linear", "beta_start": 0.001}
    facts |= {"beta_end": 0.01, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    others = {"timestep_spacing": "leading", "trained_betas": None}
    assert training_config({"_class_name": name, **facts, **others}) == {**own, **facts}


def test_schedulers_the_planner_knows_stay_what_they_are():
    config = {**diffusers.DDIMScheduler().config, "_class_name": "DDIMScheduler"}
    assert training_config(config) == config


def test_a_preset_without_weights():
    """What a command needs to print a plan."""
    experts = preset("sd15").experts
    assert list(experts) == ["sol", "lune"] == list(PRESETS["sd15"].experts)
    configs = {name: training_config(source.training or name) for name, source in experts.items()}
    defaults = default_settings(configs)
    known = hybrid_experts(configs, {name: defaults[f"{name}_guidance"] for name in configs})
    wanted = plan(
        [Expert.sol(guidance_scale=7.5), Expert.lune(guidance_scale=7.5)],
        Boundary("sol", "lune", 0.7),
        steps=30,
    )
    assert str(hybrid_plan(known, defaults)) == str(wanted)


def test_unknown_names():
    with pytest.raises(ValueError, match='unknown preset "sd16": use sd15'):
        preset("sd16")
    with pytest.raises(ValueError, match='unknown kind of expert "moon": use sol, lune, sd15'):
        training_config("moon")
