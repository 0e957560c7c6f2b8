"""The settings that other programs read in an image, as they read them."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from moe_sampler import Crossfade, Expert, plan
from moe_sampler.viewing.images import check_room, read_settings, save_image
from moe_sampler.viewing.parameters import parameters_text


def as_others_read_it(text: str) -> dict[str, str]:
    """By the rules of the web UI's own reader: the last line is "name: value" with commas between, a value
    with commas or colons is quoted as JSON, and before it come the prompt and the negative one."""
    *before, last = text.split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    found = {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}
    assert len(pairs) >= 3  # with less it would be part of the prompt
    negative = [line for line in before if line.startswith("Negative prompt:")]
    prompt = before[: before.index(negative[0])] if negative else before
    return found | {"prompt": "\n".join(prompt), "negative": "".join(negative)[17:]}


@pytest.fixture
def run():
    experts = [Expert.sol(guidance_scale=2.5), Expert.lune(guidance_scale=4.0)]
    return plan(experts, Crossfade("sol", "lune", start=0.9, end=0.7), steps=12)


SETTINGS = {"prompt": "a castle, at dusk", "seed": 7, "model": "/home/me/my-experts", "version": "0.1.0"}


def test_what_others_find(run):
    found = as_others_read_it(parameters_text(SETTINGS | {"negative_prompt": "rain"}, run, (512, 384)))
    assert found["prompt"] == "a castle, at dusk" and found["negative"] == "rain"
    assert found["Steps"] == "12" and found["Seed"] == "7" and found["Size"] == "512x384"
    assert found["CFG scale"] == "2.5" and found["lune CFG scale"] == "4"
    assert found["Sampler"] == "DDPM" and found["lune Sampler"] == "Euler"
    assert found["Model"] == "my-experts" and found["Version"] == "moe-sampler 0.1.0"
    steps = [int(found[f"{name} steps"]) for name in ("sol", "lune")]
    both = sum(len(step.calls) == 2 for step in run.steps)
    assert both and sum(steps) == 12 + both


def test_negative_prompts_of_each_and_strange_values(run):
    settings = SETTINGS | {"negative_prompt": {"lune": "rain, fog: none", "sol": "night"}, "model": "a,b/c"}
    found = as_others_read_it(parameters_text(settings, run, (64, 64)))
    assert found["negative"] == "night" and found["lune negative prompt"] == "rain, fog: none"
    assert found["Model"] == "a,b/c"


def test_one_expert_has_plain_fields():
    one = plan([Expert.sd15(guidance_scale=7.5)], steps=5)
    found = as_others_read_it(parameters_text({"prompt": "a\ncastle", "seed": 1}, one, (512, 512)))
    assert found["prompt"] == "a\ncastle" and found["negative"] == ""
    assert found["Sampler"] == "DPM++ 2M" and found["CFG scale"] == "7.5"
    assert not [name for name in found if "sd15" in name]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("prompt", ["a castle", "ein Schloß 城 🏰"])
def test_they_lie_where_others_look(tmp_path, run, suffix, prompt):
    settings = SETTINGS | {"prompt": prompt}
    text = parameters_text(settings, run, (64, 64))
    save_image(Image.new("RGB", (8, 8)), tmp_path / f"x{suffix}", settings, text)
    assert read_settings(tmp_path / f"x{suffix}") == settings
    with Image.open(tmp_path / f"x{suffix}") as image:
        if suffix == ".png":
            assert image.info["parameters"] == text
        else:
            comment = image.getexif().get_ifd(0x8769)[0x9286]
            assert comment.startswith(b"UNICODE\0") and comment[8:].decode("utf-16-be") == text


def test_both_must_fit_into_a_jpeg(tmp_path):
    long = {"prompt": "a castle " * 2500}
    check_room(tmp_path / "x.jpg", long)
    with pytest.raises(ValueError, match="64 kB"):
        check_room(tmp_path / "x.jpg", long, long["prompt"])
