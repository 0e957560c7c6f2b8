"""The nodes in ComfyUI itself, over its HTTP API, against this package's own sampling of the same weights."""

from __future__ import annotations

import copy
import inspect
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_server import REPOSITORY, WHERE, ComfyUI, missing
from diffusers import AutoencoderKLWan
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import (
    halves,
    save_checkpoint,
    save_unet,
    save_wan,
    sd15_text_encoder,
    sd15_unet,
    sd15_vae,
    sdxl_base,
    sdxl_refiner,
    wan,
)
from transformers import CLIPTokenizer

from moe_sampler import Boundary, Crossfade, Expert, FlowPath, HybridPipeline, VPPath, draw_plan, sample
from moe_sampler import plan as compile_plan
from moe_sampler.loading.parts import scheduler_from_config
from moe_sampler.loading.presets import TRAINING

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

EXAMPLES = REPOSITORY / "example_workflows"
PROMPT, NEGATIVE = "a castle with two towers, at dusk", "fog"


@pytest.fixture(scope="module", autouse=True)
def threads():
    """These models are no toys."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory):
    server = ComfyUI(tmp_path_factory.mktemp("comfyui") / "base")
    yield server
    server.stop()
    for file in server.folder.rglob("*.safetensors"):
        file.unlink()  # pytest keeps its folders


@pytest.fixture(scope="module")
def pipeline(comfyui):
    """Tiny SD1.5-shaped experts, and the same weights where ComfyUI looks for them."""
    unets = {name: sd15_unet(seed) for seed, name in enumerate(("sol", "lune", "sd15"), 3)}
    vae, text = sd15_vae(), sd15_text_encoder()
    save_checkpoint(comfyui.put("checkpoints", "sd15.safetensors"), unets["sd15"], vae, text)
    for name in ("sol", "lune"):  # as they are published: by diffusers' names
        save_file(halves(unets[name].state_dict()), comfyui.put("diffusion_models", f"{name}.safetensors"))
    part = {
        key: value
        for key, value in unets["sol"].state_dict().items()
        if key != "mid_block.resnets.0.conv1.weight"
    }
    save_file(halves(part), comfyui.put("diffusion_models", "part.safetensors"))
    tokenizer = CLIPTokenizer.from_pretrained(
        Path(os.environ[WHERE]) / "comfy" / "sd1_tokenizer", model_max_length=77
    )
    parts = {f"unet_{name}": unet for name, unet in unets.items()}
    parts |= {f"scheduler_{name}": scheduler_from_config(TRAINING[name]) for name in unets}
    made = HybridPipeline(vae, text, tokenizer, **parts)
    made.set_progress_bar_config(disable=True)
    return made


def texts(**more) -> dict:
    """The nodes that every SD1.5 workflow begins with."""
    return {
        "base": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
        "positive": {"class_type": "CLIPTextEncode", "inputs": {"text": PROMPT, "clip": ["base", 1]}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"text": NEGATIVE, "clip": ["base", 1]}},
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 2}},
        **more,
    }


EXPERT = {
    "guidance": 1.0,
    "solver": "dpmpp_2m",
    "steps": 0,
    "shift": 0.0,
    "eta": 0.0,
    "guidance_from": 1.0,
    "guidance_to": 0.0,
}


def expert(name: str, model: list, after: str | None = None, **settings) -> dict:
    inputs = {
        **EXPERT,
        "name": name,
        "model": model,
        "positive": ["positive", 0],
        "negative": ["negative", 0],
    }
    chain = {"experts": [after, 0]} if after else {}
    return {"class_type": "MoEExpert", "inputs": {**inputs, **settings, **chain}}


def router(**settings) -> dict:
    return {
        "class_type": "MoERouter",
        "inputs": {"kind": "handoff", "at": 0.7, "until": 0.5, "spans": "", **settings},
    }


def plan(experts: str, router: str | None = "router", steps: int = 6, start: float = 1.0) -> dict:
    own = {"router": [router, 0]} if router else {}
    return {
        "class_type": "MoEPlan",
        "inputs": {"experts": [experts, 0], "steps": steps, "start": start, **own},
    }


def sampler(seed: int, noise: str = "moe-sampler", latent: str = "empty") -> dict:
    inputs = {"plan": ["plan", 0], "latent_image": [latent, 0], "seed": seed, "noise": noise}
    return {"class_type": "MoESampler", "inputs": inputs}


def decoded(samples: str = "sampler") -> dict:
    return {
        "decoded": {"class_type": "VAEDecode", "inputs": {"samples": [samples, 0], "vae": ["base", 2]}},
        "saved": {"class_type": "SaveImage", "inputs": {"images": ["decoded", 0], "filename_prefix": "made"}},
    }


def load(expert: str, file: str = "") -> dict:
    inputs = {"expert": expert, "file": file or f"{expert}.safetensors"}
    return {"class_type": "LoadSolLune", "inputs": inputs}


def assert_same_pictures(files: list[Path], images: list[Image.Image]) -> None:
    """To a level of 255, which rounding decides."""
    assert len(files) == len(images)
    for file, image in zip(files, images, strict=True):
        ours, theirs = (np.asarray(each, dtype=np.int64) for each in (image, Image.open(file)))
        assert ours.std() > 5  # it is a picture
        assert abs(ours - theirs).max() <= 1


def test_sol_and_lune_are_the_pipelines(comfyui, pipeline):
    workflow = texts(
        sol_model=load("sol"),
        lune_model=load("lune"),
        sol=expert("sol", ["sol_model", 0], guidance=3.0, solver="ddpm", steps=3),
        lune=expert("lune", ["lune_model", 0], after="sol", guidance=2.0, solver="euler", steps=4),
        router=router(at=0.6),
        plan=plan("lune"),
        sampler=sampler(7),
        **decoded(),
    )
    files = comfyui.run(workflow)
    made = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_images_per_prompt=2,
        expert="hybrid",
        sol_guidance=3.0,
        lune_guidance=2.0,
        sol_steps=3,
        lune_steps=4,
        router=Boundary("sol", "lune", 0.6),
        seed=7,
    )
    assert_same_pictures(files["saved"], made.images)


def test_a_checkpoints_own_model_fades_into_lune(comfyui, pipeline):
    """An eps MODEL with its LoRA-free checkpoint, ComfyUI's noise, two experts at once."""
    workflow = texts(
        lune_model=load("lune"),
        sd15=expert("sd15", ["base", 0], guidance=4.0, solver="ddim"),
        lune=expert("lune", ["lune_model", 0], after="sd15", guidance=1.0, solver="dpmpp_2m"),
        router=router(kind="crossfade", at=0.9, until=0.4),
        plan=plan("lune", steps=8),
        sampler=sampler(5, noise="ComfyUI"),
        **decoded(),
    )
    files = comfyui.run(workflow)
    experts = pipeline.experts(
        guidance_scale={"sd15": 4.0, "lune": 1.0}, solver={"sd15": "ddim", "lune": "dpmpp_2m"}
    )
    compiled = compile_plan(
        [e for e in experts if e.name != "sol"], Crossfade("sd15", "lune", 0.9, 0.4), steps=8
    )
    assert any(len(step.calls) == 2 for step in compiled.steps)
    noise = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    made = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_images_per_prompt=2,
        plan=compiled,
        latents=noise * compiled.initial_scale,
    )
    assert_same_pictures(files["saved"], made.images)


def test_a_checkpoint_fades_into_itself_with_a_lora(comfyui, pipeline):
    """Two MODELs that are one network, whose weights ComfyUI patches in place and back, call by call."""
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
    draw = torch.Generator().manual_seed(40)
    up, down = (torch.randn(shape, generator=draw) / 4 for shape in ((320, 4), (4, 768)))
    name = f"lora_unet_{layer.replace('.', '_')}"
    lora = {
        f"{name}.lora_up.weight": up,
        f"{name}.lora_down.weight": down,
        f"{name}.alpha": torch.tensor(4.0),
    }
    save_file(lora, comfyui.put("loras", "style.safetensors"))
    styled = copy.deepcopy(pipeline.unet_sd15)
    styled.get_submodule(layer).weight.data += up @ down
    both = {"plain": pipeline.unet_sd15, "styled": styled}
    parts = {f"unet_{name}": unet for name, unet in both.items()}
    parts |= {f"scheduler_{name}": pipeline.scheduler_sd15 for name in both}
    own = HybridPipeline(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, **parts)
    own.set_progress_bar_config(disable=True)
    model = {"model": ["base", 0], "lora_name": "style.safetensors", "strength_model": 1.0}
    workflow = texts(
        patched={"class_type": "LoraLoaderModelOnly", "inputs": model},
        plain=expert("plain", ["base", 0], solver="ddim"),
        styled=expert("styled", ["patched", 0], after="plain", solver="ddim"),
        router=router(kind="crossfade", at=0.9, until=0.2),
        plan=plan("styled", steps=4),
        sampler=sampler(2),
        **decoded(),
    )
    files = comfyui.run(workflow)
    experts = own.experts(guidance_scale=1.0, solver="ddim")
    pictures = [
        own(PROMPT, num_images_per_prompt=2, plan=compiled, seed=2).images
        for compiled in (
            compile_plan(experts, Crossfade("plain", "styled", 0.9, 0.2), steps=4),
            compile_plan(experts[0], steps=4),
        )
    ]
    assert_same_pictures(files["saved"], pictures[0])
    with pytest.raises(AssertionError):
        assert_same_pictures(files["saved"], pictures[1])


def test_stock_samplers_work_on_the_guider(comfyui, pipeline):
    """ComfyUI's Euler on sigmas is DDIM on the same noise levels, whoever predicts there."""
    levels = [VPPath.linear().level(t) for t in (999, 850, 700, 450, 300, 150)]
    sigmas = [level.sigma / level.alpha for level in levels]
    workflow = texts(
        sol_model=load("sol"),
        lune_model=load("lune"),
        sol=expert("sol", ["sol_model", 0], guidance=3.0),
        lune=expert("lune", ["lune_model", 0], after="sol", guidance=2.0),
        router=router(at=0.6),
        guider={"class_type": "MoEGuider", "inputs": {"experts": ["lune", 0], "router": ["router", 0]}},
        sigmas=written([*sigmas, 0.0]),
        **custom_sampler("guider", seed=9),
        **decoded("sampler"),
    )
    files = comfyui.run(workflow)
    experts = pipeline.experts(guidance_scale={"sol": 3.0, "lune": 2.0}, solver="ddim")
    compiled = compile_plan(
        [e for e in experts if e.name != "sd15"],
        Boundary("sol", "lune", 0.6),
        noise_levels=[level.noise for level in levels],
    )
    assert compiled.experts == ("sol", "lune")
    noise = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(9))
    made = pipeline(PROMPT, negative_prompt=NEGATIVE, num_images_per_prompt=2, plan=compiled, latents=noise)
    assert_same_pictures(files["saved"], made.images)


def written(sigmas: list[float]) -> dict:
    return {"class_type": "WrittenSigmas", "inputs": {"sigmas": " ".join(f"{sigma:.9f}" for sigma in sigmas)}}


def custom_sampler(guider: str, seed: int, latent: str = "empty") -> dict:
    wired = {"noise": ["noise", 0], "guider": [guider, 0], "sampler": ["euler", 0], "sigmas": ["sigmas", 0]}
    return {
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": seed}},
        "euler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "sampler": {"class_type": "SamplerCustomAdvanced", "inputs": {**wired, "latent_image": [latent, 0]}},
    }


def latents(**nodes: str) -> dict:
    """Nodes that save other nodes' LATENT."""
    kind = "SaveLatent"
    return {
        name: {"class_type": kind, "inputs": {"samples": [node, 0], "filename_prefix": name}}
        for name, node in nodes.items()
    }


def saved(files: list[Path]) -> torch.Tensor:
    return load_file(files[0])["latent_tensor"]


def test_patches_and_regions_are_honoured(comfyui, pipeline):
    """A MODEL patched in its guidance and attention, a prompt for a region and a stretch of the run: as
    ComfyUI's own sampler has them."""
    path = VPPath.scaled_linear()
    levels = [path.level(t) for t in (999, 799, 599, 399, 199)]  # trailing spacing
    workflow = texts(
        empty={"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        rescaled={"class_type": "RescaleCFG", "inputs": {"model": ["base", 0], "multiplier": 0.7}},
        patched={
            "class_type": "PerturbedAttentionGuidance",
            "inputs": {"model": ["rescaled", 0], "scale": 2.0},
        },
        region={
            "class_type": "ConditioningSetArea",
            "inputs": {
                **{"conditioning": ["negative", 0], "width": 64, "height": 128, "x": 64, "y": 0},
                "strength": 1.0,
            },
        },
        early={
            "class_type": "ConditioningSetTimestepRange",
            "inputs": {"conditioning": ["region", 0], "start": 0.0, "end": 0.5},
        },
        both={
            "class_type": "ConditioningCombine",
            "inputs": {"conditioning_1": ["positive", 0], "conditioning_2": ["early", 0]},
        },
        sd15=expert("sd15", ["patched", 0], positive=["both", 0], guidance=4.0, solver="ddim"),
        plan=plan("sd15", router=None, steps=5),
        ours=sampler(3, noise="ComfyUI"),
        guider={
            "class_type": "CFGGuider",
            "inputs": {
                "model": ["patched", 0],
                "positive": ["both", 0],
                "negative": ["negative", 0],
                "cfg": 4.0,
            },
        },
        sigmas=written([*(level.sigma / level.alpha for level in levels), 0.0]),
        **custom_sampler("guider", seed=3),
        **latents(planned="ours", stock="sampler"),
    )
    files = comfyui.run(workflow)
    ours, stock = saved(files["planned"]), saved(files["stock"])
    assert stock.std() > 0.1
    torch.testing.assert_close(ours, stock, rtol=2e-3, atol=2e-3 * stock.std().item())


def test_only_what_is_masked_changes(comfyui, pipeline):
    Image.effect_noise((64, 64), 80).convert("RGB").save(comfyui.folder / "input" / "start.png")
    workflow = texts(
        sol_model=load("sol"),
        lune_model=load("lune"),
        picture={"class_type": "LoadImage", "inputs": {"image": "start.png"}},
        start={"class_type": "VAEEncode", "inputs": {"pixels": ["picture", 0], "vae": ["base", 2]}},
        left={"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 32, "height": 64}},
        none={"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 64, "height": 64}},
        mask={
            "class_type": "MaskComposite",
            "inputs": {"destination": ["none", 0], "source": ["left", 0], "x": 0, "y": 0, "operation": "add"},
        },
        masked={"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["start", 0], "mask": ["mask", 0]}},
        sol=expert("sol", ["sol_model", 0], solver="ddim"),
        lune=expert("lune", ["lune_model", 0], after="sol", solver="euler"),
        router=router(at=0.5),
        plan=plan("lune", start=0.8),
        sampler=sampler(1, latent="masked"),
        guider={"class_type": "MoEGuider", "inputs": {"experts": ["lune", 0], "router": ["router", 0]}},
        sigmas=written([4.0, 2.0, 0.8, 0.0]),
        noise={"class_type": "RandomNoise", "inputs": {"noise_seed": 1}},
        euler={"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        stock={
            "class_type": "SamplerCustomAdvanced",
            "inputs": {
                **{"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["euler", 0]},
                **{"sigmas": ["sigmas", 0], "latent_image": ["masked", 0]},
            },
        },
        **latents(before="start", planned="sampler", guided="stock"),
    )
    files = comfyui.run(workflow)
    before = saved(files["before"])
    for made in (saved(files["planned"]), saved(files["guided"])):
        torch.testing.assert_close(made[..., 4:], before[..., 4:], rtol=1e-4, atol=1e-4)
        assert (made[..., :4] - before[..., :4]).abs().mean() > 0.1


def test_the_plan_is_drawn_without_sampling(comfyui, pipeline):
    workflow = texts(
        sol_model=load("sol"),
        lune_model=load("lune"),
        sol=expert("sol", ["sol_model", 0], solver="ddpm"),
        lune=expert("lune", ["lune_model", 0], after="sol", solver="euler"),
        router=router(),
        plan=plan("lune", steps=20),
    )
    drawing = Image.open(comfyui.run(workflow)["plan"][0]).convert("RGB")
    experts = [Expert.sol(), Expert.lune()]
    expected = draw_plan(compile_plan(experts, Boundary("sol", "lune", 0.7), steps=20))
    assert np.array_equal(np.asarray(drawing), np.asarray(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": plan("lune", router=None)}, "2 experts need a MoE Router"),
        ({"router": router(at=0.99999)}, "noisiest timestep is noise level"),
        ({"lune": expert("sol", ["lune_model", 0], after="sol")}, "two experts are called sol"),
        ({"sol_model": load("sol", "part.safetensors")}, "missing: middle_block.0.in_layers.2.weight"),
    ],
)
def test_mistakes_are_said_before_any_work(comfyui, pipeline, change, message):
    nodes = {
        "sol_model": load("sol"),
        "lune_model": load("lune"),
        "sol": expert("sol", ["sol_model", 0]),
        "lune": expert("lune", ["lune_model", 0], after="sol"),
        "router": router(),
        "plan": plan("lune"),
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        comfyui.run(texts(**nodes))


def test_an_interrupted_run_leaves_everything_in_order(comfyui, pipeline):
    nodes = {
        "lune_model": load("lune"),
        "lune": expert("lune", ["lune_model", 0], solver="euler"),
        "plan": plan("lune", router=None, steps=2000),
        "sampler": sampler(0),
        **latents(made="sampler"),
    }
    with comfyui.listening() as messages:
        number, previews = comfyui.start(texts(**nodes)), 0
        for message in messages:
            previews += message["type"] == "preview"
            if message["type"] == "progress" and message["data"]["value"] >= 3:
                assert message["data"]["max"] == 2000
                break
        assert previews
        comfyui.post("/interrupt", {})
        assert comfyui.finished(number)["status"]["status_str"] == "error"
    nodes["plan"] = plan("lune", router=None, steps=2)
    assert saved(comfyui.run(texts(**nodes))["made"]).isfinite().all()


def test_the_example_workflows(comfyui, pipeline):
    """As a page would post them; that for Sol and Lune is run, with small files in place of the real ones."""
    files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in EXAMPLES.glob("*.json")}
    assert set(files) == {"Sol to Lune", "SDXL base to refiner", "Wan 2.2 text to video"}
    assert set(comfyui.get("/workflow_templates")["moe-sampler"]) == set(files)  # the page's list
    for name, workflow in files.items():
        posted = comfyui.as_posted(workflow)
        if name == "Sol to Lune":
            for node in posted.values():
                small = {
                    "CheckpointLoaderSimple": {"ckpt_name": "sd15.safetensors"},
                    "EmptyLatentImage": {"width": 64, "height": 64},
                    "LoadSolLune": {"file": f"{node['inputs'].get('expert')}.safetensors"},
                    "MoEPlan": {"steps": 4},
                }
                node["inputs"] |= small.get(node["class_type"], {})
            made = comfyui.run(posted)
            kinds = sorted(posted[node]["class_type"] for node, shown in made.items() if shown)
            assert kinds == ["MoEPlan", "SaveImage"]
            continue
        with pytest.raises(RuntimeError) as refused:
            comfyui.run(posted)
        wrong = json.loads(str(refused.value))["node_errors"].values()
        # Nothing is wrong but that the files aren't there.
        assert {error["type"] for node in wrong for error in node["errors"]} == {"value_not_in_list"}


def conditioning(
    comfyui, name: str, seed: int, tokens: int, width: int, pooled: int = 0
) -> tuple[dict, dict]:
    """(A node, its tensors): random text features."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {"cross": torch.randn((1, tokens, width), generator=draw)}
    if pooled:
        tensors["pooled_output"] = torch.randn((1, pooled), generator=draw)
    save_file(tensors, comfyui.folder / "input" / f"{name}.safetensors")
    return {"class_type": "ConditioningFromFile", "inputs": {"file": f"{name}.safetensors"}}, tensors


def diffusion_model(name: str) -> dict:
    return {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": f"{name}.safetensors", "weight_dtype": "default"},
    }


def test_sdxl_base_and_refiner(comfyui):
    """Two shapes of model, each with its own text features and sizes."""
    base, refiner = sdxl_base(11), sdxl_refiner(12)
    for name, model in (("sdxl_base", base), ("sdxl_refiner", refiner)):
        save_unet(comfyui.put("diffusion_models", f"{name}.safetensors"), model)
    nodes, tensors = {}, {}
    for seed, (name, width) in enumerate(
        {"base+": 2048, "base-": 2048, "refiner+": 1280, "refiner-": 1280}.items()
    ):
        nodes[name], tensors[name] = conditioning(comfyui, name, seed, 8, width, 1280)
    workflow = {
        **nodes,
        "base_model": diffusion_model("sdxl_base"),
        "refiner_model": diffusion_model("sdxl_refiner"),
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "base": expert(
            "base",
            ["base_model", 0],
            positive=["base+", 0],
            negative=["base-", 0],
            guidance=3.0,
            solver="ddim",
        ),
        "refiner": expert(
            *("refiner", ["refiner_model", 0], "base"),
            **{"positive": ["refiner+", 0], "negative": ["refiner-", 0], "guidance": 2.0},
        ),
        "router": router(at=0.45),
        "plan": plan("refiner"),
        "sampler": sampler(21),
        **latents(made="sampler"),
    }
    made = saved(comfyui.run(workflow)["made"])

    def model(unet, sizes):
        def call(x, timestep, **given):
            added = {"text_embeds": given["pooled"], "time_ids": torch.tensor([sizes] * x.shape[0])}
            return unet(x, timestep, given["cross"], added_cond_kwargs=added, return_dict=False)[0]

        return call

    # Height, width, crop, and of the base the target's size; of the refiner the aesthetic score, 6 and 2.5.
    def refine(x, timestep, **given):
        halves = [*given["score"].tolist()]
        ids = torch.tensor([[64, 64, 0, 0, score] for score in halves])
        added = {"text_embeds": given["pooled"], "time_ids": ids}
        return refiner(x, timestep, given["cross"], added_cond_kwargs=added, return_dict=False)[0]

    betas = VPPath.scaled_linear()
    experts = [
        Expert(
            "base", betas, "epsilon", model(base, [64, 64, 0, 0, 64, 64]), solver="ddim", guidance_scale=3.0
        ),
        Expert("refiner", betas, "epsilon", refine, solver="dpmpp_2m", guidance_scale=2.0),
    ]

    def given(sign: str) -> dict:
        scores = {"score": torch.tensor([6.0 if sign == "+" else 2.5])}
        named = {name: tensors[name + sign] for name in ("base", "refiner")}
        told = {name: {"cross": own["cross"], "pooled": own["pooled_output"]} for name, own in named.items()}
        return told | {"refiner": told["refiner"] | scores}

    compiled = compile_plan(experts, Boundary("base", "refiner", 0.45), steps=6)
    with torch.no_grad():
        expected = sample(
            compiled, experts, shape=(1, 4, 8, 8), seeds=[21], cond=given("+"), uncond=given("-")
        )
    assert_same_latents(made, expected / 0.13025)


def assert_same_latents(made: torch.Tensor, expected: torch.Tensor) -> None:
    """To a thousandth of what is in them: ComfyUI computes in float32, in another order, on another torch."""
    assert expected.std() > 0.1
    torch.testing.assert_close(made, expected, rtol=2e-3, atol=2e-3 * expected.std().item())


def test_wan_high_and_low_noise(comfyui):
    models = {"high": wan(31), "low": wan(32)}
    for name, own in models.items():
        save_wan(comfyui.put("diffusion_models", f"wan_{name}.safetensors"), own)
    positive, told = conditioning(comfyui, "wan+", 5, 12, 4096)
    negative, untold = conditioning(comfyui, "wan-", 6, 12, 4096)
    size = {"width": 32, "height": 32, "length": 9, "batch_size": 1}
    workflow = {
        "positive": positive,
        "negative": negative,
        "high_model": diffusion_model("wan_high"),
        "low_model": diffusion_model("wan_low"),
        "shifted": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["high_model", 0], "shift": 5.0}},
        "empty": {"class_type": "EmptyHunyuanLatentVideo", "inputs": size},
        "high": expert("high", ["shifted", 0], guidance=4.0, solver="euler"),
        "low": expert("low", ["low_model", 0], after="high", guidance=3.0, solver="euler", shift=5.0),
        "router": router(kind="Wan 2.2 text to video"),
        "plan": plan("low", steps=10),
        "sampler": sampler(13),
        **latents(made="sampler"),
    }
    made = saved(comfyui.run(workflow)["made"])

    def model(own):
        return lambda x, timestep, cross: own(x, timestep.expand(x.shape[0]), cross, return_dict=False)[0]

    experts = [
        Expert(
            name, FlowPath(), "flow_prediction", model(own), solver="euler", shift=5.0, guidance_scale=scale
        )
        for (name, own), scale in zip(models.items(), (4.0, 3.0), strict=True)
    ]
    compiled = compile_plan(experts, Boundary("high", "low", 0.875), steps=10)
    with torch.no_grad():
        expected = sample(compiled, experts, shape=(1, 16, 3, 4, 4), seeds=[13], cond=told, uncond=untold)
    vae = inspect.signature(AutoencoderKLWan.__init__).parameters
    mean, std = (
        torch.tensor(vae[f"latents_{which}"].default).view(1, -1, 1, 1, 1) for which in ("mean", "std")
    )
    assert_same_latents(made, expected * std + mean)
