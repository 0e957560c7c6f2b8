"""Presets, JSON and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from moe_sampler.tinyflux import TinyFluxConfig

KEYS = json.loads((Path(__file__).parents[2] / "fixtures/tinyflux_deep_keys.json").read_text())
TRAINED_WITH = ("text_mask", "schedule", "latent_shift", "sample_size", "negative_prompt")
OPTIONS = ("time_factor", "qk_norm", "head_temperature", "unit_mean_map", "null_condition", "text_dropout")


def test_upstreams_config_is_deep_v4():
    assert TinyFluxConfig.from_dict(KEYS["config"]) == TinyFluxConfig.deep_v4()


def test_new_models_differ_from_published_ones_in_every_option():
    new, published = TinyFluxConfig.deep().to_dict(), TinyFluxConfig.deep_v4().to_dict()
    assert {name for name in new if new[name] != published[name]} == {*OPTIONS, *TRAINED_WITH, "sol_qk_scale"}
    assert new == TinyFluxConfig().to_dict()


@pytest.mark.parametrize("preset", ["deep_v4", "deep", "demo"])
def test_json_round_trip(preset):
    config = getattr(TinyFluxConfig, preset)(num_double_layers=3)
    assert TinyFluxConfig.from_json(json.dumps(config.to_dict())) == config
    assert config.num_double_layers == 3


def test_demo_fits_the_demo_experts():
    from moe_sampler.demo import experts_path

    unet = json.loads((experts_path() / "unet_lune/config.json").read_text())
    text = json.loads((experts_path() / "text_encoder/config.json").read_text())
    config = TinyFluxConfig.demo()
    assert config.in_channels == unet["in_channels"]
    assert config.lune_expert_dim == unet["block_out_channels"][-1]
    assert config.joint_attention_dim == config.pooled_projection_dim == text["hidden_size"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"hidden_size": 500}, "num_attention_heads"),
        ({"axes_dims_rope": (16, 56, 54)}, "axes_dims_rope"),
        ({"axes_dims_rope": (17, 55, 56)}, "even"),
        ({"axes_dims_rope": (64, 64)}, "three"),
        ({"patch_size": 2}, "patch_size"),
        ({"in_channels": 0}, "in_channels"),
        ({"sol_geometric_weight": 1.5}, "sol_geometric_weight"),
        ({"text_dropout": -0.1}, "text_dropout"),
        ({"time_factor": 0.0}, "time_factor"),
        ({"null_condition": "empty"}, "null_condition"),
        ({"schedule": "middle"}, "schedule"),
        ({"sample_size": (64,)}, "sample_size"),
        ({"latent_scale": 0.0}, "latent_scale"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        TinyFluxConfig(**settings)


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match="guidance_strength"):
        TinyFluxConfig.from_dict({**KEYS["config"], "guidance_strength": 1})
    with pytest.raises(ValueError, match="huber_delta"):  # upstream's, but this is a config of ours
        TinyFluxConfig.from_dict({**TinyFluxConfig().to_dict(), "huber_delta": 0.1})


def test_upstreams_other_settings():
    """Those of its losses change nothing; those of another architecture are refused."""
    config = TinyFluxConfig.from_dict(
        {**KEYS["config"], "huber_delta": 0.1, "guidance_embeds": False, "_metadata": {}}
    )
    assert config == TinyFluxConfig.deep_v4()
    with pytest.raises(ValueError, match="guidance_embeds"):
        TinyFluxConfig.from_dict({**KEYS["config"], "guidance_embeds": True})
    # Upstream's model pools by attention whatever this says.
    assert TinyFluxConfig.from_dict({**KEYS["config"], "t5_pool_mode": "mean"}) == config


def test_upstreams_v3():
    """It knew Lune alone, by another name."""
    v3 = {"num_double_layers": 4, "use_expert_predictor": True, "expert_dim": 640, "expert_dropout": 0.2}
    config = TinyFluxConfig.from_dict(v3 | {"guidance_embeds": False})
    assert (config.use_lune_expert, config.lune_expert_dim, config.lune_dropout) == (True, 640, 0.2)
    assert not config.use_sol_prior and not config.use_t5_vec and config.num_double_layers == 4
    assert not TinyFluxConfig.from_dict(v3 | {"use_expert_predictor": False}).use_lune_expert


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TinyFluxConfig().hidden_size = 3
