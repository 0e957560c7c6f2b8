"""Saved pipelines through diffusers' own `DiffusionPipeline.from_pretrained`."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch

from moe_sampler import HybridPipeline

pytestmark = pytest.mark.usefixtures("own_modules")

CALL = dict(prompt="a castle", seed=2, num_inference_steps=4, output_type="latent")


@pytest.fixture
def saved(demo_pipeline, tmp_path):
    pipe = HybridPipeline(**demo_pipeline.components, handoff=0.6, sol_guidance=3.0)
    pipe.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_diffusers_loads_a_saved_pipeline(saved, demo_pipeline):
    pipe = diffusers.DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)
    assert isinstance(pipe, HybridPipeline) and pipe.expert_names == ("sol", "lune")
    assert pipe.config["handoff"] == 0.6 and pipe.config["sol_guidance"] == 3.0
    pipe.set_progress_bar_config(disable=True)
    want = demo_pipeline(**CALL, handoff=0.6, sol_guidance=3.0).images
    assert torch.equal(pipe(**CALL).images, want)
    torch.testing.assert_close(HybridPipeline.from_pretrained(saved)(**CALL).images, want, atol=0, rtol=0)


def test_saved_again_it_still_loads_both_ways(saved, tmp_path):
    pipe = diffusers.DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)
    pipe.save_pretrained(tmp_path / "again")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again.config["handoff"] == 0.6
    assert HybridPipeline.from_pretrained(tmp_path / "again").config["handoff"] == 0.6


def test_other_experts_after_these(saved, tmp_path, demo_pipeline):
    """Both folders' code is called `pipeline`."""
    diffusers.DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)
    parts = demo_pipeline.components
    own = {f"{part}_fine": parts[f"{part}_lune"] for part in ("unet", "scheduler")}
    three = HybridPipeline(**{**parts, **own, "defaults": {}}, handoff=[0.8, 0.4])
    three.save_pretrained(tmp_path / "three")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "three", trust_remote_code=True)
    assert pipe.expert_names == ("sol", "lune", "fine") and list(pipe.config["handoff"]) == [0.8, 0.4]


def test_the_card_says_how_and_a_users_card_stays(saved, demo_pipeline):
    card = (saved / "README.md").read_text()
    assert "trust_remote_code=True" in card and "HybridPipeline.from_pretrained" in card
    assert "| `handoff` | 0.6 |" in card and "sol and lune" in card
    (saved / "README.md").write_text("mine")
    demo_pipeline.save_pretrained(saved)
    assert (saved / "README.md").read_text() == "mine"
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "HybridPipeline"] and index["handoff"] != 0.6
