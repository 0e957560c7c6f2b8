"""`GenerateImages` as Ray calls it, without Ray."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from moe_sampler import Crossfade, SamplingPlan
from moe_sampler.cli import app
from moe_sampler.demo import experts_path
from moe_sampler.ray import GenerateImages
from moe_sampler.ray.cluster import connect
from moe_sampler.viewing.images import read_settings

SETTINGS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def generate():
    return GenerateImages(columns=["negative_prompt", "handoff"], settings=SETTINGS, image_format="array")


def batch(**columns) -> dict[str, np.ndarray]:
    """As Ray gives them."""
    return {name: np.array(values, dtype=object) for name, values in columns.items()}


def test_a_batch_gets_two_columns_and_keeps_the_others(generate):
    prompts = ["a castle", "a portrait", "a castle"]
    rows = batch(prompt=prompts, seed=[1, 2, 1], handoff=[0.8, None, float("nan")], id=["a", "b", "c"])
    made = generate(rows | batch(negative_prompt=["a hat", None, None]))
    assert list(made["id"]) == ["a", "b", "c"] and list(made["error"]) == [None] * 3
    assert made["image"].shape == (3, 64, 64, 3) and made["image"].dtype == np.uint8
    assert (made["image"][0] != made["image"][2]).any(), "a row's settings are its own"
    pipe = generate._pipe
    alone = pipe("a castle", seed=1, handoff=0.8, negative_prompt="a hat", **SETTINGS).images[0]
    assert (np.asarray(alone) == made["image"][0]).all()


def test_a_row_that_cannot_be_made_has_an_error_and_no_image(generate):
    prompts = ["a castle", None, "a castle"]
    rows = batch(prompt=prompts, seed=[1, 2, 3], handoff=[0.8, 0.8, 1.8], negative_prompt=[None] * 3)
    made = generate(rows)
    assert made["error"][0] is None and made["image"][0].shape == (64, 64, 3)
    assert "prompt" in made["error"][1] and made["image"][1].shape == (0, 0, 3)
    assert "1.8" in made["error"][2]


def test_files_are_bytes(generate, monkeypatch):
    monkeypatch.setattr(generate, "_format", "jpg")
    (data,) = generate(batch(prompt=["x"], seed=[1], handoff=[None], negative_prompt=[None]))["image"]
    assert isinstance(data, bytes) and Image.open(io.BytesIO(data)).format == "JPEG"


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_pictures_remember_what_they_were_made_with(generate, monkeypatch, tmp_path, kind):
    """Another program reads their parameters, and `generate --like` makes them again."""
    monkeypatch.setattr(generate, "_format", kind)
    rows = batch(prompt=["a castle"], seed=[7], handoff=[0.6], negative_prompt=["a hat"])
    (tmp_path / f"made.{kind}").write_bytes(generate(rows)["image"][0])
    settings = read_settings(tmp_path / f"made.{kind}")
    assert settings["handoff"] == 0.6 and settings["num_inference_steps"] == 2 and settings["model"] is None
    assert settings["guidance_scale"].keys() == {"sol", "lune"}, "the model's own, too"
    with Image.open(tmp_path / f"made.{kind}") as made:
        told = made.info.get("parameters") or made.getexif().get_ifd(0x8769)[0x9286][8:].decode("utf-16-be")
        assert told.startswith("a castle\nNegative prompt: a hat\nSteps: 2, ") and "Seed: 7" in told
        again = tmp_path / f"again.{kind}"
        like = ["generate", "--like", str(tmp_path / f"made.{kind}"), "-o", str(again), "--device=cpu"]
        assert CliRunner().invoke(app, like).exit_code == 0
        assert (np.asarray(Image.open(again)) == np.asarray(made)).all()


def test_a_plan_that_settings_cannot_say_is_remembered_itself(tmp_path):
    own = {"router": Crossfade("sol", "lune", 0.8, 0.5), "clip_skip": 1, **SETTINGS}
    generate = GenerateImages(settings=own, sol=experts_path() / "unet_sol")
    (tmp_path / "made.png").write_bytes(generate(batch(prompt=["a castle"], seed=[7]))["image"][0])
    settings = read_settings(tmp_path / "made.png")
    plan = generate._pipe.plan(num_inference_steps=2, router=own["router"])
    assert SamplingPlan.from_json(json.dumps(settings["plan"])) == plan and "router" not in settings
    assert settings["sources"] == {"sol": {"weights": str(experts_path() / "unet_sol")}}
    assert "Clip skip: 2" in Image.open(tmp_path / "made.png").info["parameters"]


def test_what_a_speed_lets_reuse_is_remembered(tmp_path):
    generate = GenerateImages(settings={"num_inference_steps": 10}, speed="fast", dtype="float32")
    (tmp_path / "made.png").write_bytes(generate(batch(prompt=["a castle"], seed=[7]))["image"][0])
    settings = read_settings(tmp_path / "made.png")
    assert settings["speed"] == "fast" and settings["reuse"] == {"sol": 3, "lune": 3}
    like = ["generate", "--like", str(tmp_path / "made.png"), "-o", str(tmp_path / "b.png"), "--device=cpu"]
    assert CliRunner().invoke(app, like).exit_code == 0
    with Image.open(tmp_path / "made.png") as made, Image.open(tmp_path / "b.png") as again:
        assert made.tobytes() == again.tobytes()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "somewhere"])
def test_a_cluster_that_is_not_there_is_said_at_once(address):
    pytest.importorskip("ray.data", reason="the extra ray isn't installed")
    with pytest.raises(ValueError, match=f"no Ray cluster at {address}|give host:port"):
        connect(address)


def test_what_a_data_set_lacks_is_said(generate):
    with pytest.raises(ValueError, match="no column seed, only prompt: what comes of a row"):
        generate(batch(prompt=["x"]))
    with pytest.raises(ValueError, match=r'"guidence" is no setting of a row: use .*guidance_scale'):
        GenerateImages(columns=["guidence"])
    with pytest.raises(ValueError, match="image format"):
        GenerateImages(image_format="bmp")
