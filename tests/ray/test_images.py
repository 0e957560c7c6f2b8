"""`GenerateImages` as Ray calls it, without Ray."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from moe_sampler.ray import GenerateImages
from moe_sampler.ray.cluster import connect

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
