"""Every option of the command against the pipeline it stands for, and back from the written image."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils import is_peft_available
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moe_sampler import Crossfade, HybridPipeline, PerStep, SamplingPlan, Spans
from moe_sampler.cli import app
from moe_sampler.cli.routers import parse_router
from moe_sampler.demo import experts_path
from moe_sampler.loading.presets import PRESETS
from moe_sampler.viewing.images import read_settings

SOL, LUNE = (experts_path() / f"unet_{n}" / "diffusion_pytorch_model.safetensors" for n in ("sol", "lune"))
NAMES = ("sol", "lune")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(command: str, *arguments, code: int = 0):
    """A command line, split at blanks; texts with blanks and paths follow."""
    result = CliRunner().invoke(app, [*command.split(), *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


FLAGS = [
    (
        "--solver sol=ddim --solver lune=dpmpp_2m --eta sol=0.5",
        dict(solver=dict(sol="ddim", lune="dpmpp_2m"), eta={"sol": 0.5}),
    ),
    ("--solver heun --shift lune=3", dict(solver="heun", shift={"lune": 3.0})),
    ("--guidance 2 --guidance lune=3", dict(sol_guidance=2.0, lune_guidance=3.0)),
    ("--guidance 2 --sol-guidance 1", dict(sol_guidance=1.0, lune_guidance=2.0)),
    (
        "--guidance-window lune=0.8:0.2 --guidance-rescale 0.5",
        dict(guidance_window={"lune": (0.8, 0.2)}, guidance_rescale=0.5),
    ),
    (
        "--guider sol=apg --guider lune=cfg_zero_star",
        dict(guider={"sol": "apg", "lune": "cfg_zero_star"}),
    ),
    ("--steps sol=2 --steps lune=3 --handoff 0.5", dict(sol_steps=2, lune_steps=3, handoff=0.5)),
    ("--steps 5 --expert lune", dict(num_inference_steps=5, expert="lune")),
    (
        "--levels cosine --levels lune=0.8,0.4,0.1",
        dict(levels={"sol": "cosine", "lune": [0.8, 0.4, 0.1]}),
    ),
]


@pytest.mark.parametrize(("flags", "call"), FLAGS, ids=[flags for flags, _ in FLAGS])
def test_flags_make_the_pipelines_image_and_plan(demo_pipeline, flags, call):
    call = {"num_inference_steps": None if "sol_steps" in call else 4} | call
    steps = "" if "--steps" in flags else "--steps 4"
    run(f"generate castle --seed 5 --zoom 1 -o a.png {steps} {flags}")
    made = demo_pipeline("castle", seed=5, **call)
    assert (pixels("a.png") == np.asarray(made.images[0])).all()
    assert SamplingPlan.from_json(run(f"plan --json {steps} {flags}").stdout) == made.plan
    run("generate --like a.png -o b.png")
    assert (pixels("a.png") == pixels("b.png")).all()
    assert read_settings(Path("a.png")) == read_settings(Path("b.png"))


@pytest.mark.parametrize(
    ("text", "router"),
    [
        ("crossfade 0.95 0.7", Crossfade("sol", "lune", 0.95, 0.7)),
        ("spans lune 0.8 sol 0.6 lune 0", Spans((("lune", 0.8), ("sol", 0.6), ("lune", 0.0)))),
        (
            "steps sol 2 sol+lune 1 lune 2",
            PerStep(["sol"] * 2 + [{"sol": 0.5, "lune": 0.5}] + ["lune"] * 2),
        ),
    ],
)
def test_routers_in_words(demo_pipeline, text, router):
    assert parse_router(text, NAMES) == router
    steps = () if text.startswith("steps") else ("--steps", 5)
    run("generate castle --zoom 1 -o a.png --router", text, *steps)
    assert "handoff" not in read_settings(Path("a.png"))
    made = demo_pipeline("castle", seed=0, router=router, num_inference_steps=5 if steps else None)
    assert (pixels("a.png") == np.asarray(made.images[0])).all()
    run("generate --like a.png -o b.png")
    assert (pixels("a.png") == pixels("b.png")).all()
    run("generate --like a.png --handoff 0.8 --steps 3 -o c.png")
    assert read_settings(Path("c.png"))["handoff"] == 0.8 and "router" not in read_settings(Path("c.png"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crossfade 0.5", "use one of"),
        ("crossfade 0.5 0.7", "below"),
        ("crossfade a b", "give a number"),
        ("spans sol 0.9 lune", "use one of"),
        ("spans sol 0.9 moon 0", "'moon'"),
        ("steps sol 2 moon 1", "'moon'"),
        ("steps sol two", "whole number"),
        ("steps sol 0", "at least one step"),
        ("", "use one of"),
    ],
)
def test_routers_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        parse_router(text, NAMES)


def test_negative_prompts_by_expert(demo_pipeline):
    run("generate castle --steps 3 --zoom 1 -o a.png --negative", "lune=night", "--negative", "a = b, tree")
    negative = {"sol": "a = b, tree", "lune": "night"}
    assert read_settings(Path("a.png"))["negative_prompt"] == negative
    made = demo_pipeline("castle", seed=0, num_inference_steps=3, negative_prompt=negative)
    assert (pixels("a.png") == np.asarray(made.images[0])).all()


def test_options_override_what_an_image_says():
    run("generate castle --steps 3 --guidance 2 --solver sol=ddim --negative night -o a.png")
    run("generate --like a.png --guidance lune=3 --solver lune=heun --negative sol=tree -o b.png")
    first, second = (read_settings(Path(name)) for name in ("a.png", "b.png"))
    changed = {"guidance_scale": {"sol": 2.0, "lune": 3.0}, "solver": {"sol": "ddim", "lune": "heun"}}
    # The model's own levels go with its own solver.
    assert first["solver"] == {"sol": "ddim", "lune": "dpmpp_2m"} and first.pop("levels") == {"lune": "beta"}
    assert second == first | changed | {"negative_prompt": {"sol": "tree", "lune": "night"}}
    run("generate --like a.png --steps lune=2 --steps sol=1 -o c.png")
    third = read_settings(Path("c.png"))
    assert third["num_inference_steps"] == {"sol": 1, "lune": 2}


def test_from_an_image(demo_pipeline):
    run("generate", "a castle", "--steps", 4, "-o", "start.png")
    shown = run("generate castle --image start.png --strength 0.5 --steps 8 --zoom 1 --trace -o a.png").stdout
    assert shown.split() == ["a.png", "a.trace.png"]
    image = Image.open("start.png").convert("RGB")
    # The written image is enlarged to 512 pixels; the model's own size is what it was made in.
    made = demo_pipeline(
        "castle", image=image, strength=0.5, height=64, width=64, num_inference_steps=8, seed=0
    )
    assert (pixels("a.png") == np.asarray(made.images[0])).all()
    assert SamplingPlan.from_json(run("plan --steps 8 --strength 0.5 --json").stdout) == made.plan
    run("generate --like a.png --trust -o b.png")
    assert (pixels("a.png") == pixels("b.png")).all()
    run("generate", "a portrait", "--steps", 4, "-o", "start.png")
    assert "no longer the image" in run("generate --like a.png --trust -o c.png", code=2).stderr


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        ("", (96, 48)),
        ("--width 32", (32, 16)),
        ("--height 96", (192, 96)),
        ("--width 64 --height 64", (64, 64)),
    ],
)
def test_a_photo_of_any_size_is_fitted_to_the_model(flags, size):
    Image.new("RGB", (1001, 499), "blue").save("photo.jpg")
    run(f"generate castle --image photo.jpg --steps 2 --strength 0.5 --zoom 1 -o a.png {flags}")
    assert Image.open("a.png").size == size


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16", "F"])
def test_pictures_of_every_mode_are_started_from(mode, demo_pipeline):
    Image.new(mode, (64, 64)).save("start.tiff")
    run("generate castle --image start.tiff --steps 2 --strength 0.5 --zoom 1 -o a.png")
    image = Image.open("start.tiff")
    made = demo_pipeline("castle", image=image, strength=0.5, num_inference_steps=2, seed=0).images[0]
    assert (pixels("a.png") == np.asarray(made)).all()


def test_pictures_that_cannot_be_started_from(monkeypatch):
    Image.new("1", (20000, 20000)).save("bomb.png")
    Image.new("RGB", (64, 64)).save("cut.png")
    Path("cut.png").write_bytes(Path("cut.png").read_bytes()[:-30])
    Image.fromarray(np.full((64, 64), 200, np.float32)).save("depth.tiff")
    Path("note.png").write_text("no picture")
    os.mkfifo("pipe.png")
    for name, message in (
        ("bomb.png", "bomb.png has 20000 × 20000 pixels, and the limit is 89,478,485"),
        ("cut.png", "cut.png cannot be read as an image"),
        ("depth.tiff", "depth.tiff holds floats from 200 to 200"),
        ("note.png", "note.png cannot be read as an image: no picture of a format that is read"),
        ("pipe.png", "pipe.png cannot be read as an image: it is not a file"),
        ("absent.png", "absent.png cannot be read as an image"),
    ):
        shown = run(f"generate castle --image {name} -o a.png", code=2).stderr
        assert shown.startswith("error: ") and message in shown and len(shown.splitlines()) == 1
    Image.new("RGB", (64, 64)).save("small.png")
    monkeypatch.setenv("MOE_SAMPLER_MAX_PIXELS", "4095")
    assert "limit is 4,095" in run("generate castle --image small.png -o a.png", code=2).stderr
    monkeypatch.setenv("MOE_SAMPLER_MAX_PIXELS", "4096")
    run("generate castle --image small.png --steps 2 --strength 0.5 -o a.png")


def test_a_prompt_that_is_no_text_is_one_line():
    for options in (["a castle \udcff"], ["a castle", "--negative", "night \udcff"]):
        shown = run("generate --steps 2 -o a.png", *options, code=2).stderr
        assert "half a surrogate pair" in shown and "\\udcff" in shown and len(shown.splitlines()) == 1


def test_latents_instead_of_images(demo_pipeline):
    assert run("generate castle --steps 3 -o a.safetensors").stdout.split() == ["a.safetensors"]
    made = demo_pipeline("castle", seed=0, num_inference_steps=3, output_type="latent").images
    assert torch.equal(load_file("a.safetensors")["latents"], made)
    with safe_open("a.safetensors", "pt") as file:
        assert json.loads(file.metadata()["moe-sampler"])["prompt"] == "castle"


def test_experts_from_files_and_by_any_name(demo_pipeline):
    shutil.copy(SOL, "mine.safetensors")
    flags = "--model demo --lune mine.safetensors --expert-training lune=sol --steps 3"
    run(f"generate castle --zoom 1 -o a.png {flags} --solver ddim --expert lune --guidance 2.5")
    sol = demo_pipeline(
        "castle", expert="sol", solver="ddim", num_inference_steps=3, seed=0, guidance_scale=2.5
    )
    assert (pixels("a.png") == np.asarray(sol.images[0])).all()
    os.mkdir("elsewhere")
    os.chdir("elsewhere")  # what was written means the same from another folder
    run("generate --like ../a.png --trust -o b.png")
    assert (pixels("../a.png") == pixels("b.png")).all()
    third = f"--model demo --expert-source third={LUNE} --expert-training third=lune --guidance third=1"
    run(f"generate castle --zoom 1 --steps 6 --handoff 0.9 --handoff 0.5 -o c.png {third}")
    pipe = HybridPipeline.from_pretrained(experts_path(), experts={"third": _as_lune(LUNE)})
    own = {"sol": 2.5, "lune": 2.5, "third": 1.0}
    made = pipe("castle", num_inference_steps=6, handoff=[0.9, 0.5], guidance_scale=own, seed=0)
    assert made.plan.experts == ("sol", "lune", "third")
    assert (pixels("c.png") == np.asarray(made.images[0])).all()


def _as_lune(path):
    from moe_sampler.loading.presets import ExpertSource

    return ExpertSource(path, "lune")


def test_a_preset_and_a_hub_id(tmp_path, monkeypatch, demo_pipeline):
    """From a cache as the hub client leaves it, with tiny weights in place of the published ones."""

    def cached(repo: str, files: dict[str, Path]) -> None:
        root = tmp_path / "cache" / f"models--{repo.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("0" * 40)
        for name, source in files.items():
            target = root / "snapshots" / ("0" * 40) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)

    base = {str(f.relative_to(experts_path())): f for f in experts_path().rglob("*") if f.is_file()}
    index = tmp_path / "model_index.json"
    shared = json.loads(base["model_index.json"].read_text())
    keys = ("_class_name", "vae", "text_encoder", "tokenizer")
    index.write_text(json.dumps({key: shared[key] for key in keys}))
    cached(PRESETS["sd15"].base, base | {"model_index.json": index})
    cached("someone/hybrid", base)
    files = {"sd15-flow-sol-unet.safetensors": SOL, "sd15-flow-lune-unet.safetensors": LUNE}
    cached("AbstractPhil/tinyflux-experts", files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    flags = "--preset sd15 --steps 4 --handoff 0.9 --guidance 2.5 --solver lune=dpmpp_2m --levels lune=beta"
    run(f"generate castle --zoom 1 --height 64 --local-files-only -o a.png {flags}")
    made = demo_pipeline("castle", num_inference_steps=4, handoff=0.9, guidance_scale=2.5, seed=0)
    assert (pixels("a.png") == np.asarray(made.images[0])).all()
    assert read_settings(Path("a.png"))["preset"] == "sd15"
    assert SamplingPlan.from_json(run(f"plan --json {flags}").stdout) == made.plan
    flags = "--model someone/hybrid --local-files-only --steps 4"
    run(f"generate castle --zoom 1 -o b.png {flags}")
    assert (pixels("b.png") == np.asarray(made.images[0])).all()
    assert SamplingPlan.from_json(run(f"plan --json {flags}").stdout) == made.plan
    run("generate --like b.png --trust --local-files-only -o c.png")
    assert (pixels("c.png") == pixels("b.png")).all()


def test_offload_batches_and_dtype(demo_pipeline):
    common = "--steps 4 --seed 2 --zoom 1 --trace --animate"
    prompts = ("generate", "a castle", "a portrait", "a city street", *common.split())
    run(*prompts, "-o", "x.png")
    shown = run(*prompts, "-o", "y.png", "--offload", "expert", "--batch-size", 2).stdout.split()
    assert shown == [f"y-{i}.{end}" for i in (1, 2, 3) for end in ("png", "trace.png", "webp")]
    for i in (1, 2, 3):
        for end in ("png", "trace.png"):
            same = pixels(f"x-{i}.{end}").astype(int), pixels(f"y-{i}.{end}").astype(int)
            assert np.abs(same[0] - same[1]).max() <= 1  # a model may round differently in another batch
    with Image.open("y-2.webp") as animation:
        assert animation.n_frames == 4
    run("generate castle --steps 2 --dtype bf16 -o h.png")
    assert read_settings(Path("h.png"))["dtype"] == "bfloat16"


@pytest.mark.skipif(not is_peft_available(), reason="peft is not installed")
def test_loras(demo_pipeline):
    generator, tensors = torch.Generator().manual_seed(0), {}
    layer = next(n for n, m in demo_pipeline.unet_sol.named_modules() if n.endswith("attn1.to_q"))
    shape = demo_pipeline.unet_sol.get_submodule(layer).weight.shape
    for part, size in (("A", (2, shape[1])), ("B", (shape[0], 2))):
        tensors[f"unet.{layer}.lora_{part}.weight"] = torch.randn(size, generator=generator)
    save_file(tensors, "style.safetensors")
    run("generate castle --steps 3 --handoff 0.3 -o plain.png")
    run("generate castle --steps 3 --handoff 0.3 --lora sol=style.safetensors@0.5 -o half.png")
    run("generate castle --steps 3 --handoff 0.3 --lora sol=style.safetensors@0 -o none.png")
    assert (pixels("none.png") == pixels("plain.png")).all()
    pipe = HybridPipeline.from_pretrained(experts_path())
    a, b = tensors.values()
    pipe.unet_sol.get_submodule(layer).weight.data += 0.5 * b @ a
    made = np.asarray(pipe("castle", num_inference_steps=3, handoff=0.3, seed=0).images[0])
    run("generate --like half.png --trust --zoom 1 -o again.png")
    assert np.abs(pixels("again.png").astype(int) - made).max() <= 1
    assert np.abs(pixels("half.png").astype(int) - pixels("plain.png")).max() > 1
    save_file(tensors | {"text_encoder.x.lora_A.weight": torch.zeros(2, 2)}, "both.safetensors")
    message = run("generate castle --lora sol=both.safetensors", code=2).stderr
    assert "--lora-text-encoder" in message


@pytest.mark.parametrize(
    "config, message",
    [
        ({"_class_name": "SD3Transformer2DModel"}, "is a SD3Transformer2DModel, but experts are"),
        ({"block_out_channels": [64, "96", 160]}, "its config makes no UNet2DConditionModel"),
        ({"up_block_types": ["UpBlock2D"]}, "same number of"),
    ],
)
def test_a_model_that_reuse_has_no_price_of_is_named(config, message):
    shutil.copytree(experts_path(), "experts")
    place = Path("experts/unet_lune/config.json")
    place.write_text(json.dumps(json.loads(place.read_text()) | config))
    said = run("plan --model experts --steps 4 --reuse 2", code=2).stderr
    assert said.startswith("error: lune: ") and message in said


def test_plan_draws_and_colours_a_terminal():
    shown = run("plan --steps 6 --image plan.png").stdout
    assert shown.splitlines()[0].startswith("6 steps") and shown.splitlines()[-1] == "plan.png"
    assert Image.open("plan.png").width > 800
    assert json.loads(run("plan --steps 6 --json --image plan.png").stdout)["steps"]
    for columns, boxed in ((140, True), (60, False)):
        master, slave = pty.openpty()
        environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm-256color"}
        command = [sys.executable, "-m", "moe_sampler.cli", "plan", "--steps", "3"]
        subprocess.run(command, stdout=slave, env=environment, check=True)
        text = os.read(master, 1 << 16).decode()
        assert ("┃" in text and "\x1b[" in text) == boxed and "dpm" in text
        os.close(master), os.close(slave)


def test_reuse_is_a_number_auto_or_a_list():
    assert "give auto" in run("plan --steps 4 --reuse sometimes", code=2).stderr
    reused = run("plan --steps 10 --reuse lune=auto").stdout
    assert reused.count("reuse") == 5 and "at the cost of" in reused
    assert "reuse" not in run("plan --steps 9 --reuse auto").stdout
