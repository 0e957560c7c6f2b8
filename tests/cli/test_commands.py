"""The command as a user runs it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moe_sampler import Boundary, Expert, SamplingPlan, __version__, plan
from moe_sampler.cli import app
from moe_sampler.cli.routers import EXAMPLES
from moe_sampler.demo import experts_path
from moe_sampler.loading.presets import PRESETS, TRAINING
from moe_sampler.pipelines.choices import DTYPES, OFFLOADS
from moe_sampler.sampling.solvers import SOLVERS
from moe_sampler.viewing.images import read_settings

PROMPT = "a castle with two towers, at dusk"


def run(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_generate_writes_one_image_that_can_be_made_again(tmp_path):
    assert (
        run("generate", PROMPT, "-o", "castle.png", "--steps", 4, "--seed", 3).stdout.strip() == "castle.png"
    )
    settings = read_settings(tmp_path / "castle.png")
    assert settings["prompt"] == PROMPT and settings["seed"] == 3 and settings["num_inference_steps"] == 4
    assert settings["version"] == __version__ and 0 < settings["handoff"] < 1
    assert Image.open("castle.png").size == (512, 512)
    run("generate", "--like", "castle.png", "-o", "again.png")
    assert (pixels("castle.png") == pixels("again.png")).all()
    assert read_settings(tmp_path / "again.png") == settings
    run("generate", "--like", "castle.png", "-o", "other.png", "--seed", 4, "--expert", "lune", "--zoom", 1)
    assert Image.open("other.png").size == (64, 64)
    assert read_settings(tmp_path / "other.png")["expert"] == "lune"
    run("generate", "--like", "other.png", "-o", "small.png")
    assert (pixels("other.png") == pixels("small.png")).all()


def test_several_prompts_and_images_are_numbered_and_each_can_be_made_alone():
    shown = run("generate", PROMPT, "a portrait", "-n", 2, "--seed", 7, "-o", "x.png", "--steps", 2).stdout
    assert shown.split() == [f"x-{i}.png" for i in (1, 2, 3, 4)]
    settings = [read_settings(f"x-{i}.png") for i in (1, 2, 3, 4)]
    assert [(s["prompt"], s["seed"]) for s in settings] == [
        (PROMPT, 7),
        (PROMPT, 8),
        ("a portrait", 9),
        ("a portrait", 10),
    ]
    run("generate", "--like", "x-4.png", "-o", "alone.png")
    # One grey level at most: the model may round differently in another batch.
    assert np.abs(pixels("alone.png").astype(int) - pixels("x-4.png")).max() <= 1


def test_every_option_reaches_the_pipeline():
    run(
        *(
            "generate",
            PROMPT,
            "-o",
            "a.png",
            "--seed",
            1,
            "--sol-steps",
            2,
            "--lune-steps",
            3,
            "--handoff",
            0.5,
        ),
        *("--sol-guidance", 1.5, "--lune-guidance", 2.5, "--negative", "night", "--shift", 1.5),
        *("--solver", "dpmpp_2m", "--height", 48, "--width", 80, "--device", "cpu"),
    )
    settings = read_settings("a.png")
    expected = dict(num_inference_steps={"sol": 2, "lune": 3}, handoff=0.5, shift=1.5)
    expected |= dict(guidance_scale={"sol": 1.5, "lune": 2.5})
    expected |= dict(negative_prompt="night", solver="dpmpp_2m", height=48, width=80, model=None)
    assert settings == settings | expected
    run("generate", PROMPT, "-o", "b.png", "--seed", 1, "--steps", 2, "--guidance", 3)
    assert read_settings("b.png")["guidance_scale"] == {"sol": 3, "lune": 3}


def test_trace_writes_a_contact_sheet():
    shown = run("generate", PROMPT, "-o", "castle.png", "--steps", 4, "--seed", 0, "--trace").stdout.split()
    assert shown == ["castle.png", "castle.trace.png"]
    width, height = Image.open("castle.trace.png").size
    assert width > 4 * 150 and height > 150


def test_a_model_folder(tmp_path):
    model = shutil.copytree(experts_path(), tmp_path / "model")
    run("generate", PROMPT, "-o", "a.png", "--steps", 2, "--seed", 0, "--model", model)
    run("generate", PROMPT, "-o", "b.png", "--steps", 2, "--seed", 0)
    assert (pixels("a.png") == pixels("b.png")).all()
    assert read_settings("a.png")["model"] == str(model)


def test_plan_prints_the_table_and_json():
    lines = run("plan", "--steps", 8, "--handoff", 0.6).stdout.splitlines()
    assert lines[0].startswith("8 steps") and len(lines) == 10
    compiled = SamplingPlan.from_json(run("plan", "--steps", 8, "--handoff", 0.6, "--json").stdout)
    assert str(compiled).splitlines() == lines


def test_a_plan_makes_the_same_image_through_python_and_the_command(tmp_path, demo_pipeline):
    """To the bit: from settings, from a plan in memory, from its JSON in Python and from a file."""
    flags = ("--steps", 5, "--handoff", 0.8, "--guidance", "lune=3", "--solver", "sol=dpmpp_2m")
    written = run("plan", *flags, "--json", "--image", "plan.png").stdout
    (tmp_path / "plan.json").write_text(written)
    settings = dict(
        num_inference_steps=5, handoff=0.8, guidance_scale={"lune": 3.0}, solver={"sol": "dpmpp_2m"}
    )
    made = demo_pipeline(PROMPT, seed=4, **settings)
    again = demo_pipeline(PROMPT, seed=4, plan=SamplingPlan.from_json(written))
    assert again.plan == made.plan and again.images[0] == made.images[0]
    run("generate", PROMPT, "--plan", "plan.json", "--seed", 4, "--zoom", 1, "-o", "a.png")
    assert (pixels("a.png") == np.asarray(made.images[0])).all()
    # The image remembers the plan, whatever becomes of the file.
    (tmp_path / "plan.json").unlink()
    run("generate", "--like", "a.png", "-o", "b.png")
    assert (pixels("a.png") == pixels("b.png")).all()
    recorded = read_settings(tmp_path / "a.png")
    assert recorded == read_settings(tmp_path / "b.png") and "handoff" not in recorded
    assert SamplingPlan.from_json(json.dumps(recorded["plan"])) == made.plan
    message = run("generate", "--like", "a.png", "--steps", 3, "-o", "c.png", code=2).stderr
    assert "the image's plan decides what --steps would" in message
    result = CliRunner().invoke(
        app,
        ["generate", PROMPT, *["--plan", "-", "--zoom", "1", "--seed", "4", "-o", "d.png"]],
        input=written,
    )
    assert result.exit_code == 0 and (pixels("d.png") == pixels("a.png")).all()


def test_a_plan_from_an_image(tmp_path, demo_pipeline):
    Image.new("RGB", (64, 64), "blue").save("blue.png")
    (tmp_path / "late.json").write_text(run("plan", "--steps", 4, "--strength", 0.5, "--json").stdout)
    run("generate", PROMPT, "--plan", "late.json", "--image", "blue.png", "--zoom", 1, "-o", "a.png")
    run(
        "generate", PROMPT, "--steps", 4, "--strength", 0.5, "--image", "blue.png", "--zoom", 1, "-o", "b.png"
    )
    assert (pixels("a.png") == pixels("b.png")).all()
    assert "strength" not in read_settings(tmp_path / "a.png")
    refused = run("generate", "--like", "a.png", "-o", "c.png", code=2).stderr
    assert "blue.png: give --trust" in refused and not (tmp_path / "c.png").exists()
    run("generate", "--like", "a.png", "--trust", "-o", "c.png")
    assert (pixels("a.png") == pixels("c.png")).all()
    run("generate", "--like", "a.png", "--image", "blue.png", "-o", "d.png")
    assert (pixels("a.png") == pixels("d.png")).all()


def test_help_lists_what_the_code_knows():
    shown = " ".join(run("generate", "--help").stdout.replace("│", " ").split())
    for names in (SOLVERS, PRESETS, TRAINING, OFFLOADS, DTYPES, EXAMPLES):
        assert [name for name in names if name not in shown] == []


def test_version_and_help_teach():
    assert run("--version").stdout.strip() == f"moe-sampler {__version__}"
    overview = run("--help").stdout
    assert all(name in overview for name in ("generate", "plan", "compare", "experts"))
    details = run("generate", "--help").stdout
    assert "sol 4 lune 8" in " ".join(details.replace("│", " ").split())
    options = ("--seed", "--steps", "--handoff", "--guidance", "--negative", "--model", "--expert", "--trace")
    assert all(name in details for name in (*options, "-n", "-o", "castle.png"))


def plan_files() -> dict[str, str]:
    """Plans that can be run, and some that cannot."""
    experts = Expert.sol(solver="dpmpp_2m"), Expert.lune()
    whole = plan(experts, Boundary("sol", "lune", 0.7), steps=4)
    cut = dataclasses.replace(whole, steps=whole.steps[1:])
    other = plan(Expert.lune(name="luna"), steps=4)
    late = plan(Expert.lune(), steps=4, start=0.6)
    plans = {"plan.json": whole, "cut.json": cut, "other.json": other, "late.json": late}
    return {name: made.to_json() for name, made in plans.items()}


@pytest.mark.parametrize(
    "arguments",
    [
        ("x", "--expert", "luna"),
        ("x", "--handoff", "0"),
        ("x", "--handoff", "1"),
        ("x", "--handoff", "nan"),
        ("x", "--steps", "0"),
        ("x", "--steps", "-3"),
        ("x", "--steps", "100000"),
        ("x", "--steps", "1000000000"),
        ("x", "--steps", "sol=1000000000", "--steps", "lune=4"),
        ("x", "--handoff", "0.999", "--steps", "2"),
        ("x", "-n", "1000000000"),
        ("x", "--batch-size", "1000000000"),
        ("x", "--height", "1000000"),
        ("x", "--width", "16384", "--height", "16384"),
        ("x", "--shift", "1e308"),
        ("x", "--zoom", "1000000"),
        ("x", "--height", "60"),
        ("x", "-n", "0"),
        ("x", "--zoom", "0"),
        ("x", "--solver", "magic"),
        ("x", "--model", "nowhere"),
        ("x", "--model", "."),
        ("x", "--model", "incomplete"),
        ("x", "--model", "unreadable"),
        ("x", "-o", "nowhere/image.png"),
        ("x", "-o", "image.gif"),
        ("x", "-o", "."),
        ("x", "--device", "tpu"),
        ("x", "--like", "nowhere.png"),
        ("x", "--expert", "sol", "--handoff", "0.5"),
        ("x", "--steps", "4", "--sol-steps", "2"),
        ("x", "--steps", "many"),
        ("x", "--steps", "luna=4"),
        ("x", "--guidance", "luna=4"),
        ("x", "--guidance", "strong"),
        ("x", "--guidance", "inf"),
        ("x", "--guidance", "2", "--guidance", "3"),
        ("x", "--guidance", "sol=2", "--sol-guidance", "3"),
        ("x", "--guidance-window", "0.3"),
        ("x", "--guidance-window", "0.3:0.8"),
        ("x", "--guidance-rescale", "2"),
        ("x", "--eta", "2"),
        ("x", "--shift", "0"),
        ("x", "--router", "magic"),
        ("x", "--router", "crossfade 0.8 0.6", "--handoff", "0.7"),
        ("x", "--router", "steps sol 2 lune 2", "--steps", "4"),
        ("x", "--handoff", "0.8", "--handoff", "0.6"),
        ("x", "--image", "nowhere.png"),
        ("x", "--strength", "0.5"),
        ("x", "--image", "blue.png", "--strength", "0"),
        ("x", "--image", "blue.png", "--strength", "0.01"),
        ("x", "--image", "blue.png", "--height", "60"),
        ("x", "--preset", "sd16"),
        ("x", "--sol", "sol.safetensors"),
        ("x", "--model", "demo", "--sol", "sol.safetensors"),
        ("x", "--model", "demo", "--expert-source", "unet"),
        ("x", "--model", "demo", "--expert-source", "mine=blue.png"),
        ("x", "--model", "demo", "--expert-training", "mine=sol"),
        ("x", "--model", "demo", "--sol", "blue.png", "--expert-training", "sol=moon"),
        ("x", "--revision", "sol=main"),
        ("x", "--offload", "disk"),
        ("x", "--offload", "model", "--device", "cpu"),
        ("x", "--dtype", "int8"),
        ("x", "--batch-size", "0"),
        ("x", "--lora", "style.safetensors"),
        ("x", "--lora", "sol=style.safetensors"),
        ("x", "--lora", "luna=blue.png"),
        ("x", "--lora", "sol=loha.safetensors"),
        ("x", "--trace", "-o", "latents.safetensors"),
        ("x", "--like", "blue.png"),
        ("x", "--plan", "nowhere.json"),
        ("x", "--plan", "blue.png"),
        ("x", "--plan", "plan.json", "--steps", "4"),
        ("x", "--plan", "plan.json", "--sol-guidance", "2"),
        ("x", "--plan", "plan.json", "--router", "crossfade 0.8 0.6"),
        ("x", "--plan", "plan.json", "--image", "blue.png"),
        ("x", "--plan", "plan.json", "--strength", "0.5"),
        ("x", "--plan", "late.json"),
        ("x", "--plan", "other.json"),
        ("x", "--plan", "cut.json"),
        (),
    ],
)
def test_wrong_input_ends_with_one_line_and_nothing_read_or_written(tmp_path, monkeypatch, arguments):
    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("moe_sampler.loading.parts.load_component", read)
    monkeypatch.setattr("moe_sampler.loading.weights.ExpertWeights.take", read)
    Image.new("RGB", (72, 72), "blue").save("blue.png")
    save_file({"lora_unet_mid_block.hada_w1_a": torch.ones(2, 2)}, "loha.safetensors")
    for name, text in plan_files().items():
        (tmp_path / name).write_text(text)
    shutil.copytree(experts_path(), tmp_path / "incomplete", ignore=shutil.ignore_patterns("unet_sol"))
    broken = shutil.copytree(experts_path(), tmp_path / "unreadable")
    (broken / "unet_lune" / "diffusion_pytorch_model.safetensors").write_bytes(b"not safetensors")
    before = sorted(tmp_path.iterdir())
    result = run("generate", *arguments, code=2)
    message = result.stderr.strip().splitlines()
    assert len(message) == 1 and message[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.output
    assert sorted(tmp_path.iterdir()) == before


def test_an_unwritable_folder_is_refused_before_any_work(monkeypatch):
    # By the answer of the system rather than by chmod: root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert "not writable" in run("generate", PROMPT, "-o", "image.png", code=2).stderr


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "castle.png").write_bytes(b"precious")

    def fail(self, _):
        with open(self, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", fail)
    result = run("generate", PROMPT, "-o", "castle.png", "--steps", 2, code=2)
    assert "No space left" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["castle.png"]
    assert (tmp_path / "castle.png").read_bytes() == b"precious"


@pytest.mark.parametrize("part", ["unet_sol", "unet_lune", "vae", "text_encoder"])
def test_weights_that_are_nan_end_with_a_line_that_names_them(tmp_path, part):
    folder = shutil.copytree(experts_path(), tmp_path / "model")
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    used = [key for key, tensor in tensors.items() if tensor.is_floating_point() and "encoder" not in key]
    name = max(used or tensors)
    tensors[name].view(-1)[0] = math.nan
    save_file(tensors, path, {"format": "pt"})
    result = run("generate", PROMPT, "--model", folder, "-n", 2, "--steps", 4, "-o", "image.png", code=2)
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert (
        "NaN or an infinity" in line
        and f"{name.removeprefix('text_model.')} first" in line
        and "Traceback" not in result.output
    )
    if part.startswith("unet"):
        assert f"error: {part.removeprefix('unet_')} gave NaN or an infinity at step" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_settings_are_json_in_the_metadata():
    run("generate", PROMPT, "-o", "castle.png", "--steps", 2, "--seed", 1)
    assert json.loads(Image.open("castle.png").info["moe-sampler"])["seed"] == 1


def test_experts_demo_refuses_an_unknown_stage():
    message = run("experts", "demo", "out", "--stage", "luna", code=2).stderr.strip()
    assert message.startswith('error: unknown stage "luna"') and "trunk" in message
    assert not os.listdir()
