"""A pipeline on its way to the hub and back, through the hub's own client; and what its folder says of it."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import struct

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import is_peft_available
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moe_sampler import ExpertSource, HybridPipeline
from moe_sampler.cli import app
from moe_sampler.demo import experts_path
from moe_sampler.errors import CheckpointError
from moe_sampler.publishing.card import license_in
from moe_sampler.publishing.modelspec import describe_expert
from moe_sampler.viewing.images import read_settings

CALL = dict(prompt="a castle", seed=2, output_type="latent")


needs_peft = pytest.mark.skipif(not is_peft_available(), reason="peft is not installed")


@pytest.fixture(scope="module")
def pipe(demo_pipeline):
    """The demo's, with experts of a few thousand parameters that know nothing."""
    torch.manual_seed(0)
    parts = {**demo_pipeline.components, "defaults": {}}
    settings = dict(num_inference_steps=3, handoff=[0.8, 0.4])
    parts |= {f"unet_{name}": tiny_unet() for name in ("sol", "lune", "fine")}
    made = HybridPipeline(**parts, scheduler_fine=parts["scheduler_lune"], **settings)
    made.set_progress_bar_config(disable=True)
    return made


def tiny_unet():
    blocks = dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
    )
    sizes = dict(sample_size=16, layers_per_block=1, cross_attention_dim=128, norm_num_groups=8)
    return UNet2DConditionModel(**sizes, **blocks, attention_head_dim=8).eval()


def python_of(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)


def run_card(card: str) -> list[dict]:
    """What every block of its Python leaves behind."""
    found = []
    for code in python_of(card):
        namespace: dict = {}
        exec(compile(ast.parse(code), "card", "exec"), namespace)
        found.append(namespace)
    return found


def header(file) -> tuple[dict, bytes]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_there_and_back(hub, pipe, tmp_path):
    url = pipe.push_to_hub(
        "experts", commit_message="two experts", examples=["a castle", "a portrait, at night"]
    )
    files = hub.files("me/experts")
    assert {
        "model_index.json",
        "pipeline.py",
        "README.md",
        "examples/1.png",
        "examples/2.png",
    } <= files.keys()
    assert hub.commits == [("me/experts", "main", "two experts")] and "/me/experts/commit/" in url
    again = HybridPipeline.from_pretrained("me/experts")
    torch.testing.assert_close(again(**CALL).images, pipe(**CALL).images, rtol=0, atol=0)

    # every line of the card is true
    ours, theirs = run_card(files["README.md"].decode())
    assert ours["pipe"].expert_names == ("sol", "lune", "fine") and ours["image"].size == (64, 64)
    assert isinstance(theirs["pipe"], HybridPipeline)
    torch.testing.assert_close(theirs["pipe"](**CALL).images, pipe(**CALL).images, rtol=0, atol=0)
    assert theirs["pipe"].config["handoff"] == ours["pipe"].config["handoff"] == [0.8, 0.4]


def test_a_cards_pictures_are_the_pipelines(hub, pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "saved", examples=["a castle, at night"], license="mit")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "![a castle, at night](examples/1.png)" in card and "license: mit" in card
    assert "url: examples/1.png" in card and "| `handoff` | [0.8, 0.4] |" in card
    picture = tmp_path / "saved" / "examples" / "1.png"
    settings = read_settings(picture)
    assert settings["prompt"] == "a castle, at night" and settings["num_inference_steps"] == 3
    assert "Steps: 3" in Image.open(picture).info["parameters"]
    monkeypatch.chdir(tmp_path)
    for place in (["--model", "saved"], ["--model", ".", "--subfolder", "saved"]):
        given = ["generate", "--like", str(picture), *place, "-o", "again.png"]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open(picture)))


def test_branches_subfolders_and_who_may_read(hub, pipe, monkeypatch):
    pipe.push_to_hub("team/experts", private=True, revision="v2", subfolder="small")
    assert not hub.files("team/experts") and "small/model_index.json" in hub.files(
        "team/experts", revision="v2"
    )
    place = dict(revision="v2", subfolder="small")
    want = pipe(**CALL).images
    (own,) = run_card(hub.files("team/experts", revision="v2")["small/README.md"].decode())
    torch.testing.assert_close(own["pipe"](**CALL).images, want, rtol=0, atol=0)
    source = ExpertSource("team/experts", revision="v2", subfolder="small/unet_lune", training="lune")
    other = HybridPipeline.from_pretrained("team/experts", lune=source, **place)
    torch.testing.assert_close(other(**CALL).images, want, rtol=0, atol=0)

    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    asked = len(hub.asked)
    HybridPipeline.from_pretrained("team/experts", local_files_only=True, **place)  # it was downloaded before
    assert len(hub.asked) == asked
    with pytest.raises(CheckpointError, match="team/experts"):
        HybridPipeline.from_pretrained("team/experts", force_download=True, **place)
    with pytest.raises(CheckpointError, match=r"more cannot be written on the hub: .*401"):
        pipe.push_to_hub("team/more")
    HybridPipeline.from_pretrained("team/experts", force_download=True, token="hf_a_token", **place)


def test_a_card_that_somebody_wrote_stays_on_the_hub(hub, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "two", push_to_hub=True, repo_id="me/two", license="mit")
    own = (tmp_path / "two" / "README.md").read_text()
    assert 'from_pretrained("me/two")' in own and hub.files("me/two")["README.md"].decode() == own
    pipe.push_to_hub("me/two", license="apache-2.0")  # ours is written anew
    assert b"license: apache-2.0" in hub.files("me/two")["README.md"]
    hub.files("me/two")["README.md"] = b"mine"
    pipe.push_to_hub("me/two")
    assert hub.files("me/two")["README.md"] == b"mine"


def test_what_is_refused_is_refused_before_any_work(hub, pipe, tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="comit_message"):
        pipe.save_pretrained(tmp_path / "two", push_to_hub=True, comit_message="")
    with pytest.raises(TypeError, match="repo_id without push_to_hub=True"):
        pipe.save_pretrained(tmp_path / "two", repo_id="me/two")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match="two cannot be written on the hub"):
        pipe.save_pretrained(tmp_path / "two", push_to_hub=True)
    assert not (tmp_path / "two").exists() and not hub.branches


def test_a_license_is_its_sources(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "one", license="openrail++")
    again = HybridPipeline.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    assert "license: openrail++" in (tmp_path / "two" / "README.md").read_text()
    mixed = HybridPipeline.from_pretrained(tmp_path / "one", lune=tmp_path / "two" / "unet_lune")
    mixed.save_pretrained(tmp_path / "three")
    card = (tmp_path / "three" / "README.md").read_text()
    assert "license:" not in card and "None was named" in card
    assert license_in(experts_path()) == "mit"


def test_the_weights_say_what_they_are(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved", license="mit")
    for name, prediction in (("sol", "v"), ("lune", "flow")):
        file = tmp_path / "saved" / f"unet_{name}" / "diffusion_pytorch_model.safetensors"
        said, tensors = header(file)
        about = {key.removeprefix("modelspec."): value for key, value in said["__metadata__"].items()}
        assert about["sai_model_spec"] == "1.0.1" and about["title"] == f"saved, {name}"
        assert about["architecture"] == f"UNet2DConditionModel-{prediction}"
        assert about["implementation"] == "diffusers" and about["prediction_type"] == prediction
        assert about["resolution"] == "64x64" and about["license"] == "mit" and about["format"] == "pt"
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", about["date"])
        assert about["hash_sha256"] == "0x" + hashlib.sha256(tensors).hexdigest()
        loaded = load_file(file)
        assert all(torch.equal(t, loaded[k]) for k, t in pipe.expert_unet(name).state_dict().items())


def test_a_file_alone_says_all_that_it_was_trained_on(pipe, tmp_path):
    """Sol's betas aren't those of Stable Diffusion, which the prediction type alone would stand for."""
    pipe.save_pretrained(tmp_path / "saved")
    for name in ("sol", "lune"):
        file = tmp_path / "saved" / f"unet_{name}" / "diffusion_pytorch_model.safetensors"
        file.rename(tmp_path / f"{name}.safetensors")
        base, file = base_without_experts(tmp_path), tmp_path / f"{name}.safetensors"
        own = HybridPipeline.from_pretrained(base, experts={"mine": file})
        (one,), (two,) = own.experts(), [e for e in pipe.experts() if e.name == name]
        assert (one.path, one.prediction, one.shift) == (two.path, two.prediction, two.shift)


def base_without_experts(folder):
    """The saved pipeline's shared parts and its UNet's config."""
    index = json.loads((folder / "saved" / "model_index.json").read_text())
    kept = {key: value for key, value in index.items() if not key.startswith(("unet_", "scheduler_"))}
    kept.pop("experts", None)
    (folder / "saved" / "model_index.json").write_text(json.dumps(kept))
    return folder / "saved"


def test_equal_pipelines_are_saved_as_equal_files(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    for name in ("one", "two"):
        pipe.save_pretrained(tmp_path / name / "same")
    files = [
        tmp_path / name / "same" / "unet_sol" / "diffusion_pytorch_model.safetensors"
        for name in ("one", "two")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert header(files[0])[0]["__metadata__"]["modelspec.date"] == "1970-01-01"


@needs_peft
def test_a_lora_of_an_expert(hub, pipe, tmp_path):
    pipe.push_to_hub("experts")
    mine = HybridPipeline.from_pretrained("me/experts")
    mine.set_progress_bar_config(disable=True)
    unet, tensors = mine.unet_lune, {}
    for rank, name in ((2, "attn1.to_q"), (3, "attn2.to_k")):  # a rank and an alpha of its own each
        layer = next(n for n, m in unet.named_modules() if n.endswith(name))
        shape = unet.get_submodule(layer).weight.shape
        key = "lora_unet_" + layer.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": torch.randn(rank, shape[1])}
        tensors |= {f"{key}.lora_up.weight": torch.randn(shape[0], rank), f"{key}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "kohya.safetensors")
    plain = mine(**CALL).images
    mine.load_lora_weights(tmp_path / "kohya.safetensors", expert="lune", adapter_name="style")
    want = mine(**CALL).images
    assert not torch.equal(want, plain)
    with pytest.raises(ValueError, match="sol has no adapter"):
        mine.save_lora_weights(tmp_path / "no", expert="sol")
    with pytest.raises(ValueError, match="lune has no adapter 'other'; it has style"):
        mine.save_lora_weights(tmp_path / "no", expert="lune", adapter_name="other")
    mine.save_lora_weights(tmp_path / "style", expert="lune", push_to_hub=True, license="mit")
    (found,) = run_card(hub.files("me/style")["README.md"].decode())
    torch.testing.assert_close(found["pipe"](**CALL).images, want)
    about = header(tmp_path / "style" / "pytorch_lora_weights.safetensors")[0]["__metadata__"]
    assert (
        about["modelspec.architecture"] == "UNet2DConditionModel/lora" and about["modelspec.license"] == "mit"
    )


def test_stable_diffusions_models_are_called_as_modelspec_calls_them():
    sizes = {"block_out_channels": [320, 640, 1280, 1280], "sample_size": 64}
    for text, prediction, name in (
        (768, "epsilon", "stable-diffusion-v1"),
        (768, "flow_prediction", "stable-diffusion-v1-flow"),
        (1024, "v_prediction", "stable-diffusion-v2-v"),
        (640, "epsilon", "UNet2DConditionModel"),
    ):
        found = describe_expert("x", sizes | {"cross_attention_dim": text}, {}, prediction, scale=8)
        assert found["modelspec.architecture"] == name and found["modelspec.resolution"] == "512x512"
