"""docs/TINYFLUX_DEEP.md from top to bottom, with tiny models in the formats of the published ones."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from real_formats import LUNE_WIDTH, POOLED, SIDE, TEXT, write_models, write_pictures
from safetensors.torch import load_file
from tinyflux_helpers import inputs_of
from tinyflux_reference import Reference
from typer.testing import CliRunner

from moe_sampler.cli import app
from moe_sampler.loading import presets
from moe_sampler.sampling.initial import initial_latents
from moe_sampler.tinyflux import FeatureCache, StudentPipeline, TinyFlux, TinyFluxConfig
from moe_sampler.viewing.images import read_settings

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/TINYFLUX_DEEP.md").read_text(encoding="utf-8")
UPSTREAM = json.loads((ROOT / "tests/fixtures/tinyflux_deep_keys.json").read_text())
COUNT, CELLS = 8, SIDE // 8

SMALL = """num_attention_heads = 2
attention_head_dim = 16
num_double_layers = 1
num_single_layers = 1
lune_hidden_dim = 16
sol_hidden_dim = 16"""
SMALLER = {
    r"max_train_steps = \d+": 'max_train_steps = 2\ncheckpointing_steps = 2\nreport_to = "none"',
    r"--max-train-steps \d+": "--max-train-steps 3",
    r"lr_warmup_steps = \d+": "lr_warmup_steps = 0",
    r"sample_steps = \d+": "sample_steps = 2",
    r"train_batch_size = \d+": "train_batch_size = 4",
    r"held_out = \d+": "held_out = 2",
    r'(preset = "deep\w*")': rf"\1\n{SMALL}",
    r"\[validation\]": "[validation]\nnum_inference_steps = 1\nnoise_levels = [0.5]",
    r"--size \d+": f"--size {SIDE}",
    r"( -o \w+\.png)": r" --steps 2 --zoom 1\1",
}
"""Of the page's commands and files: what would take days."""
ELSEWHERE = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "black-forest-labs/FLUX.1-schnell": "flux",
    "openai/clip-vit-large-patch14": "clip",
    "google/flan-t5-base": "t5",
    "AbstractPhil/tiny-flux-deep": "upstream/student",
}


def run(line: str, code: int = 0) -> str:
    words = shlex.split(line)
    assert words[0] == "moe-sampler"
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == code, (line, result.output, result.exception)
    return " ".join(result.output.split())


@pytest.fixture(scope="module", autouse=True)
def fresh_accelerate():
    """Each command is a process of its own in life: what Accelerate remembers of other tests is forgotten."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """The folder in which every command of the page was typed."""
    folder = tmp_path_factory.mktemp("deep")
    write_models(folder)
    write_pictures(folder / "pictures", COUNT)
    published = presets.Preset(
        "sd15", {name: presets.ExpertSource(f"{name}.safetensors", name) for name in ("sol", "lune")}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(presets, "PRESETS", {"sd15": published})
        for language, code in re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE):
            for there, here in ELSEWHERE.items():
                code = code.replace(there, here)
            for large, small in SMALLER.items():
                code = re.sub(large, small, code)
            if language == "toml":
                Path(code.splitlines()[0].removeprefix("# ")).write_text(code)
                continue
            for line in code.splitlines():
                run(line)
        yield folder


def test_a_cache_holds_what_the_student_and_its_teachers_see(walk):
    cache = FeatureCache("runs/deep-cache")
    item = cache[3]
    shapes = {name: tuple(value.shape) for name, value in item.items() if isinstance(value, torch.Tensor)}
    assert len(cache) == COUNT and shapes["latents"] == (16, CELLS, CELLS)
    assert shapes["expert_latents"] == (4, CELLS, CELLS) and shapes["lune"] == (10, LUNE_WIDTH)
    assert shapes["prompt_embeds"] == (128, TEXT) and shapes["pooled_prompt_embeds"] == (POOLED,)
    assert not item["prompt_mask"].all()
    shared = FeatureCache("runs/shared-cache")
    assert "expert_latents" not in shared.shapes and shared.shapes["latents"][1:] == [4, CELLS, CELLS]


def test_a_student_remembers_its_data_and_its_encoders(walk):
    config = TinyFlux.from_pretrained("runs/deep").config
    assert config["sample_size"] == [CELLS, CELLS] and config["hidden_size"] == 32
    assert (config["in_channels"], config["joint_attention_dim"]) == (16, TEXT)
    assert config["text_mask"] and config["schedule"] == "noise"
    assert (config["latent_scale"], config["latent_shift"]) == (0.3611, 0.1159)
    places = {name: str(walk / folder) for name, folder in (("vae", "flux"), ("clip", "clip"), ("t5", "t5"))}
    assert config["encoders"] == places | {"t5_length": 128}
    assert json.loads(Path("runs/deep/log.jsonl").read_text().splitlines()[-1])["step"] == 3
    assert Image.open("runs/deep/samples/step-000002.png").size == (2 * SIDE, SIDE)
    # Upstream's config knows no size: its students are of 512 pixels.
    for name, side in (("castle", SIDE), ("guided", SIDE), ("published", 512)):
        assert Image.open(f"{name}.png").size == (side, side), name
    assert read_settings(Path("castle.png"))["upstream_schedule"] is False
    assert read_settings(Path("published.png"))["upstream_schedule"] is True


def test_upstreams_loader_finds_what_it_asks_for(walk):
    """Its config takes no other key, and its loading is strict; the numbers are those of the mathematics."""
    config = json.loads(Path("upstream/student/config.json").read_text())
    assert config.keys() == UPSTREAM["config"].keys()
    tensors = load_file("upstream/student/model.safetensors")
    in_first_blocks = re.compile(r"(double|single)_blocks\.([1-9]|1\d|2\d)\.")
    assert tensors.keys() == {name for name in UPSTREAM["tensors"] if not in_first_blocks.match(name)}
    theirs = TinyFluxConfig.from_dict(config)
    inputs = inputs_of(theirs, size=(CELLS, CELLS))
    expected = Reference(theirs, tensors)(**inputs)
    for source in ("upstream/student", "runs/deep"):
        found = TinyFlux.from_pretrained(source)(**inputs).sample
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_upstreams_latents_have_no_shift(walk):
    ours, theirs, drawn = (FeatureCache(f"runs/{name}-cache") for name in ("deep", "imported", "upstream"))
    difference = theirs.stacked("latents").float() - ours.stacked("latents").float()
    torch.testing.assert_close(difference, torch.full_like(difference, 0.1159 * 0.3611), atol=2e-3, rtol=0)
    assert theirs.manifest.latents.latent_shift == drawn.manifest.latents.latent_shift == 0
    assert theirs[0]["prompt_mask"].all() and drawn[0]["prompt_mask"].all()
    drift = drawn.stacked("latents").float() - theirs.stacked("latents").float()
    assert drift.abs().max() > 1e-2 and drift.mean().abs() < 0.2 * drift.std()  # drawn, about the same middle
    config = TinyFlux.from_pretrained("runs/continued").config
    assert not config["text_mask"] and config["latent_shift"] == 0 and config["schedule"] == "data"
    assert config["negative_prompt"] == "blurry, distorted, low quality"


def test_a_published_checkpoint_samples_as_upstream_samples_it(walk):
    """No mask, upstream's times, its negative prompt, latents decoded without the shift."""
    pipe = StudentPipeline.from_pretrained("upstream/student", vae="flux", clip="clip", t5="t5")
    pipe.set_progress_bar_config(disable=True)
    keys = {"num_inference_steps": 3, "guidance_scale": 5.0, "seed": 4, "height": SIDE, "width": SIDE}
    made = pipe("a castle", output_type="latent", **keys).images
    student, steps = pipe.student, torch.linspace(0, 1, 4, dtype=torch.float64)
    t5, clip = (pipe.encoders.text([text]) for text in ("a castle", "blurry, distorted, low quality"))
    times = 3 * steps / (1 + 2 * steps)
    x = initial_latents(pipe.plan(3), (1, 16, CELLS, CELLS), seeds=[4]).flatten(2).transpose(1, 2)
    with torch.no_grad():
        for now, following in pairwise(times):
            cond, uncond = (
                student(x, text.states, text.pooled, now.float(), size=(CELLS, CELLS)).sample
                for text in (t5, clip)
            )
            x = x + (uncond + 5.0 * (cond - uncond)) * (following - now).float()
        expected = x.transpose(1, 2).unflatten(2, (CELLS, CELLS))
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
        pixels = pipe.encoders.vae.decode(expected / 0.3611).sample
    image = pipe("a castle", output_type="pt", **keys).images
    torch.testing.assert_close(image, (pixels / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-3)


def test_live_experts_see_latents_of_their_own(walk):
    line = "moe-sampler tinyflux train deep.toml --max-train-steps 1 --output-dir runs/live"
    run(f"{line} --features live --experts-preset sd15 --experts-dtype bfloat16")
    assert "set distill_weight to 0" in run(f"{line} --experts-preset sd15 --distill-weight 0.5", 2)


def test_what_cannot_be_is_refused_with_what_to_do(walk):
    flags = "--vae flux --clip clip --t5 t5"
    assert "--preset sd15" in run(f"moe-sampler tinyflux cache new pictures {flags}", 2)
    guided = "moe-sampler tinyflux sample castle --student runs/deep --preset sd15 --sol-weight 0.5"
    assert "different latents" in run(guided, 2)
    assert "aren't what" in run("moe-sampler tinyflux train deep.toml --output-dir runs/no --vae sd15", 2)
    exported = "moe-sampler tinyflux export-model runs/shared -o elsewhere"
    assert "only students of the preset deep_v4" in run(exported, 2)
    assert not Path("new").exists() and not Path("elsewhere").exists()


def test_one_expert_teaches_alone(walk):
    run("moe-sampler tinyflux cache runs/lune pictures --experts sd15 --lune lune.safetensors --buckets 0.5")
    cache = FeatureCache("runs/lune")
    assert cache.has_lune and not cache.has_sol
    both = "moe-sampler tinyflux cache runs/both pictures --experts sd15 --lune lune.safetensors"
    assert "the experts have no sol" in run(f"{both} --teachers both", 2)
