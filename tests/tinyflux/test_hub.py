"""Students, their LoRAs and caches on their way to the hub and back, through the hub's own client."""

from __future__ import annotations

import ast
import json
import re

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from tinyflux_helpers import trained
from typer.testing import CliRunner

from moe_sampler.cli import app
from moe_sampler.data.scenes import DemoScenes
from moe_sampler.errors import CheckpointError
from moe_sampler.tinyflux import (
    FeatureCache,
    StudentEncoders,
    StudentPipeline,
    TextEncoder,
    TinyFlux,
    TinyFluxConfig,
    build_cache,
)
from moe_sampler.tinyflux.model.lora import LoraLayer, put_lora
from moe_sampler.tinyflux.training.run import train
from moe_sampler.tinyflux.training.settings import StudentSettings
from moe_sampler.training.settings import from_tables
from moe_sampler.viewing.images import read_settings

CALL = dict(num_inference_steps=2, seed=3, output_type="latent")
SIZES = dict(hidden_size=32, num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6))
SIZES |= dict(num_double_layers=1, num_single_layers=1, sample_size=(16, 16))


@pytest.fixture
def student():
    return trained(TinyFluxConfig.demo(**SIZES))


@pytest.fixture
def pipe(student, demo_pipeline):
    encoders = StudentEncoders(
        demo_pipeline.vae, TextEncoder(demo_pipeline.text_encoder, demo_pipeline.tokenizer)
    )
    made = StudentPipeline(student, encoders)
    made.set_progress_bar_config(disable=True)
    return made


def run_card(card: bytes) -> list[dict]:
    """What every block of its Python leaves behind."""
    found = []
    for code in re.findall(r"^```python\n(.*?)^```", card.decode(), re.DOTALL | re.MULTILINE):
        namespace: dict = {}
        exec(compile(ast.parse(code), "card", "exec"), namespace)
        found.append(namespace)
    return found


def same(one: TinyFlux, other: TinyFlux) -> bool:
    return isinstance(one, TinyFlux) and all(
        torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items()
    )


def test_a_student_alone(hub, student, tmp_path):
    student.push_to_hub("student", license="mit")
    files = hub.files("me/student")
    assert files.keys() == {"README.md", "config.json", "tinyflux.py", "diffusion_pytorch_model.safetensors"}
    ours, theirs = run_card(files["README.md"])
    assert same(ours["student"], student) and same(theirs["student"], student)
    with safe_open(student_file(tmp_path, files), framework="pt") as opened:
        about = opened.metadata()
    assert about["modelspec.architecture"] == "tinyflux" and about["modelspec.title"] == "student"
    assert about["modelspec.license"] == "mit" and about["modelspec.hash_sha256"].startswith("0x")

    student.save_pretrained(
        tmp_path / "in", push_to_hub=True, repo_id="me/more", subfolder="a", revision="v2"
    )
    assert not hub.files("me/more") and "a/config.json" in hub.files("me/more", revision="v2")
    assert same(TinyFlux.from_pretrained("me/more", revision="v2", subfolder="a"), student)
    (ours, theirs) = run_card((tmp_path / "in" / "README.md").read_bytes())
    assert same(ours["student"], student) and same(theirs["student"], student)
    with pytest.raises(TypeError, match="repo_id without push_to_hub=True"):
        student.save_pretrained(tmp_path / "no", repo_id="me/no")


def student_file(folder, files):
    (folder / "student.safetensors").write_bytes(files["diffusion_pytorch_model.safetensors"])
    return folder / "student.safetensors"


def test_a_student_with_its_encoders(hub, pipe, tmp_path, monkeypatch):
    url = pipe.push_to_hub("team/student", examples=["a castle"], private=True, license="mit")
    assert "/team/student/commit/" in url
    files = hub.files("team/student")
    assert b"license: mit" in files["README.md"] and b"![a castle](examples/1.png)" in files["README.md"]
    ours, theirs = run_card(files["README.md"])
    assert ours["image"].size == (64, 64) and isinstance(theirs["pipe"], DiffusionPipeline)
    want = pipe("a castle", **CALL).images
    for found in (ours["pipe"], theirs["pipe"]):
        assert isinstance(found, StudentPipeline)
        torch.testing.assert_close(found("a castle", **CALL).images, want, rtol=0, atol=0)
    assert same(TinyFlux.from_pretrained("team/student"), pipe.student)
    monkeypatch.chdir(tmp_path)
    line = [
        "tinyflux",
        "sample",
        "a castle",
        "--student",
        "team/student",
        "--steps",
        "2",
        "--local-files-only",
        "-o",
        "x.png",
    ]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    config = json.loads(files["transformer/config.json"])
    assert config["encoders"] is None and config["auto_map"] == {"AutoModel": "tinyflux.TinyFlux"}


def test_a_picture_on_a_students_card_has_its_settings(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved", examples=["a castle", "a portrait"])
    settings = read_settings(tmp_path / "saved" / "examples" / "2.png")
    assert settings["prompt"] == "a portrait" and settings["seed"] == 1
    again = StudentPipeline.from_pretrained(tmp_path, subfolder="saved")
    torch.testing.assert_close(
        again("a castle", **CALL).images, pipe("a castle", **CALL).images, rtol=0, atol=0
    )


def test_a_lora_of_a_student(hub, pipe, tmp_path):
    pytest.importorskip("peft")
    pipe.push_to_hub("student")
    mine = StudentPipeline.from_pretrained("me/student")
    mine.set_progress_bar_config(disable=True)
    plain = mine("a castle", **CALL).images
    layer = "double_blocks.0.attn.img_qkv"
    put_lora(mine.student, {layer: LoraLayer(torch.randn(3, 32), torch.randn(96, 3), 6.0)}, "style", 1.0)
    want = mine("a castle", **CALL).images
    assert not torch.equal(want, plain)
    with pytest.raises(ValueError, match="has LoRA adapters"):
        mine.save_pretrained(tmp_path / "no")
    with pytest.raises(ValueError, match="no adapter 'other', but style"):
        mine.save_lora_weights(tmp_path / "no", "other")
    mine.save_lora_weights(tmp_path / "style", "style", push_to_hub=True, repo_id="me/style", license="mit")
    (found,) = run_card(hub.files("me/style")["README.md"])
    torch.testing.assert_close(found["pipe"]("a castle", **CALL).images, want, rtol=0, atol=0)
    with safe_open(tmp_path / "style" / "pytorch_lora_weights.safetensors", framework="pt") as opened:
        assert opened.metadata()["modelspec.architecture"] == "tinyflux/lora"
    other = StudentPipeline.from_pretrained("me/student", local_files_only=True)
    other.load_lora_weights("me/style", revision="main", weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(other("a castle", **CALL).images, want, rtol=0, atol=0)


def test_a_cache_and_a_student_trained_on_it(hub, pipe, tmp_path):
    build_cache(tmp_path / "cache", DemoScenes(5), pipe.encoders, None, height=64, width=64, shard_size=3)
    cache = FeatureCache(tmp_path / "cache")
    before = sorted(path.name for path in (tmp_path / "cache").iterdir())
    cache.push_to_hub("scenes", private=True, license="mit")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == before
    files = hub.files("me/scenes", "datasets")
    assert {"README.md", "manifest.json", "shard-00001.safetensors", "examples/0.png"} <= files.keys()
    (found,) = run_card(files["README.md"])
    assert len(found["cache"]) == 5 and found["cache"].caption(4) == cache.caption(4)
    assert torch.equal(found["cache"][4]["latents"], cache[4]["latents"])
    again = FeatureCache.from_pretrained("me/scenes", revision="main", local_files_only=True, verify=False)
    assert len(again) == 5
    with pytest.raises(CheckpointError, match=r"me/lost:manifest\.json"):
        FeatureCache.from_pretrained("me/lost")

    pipe.student.save_pretrained(tmp_path / "begin")
    training = {"output_dir": str(tmp_path / "run"), "max_train_steps": 1, "lr_warmup_steps": 0}
    training |= {"train_batch_size": 2, "report_to": "none", "push_to_hub": True, "license": "mit"}
    tables = {"training": training, "data": {"caches": ["me/scenes"], "held_out": 2}}
    tables |= {"model": {"preset": "demo", "init_from": str(tmp_path / "begin")}}
    tables |= {"validation": {"num_inference_steps": 1}}
    nothing = ("feature_input", "lune_weight", "sol_stats_weight", "sol_map_weight")
    tables |= {"objective": dict.fromkeys(nothing, 0.0)}
    train(from_tables(StudentSettings, tables), quiet=True)
    files = hub.files("me/run")
    sheet = "samples/step-000001.png"
    assert files.keys() == {"README.md", "config.json", "tinyflux.py", "model.safetensors", sheet}
    card = files["README.md"]
    assert f"]({sheet})".encode() in card and b"license: mit" in card
    ours, theirs = run_card(card)
    trained_one = TinyFlux.from_pretrained(tmp_path / "run")
    assert same(ours["student"], trained_one) and same(theirs["student"], trained_one)
    with safe_open(tmp_path / "run" / "model.safetensors", framework="pt") as opened:
        assert opened.metadata()["modelspec.title"] == "run"
