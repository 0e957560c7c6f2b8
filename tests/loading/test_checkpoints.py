"""Experts from everywhere: folders, files, the hub, trainers' checkpoints; and what's wrong with them."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_sampler import ExpertSource, HybridPipeline
from moe_sampler.demo import experts_path
from moe_sampler.demo.export import SETTINGS
from moe_sampler.errors import CheckpointError
from moe_sampler.loading import weights as expert_weights
from moe_sampler.loading.expert_files import ExpertFiles
from moe_sampler.loading.presets import PRESETS
from moe_sampler.loading.state_dicts import read_tensors
from moe_sampler.loading.weights import ExpertWeights, empty_model, file_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

SOL = experts_path() / "unet_sol" / "diffusion_pytorch_model.safetensors"
LUNE = experts_path() / "unet_lune" / "diffusion_pytorch_model.safetensors"
QUICK = dict(seed=3, num_inference_steps=3, output_type="latent")


def quiet(pipe: HybridPipeline) -> HybridPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(base=None, **kwargs) -> HybridPipeline:
    return quiet(HybridPipeline.from_pretrained(experts_path() if base is None else base, **kwargs))


def same_weights(unet: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    own = unet.state_dict()
    return own.keys() == tensors.keys() and all(
        torch.equal(own[k], v.to(own[k].dtype)) for k, v in tensors.items()
    )


@pytest.fixture(scope="module")
def sol() -> dict[str, torch.Tensor]:
    return load_file(SOL)


@pytest.fixture
def base(tmp_path) -> Path:
    """A Stable Diffusion folder: shared parts, and the UNet's config without its weights."""
    folder = tmp_path / "base"
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(experts_path() / part, folder / part)
    (folder / "unet").mkdir()
    shutil.copy(experts_path() / "unet_sol" / "config.json", folder / "unet")
    index = json.loads((experts_path() / "model_index.json").read_text())
    kept = ("_diffusers_version", "vae", "text_encoder", "tokenizer")
    index = {"_class_name": "StableDiffusionPipeline", **{key: index[key] for key in kept}}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def original_names(tensors: dict[str, torch.Tensor], layers: int = 1) -> dict[str, torch.Tensor]:
    """diffusers' UNet keys by the names of the original Stable Diffusion code."""
    attended = {key.rsplit(".attentions", 1)[0] for key in tensors if ".attentions." in key}
    resnet = {
        **{"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"},
        **{"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"},
    }
    ends = {
        **{"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"},
        **{"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"},
    }

    def rename(key: str) -> str:
        for own, original in ends.items():
            if key.startswith(f"{own}."):
                return key.replace(own, original, 1)
        where, kind, number, rest = re.match(
            r"((?:down|up)_blocks\.\d+|mid_block)\.(\w+)\.(\d+)\.(.*)", key
        ).groups()
        block, j = int(where.split(".")[1]) if "." in where else 0, int(number)
        if kind == "resnets":
            rest = rest.replace(rest.split(".")[0], resnet[rest.split(".")[0]], 1)
        if where.startswith("down"):
            first = (layers + 1) * block + 1
            if kind == "downsamplers":
                return f"input_blocks.{first + layers}.0.op.{rest.removeprefix('conv.')}"
            return f"input_blocks.{first + j}.{int(kind == 'attentions')}.{rest}"
        if where.startswith("up"):
            first = (layers + 1) * block
            if kind == "upsamplers":
                return f"output_blocks.{first + layers}.{1 + int(where in attended)}.{rest}"
            return f"output_blocks.{first + j}.{int(kind == 'attentions')}.{rest}"
        return f"middle_block.{2 * j if kind == 'resnets' else 1}.{rest}"

    renamed = {rename(key): value for key, value in tensors.items()}
    assert len(renamed) == len(tensors)
    return renamed


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


def torch_file(wrap, name="sol.pt"):
    def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
        torch.save(wrap(tensors), folder / name)
        return folder / name

    return write


def original_file(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A whole Stable Diffusion checkpoint, with the other models in it."""
    whole = prefixed("model.diffusion_model.", original_names(tensors))
    others = {"first_stage_model.decoder.conv_in.weight": torch.ones(2), "alphas_cumprod": torch.ones(3)}
    save_file({**whole, **others}, folder / "sd.safetensors")
    return folder / "sd.safetensors"


def bare_original_file(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(original_names(tensors), folder / "unet.safetensors")
    return folder / "unet.safetensors"


def sharded_folder(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    unet = diffusers.UNet2DConditionModel.from_pretrained(SOL.parent, torch_dtype=torch.float16)
    unet.save_pretrained(folder / "sharded", max_shard_size="2MB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 1
    return folder / "sharded"


def plain_file(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    return shutil.copy(SOL, folder / "sol.safetensors")


def legacy_file(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, folder / "old.ckpt", _use_new_zipfile_serialization=False)
    return folder / "old.ckpt"


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(plain_file, id="safetensors"),
        pytest.param(lambda folder, tensors: SOL.parent, id="unet folder"),
        pytest.param(lambda folder, tensors: experts_path(), id="pipeline folder"),
        pytest.param(sharded_folder, id="sharded folder"),
        pytest.param(original_file, id="original checkpoint"),
        pytest.param(bare_original_file, id="original UNet"),
        pytest.param(
            torch_file(lambda t: {"cfg": {"lr": 1e-4}, "student": prefixed("unet.", t), "gstep": 7}),
            id="trainer's student",
        ),
        pytest.param(
            torch_file(lambda t: {"model": prefixed("module._orig_mod.", t), "opt": {}}), id="model"
        ),
        pytest.param(torch_file(lambda t: {"state_dict": prefixed("module.unet.", t)}), id="state_dict"),
        pytest.param(torch_file(lambda t: {"model": {"state_dict": t}}), id="nested"),
        pytest.param(torch_file(lambda t: t, "sol.bin"), id="bare"),
        pytest.param(legacy_file, id="before torch 1.6"),
    ],
)
def test_an_expert_from_anywhere(tmp_path, base, sol, write):
    """From every format the weights of the same expert, and with them the same image."""
    pipe = load(base, sol=write(tmp_path, sol), lune=LUNE)
    assert same_weights(pipe.unet_sol, sol) and pipe.expert_names == ("sol", "lune")
    assert pipe.scheduler_sol.config.prediction_type == "v_prediction"
    assert not pipe.unet_sol.training and pipe.unet_sol.dtype == torch.float32


def test_experts_from_files_make_the_folders_image(demo_pipeline, base):
    own = {key: value for key, value in SETTINGS.items() if key != "num_inference_steps"}
    mine = load(base, sol=SOL, lune=str(LUNE), **own)
    wanted = demo_pipeline("a castle", **QUICK)
    made = mine("a castle", **QUICK)
    assert made.plan == wanted.plan and torch.equal(made.images, wanted.images)


def test_dtypes(base):
    half = load(base, sol=SOL, lune=LUNE, dtype=torch.float16)
    assert {half.unet_sol.dtype, half.vae.dtype, half.text_encoder.dtype} == {torch.float16}
    mixed = load(base, sol=SOL, lune=LUNE, dtype={"unet_sol": torch.bfloat16, "default": torch.float32})
    assert mixed.unet_sol.dtype == torch.bfloat16 and mixed.unet_lune.dtype == torch.float32
    assert load(base, sol=SOL, lune=LUNE, torch_dtype=torch.float16).vae.dtype == torch.float16


def memory(field: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory statistics")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_loading_holds_one_copy(tmp_path, monkeypatch, dtype, suffix):
    """The most that was ever resident, mapped pages included, over the size of the weights."""
    config = {**json.loads((SOL.parent / "config.json").read_text()), "block_out_channels": [96, 192, 384]}
    unet = empty_model(config, "test", torch.float32)
    file = tmp_path / f"unet{suffix}"
    tensors = {key: torch.ones(value.shape) for key, value in unet.state_dict().items()}
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    del tensors
    monkeypatch.setattr(expert_weights, "MAPPED_BYTES", 2**22)
    expected = dict(unet.state_dict())
    files = ExpertFiles("sol", file, (file,), config, {})
    weights = ExpertWeights(torch.nn.Module.to(unet, dtype), lambda: file_tensors(files, expected))
    assert weights.nbytes > 60 * 2**20
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    weights.take("cpu")
    assert memory("VmHWM") - before < 1.3 * weights.nbytes
    assert all((parameter == 1).all() for parameter in unet.parameters())


def test_a_variant_is_preferred_where_there_is_one(base, tmp_path, sol):
    folder = tmp_path / "unet"
    shutil.copytree(SOL.parent, folder)
    negated = {key: -value for key, value in sol.items()}
    save_file(negated, folder / "diffusion_pytorch_model.fp16.safetensors")
    assert same_weights(load(base, sol=folder, lune=LUNE, variant="fp16").unet_sol, negated)
    assert same_weights(load(base, sol=folder, lune=LUNE).unet_sol, sol)
    with pytest.raises(CheckpointError, match='no file of variant "bf16"'):
        load(base, sol=folder, lune=LUNE, variant="bf16")


@pytest.fixture
def hub(tmp_path, base, in_hub_cache) -> Path:
    """The published repositories as far as they are needed, with tiny weights."""
    cache = tmp_path / "cache"
    files = {str(file.relative_to(base)): file for file in base.rglob("*") if file.is_file()}
    in_hub_cache(cache, PRESETS["sd15"].base, files)
    published = "AbstractPhil/tinyflux-experts"
    in_hub_cache(
        cache, published, {"sd15-flow-sol-unet.safetensors": SOL, "sd15-flow-lune-unet.safetensors": LUNE}
    )
    in_hub_cache(cache, "someone/unet", {f.name: f for f in LUNE.parent.iterdir()}, revision="v2")
    return cache


def test_a_preset_is_one_argument(hub, demo_pipeline):
    pipe = quiet(HybridPipeline.from_preset("sd15", cache_dir=hub, local_files_only=True))
    assert pipe.expert_names == ("sol", "lune") and pipe.config.handoff == 0.7
    stepping = {"solver": {"lune": SETTINGS["lune_solver"]}, "levels": {"lune": SETTINGS["lune_levels"]}}
    same = dict(QUICK, handoff=0.9, guidance_scale=2.5, **stepping)
    assert torch.equal(pipe("a castle", **same).images, demo_pipeline("a castle", **same).images)
    other = HybridPipeline.from_pretrained(preset="sd15", sol=LUNE, cache_dir=hub, local_files_only=True)
    assert same_weights(other.unet_sol, load_file(LUNE))


def test_hub_ids_revisions_and_what_is_not_there(hub, base):
    def local(**experts):
        return HybridPipeline.from_pretrained(
            PRESETS["sd15"].base, **experts, cache_dir=hub, local_files_only=True
        )

    folder = ExpertSource("someone/unet", revision="v2")
    assert same_weights(local(sol=SOL, lune=folder).unet_lune, load_file(LUNE))
    with pytest.raises(CheckpointError, match="someone/unet cannot be had from the hub"):
        local(sol=SOL, lune="someone/unet")
    with pytest.raises(CheckpointError, match=r"someone/unet:a\.safetensors cannot be had from the hub"):
        local(sol=SOL, lune="someone/unet:a.safetensors")
    with pytest.raises(CheckpointError, match="cannot be had from the hub"):
        HybridPipeline.from_pretrained("no/such-base", sol=SOL, cache_dir=hub, local_files_only=True)
    with pytest.raises(CheckpointError, match=r"sol: there is no folder/sol.safetensors; give a folder"):
        local(sol="folder/sol.safetensors")


SD15_SCHEDULER = {
    **{"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085},
    **{"beta_end": 0.012, "num_train_timesteps": 1000, "skip_prk_steps": True, "steps_offset": 1},
}


def test_what_an_expert_was_trained_on(base, tmp_path, demo_pipeline):
    """By its scheduler config, else by its name, else it must be said."""
    (base / "scheduler").mkdir()
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(SD15_SCHEDULER))
    shutil.copy(SOL, base / "unet")
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    pipe = load(
        base,
        lune=LUNE,
        sd15=base,
        experts={"mine": ExpertSource(SOL, flow), "other": ExpertSource(SOL, training="sol")},
    )
    lune, sd15, mine, other = pipe.experts()
    assert [e.name for e in pipe.experts()] == list(pipe.expert_names) == ["lune", "sd15", "mine", "other"]
    assert (lune.prediction, lune.shift, lune.solver) == ("flow_prediction", 2.0, "euler")
    assert (sd15.prediction, sd15.solver) == ("epsilon", "dpmpp_2m")
    assert sd15.path.betas[0] == pytest.approx(0.00085) and sd15.path.betas[-1] == pytest.approx(0.012)
    assert (mine.prediction, mine.shift) == ("flow_prediction", 3.0)
    assert other.prediction == "v_prediction" and other.path.betas[-1] == pytest.approx(0.02)
    with pytest.raises(CheckpointError, match=r"mine: nothing says what it was trained on.*sol, lune, sd15"):
        load(base, experts={"mine": SOL})
    with pytest.raises(ValueError, match='unknown kind of expert "moon"'):
        load(base, experts={"mine": ExpertSource(SOL, "moon")})


def test_a_folders_expert_may_be_replaced(tmp_path, sol):
    pipe = load(sol=LUNE)
    assert same_weights(pipe.unet_sol, load_file(LUNE)) and same_weights(pipe.unet_lune, load_file(LUNE))
    assert pipe.scheduler_sol.config.prediction_type == "v_prediction"
    given = diffusers.UNet2DConditionModel.from_pretrained(SOL.parent)
    assert load(unet_lune=given).unet_lune is given


class Payload:
    """Runs a command when it is unpickled, in the ordinary way."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (os.system, (f"touch {self.file}",))


@dataclasses.dataclass
class Config:
    rate: float = 0.1


def test_a_pickle_with_code_is_refused_and_not_run(base, tmp_path, sol):
    trap = tmp_path / "it-was-run"
    torch.save({"student": sol, "cfg": Payload(trap)}, tmp_path / "sol.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Payload(trap), protocol=2))
    (tmp_path / "hidden.safetensors").write_bytes(pickle.dumps(Payload(trap), protocol=2))
    torch.save({"student": sol, "cfg": Config()}, tmp_path / "object.pt")
    for name, message in (
        ("sol.pt", "could run code, so it isn't loaded: .*system"),
        ("raw.pt", "could run code"),
        ("hidden.safetensors", "it looks like a pickle"),
        ("object.pt", "could run code, so it isn't loaded: .*Config"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(base, sol=tmp_path / name, lune=LUNE)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["sol.safetensors", "sol.pt", "sol.ckpt"])
@pytest.mark.parametrize("kept", [0, 100, -1000])
def test_a_truncated_file_is_an_error(base, tmp_path, sol, name, kept):
    file = tmp_path / name
    if name.endswith(".safetensors"):
        save_file(sol, file)
    else:
        torch.save(sol, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=f"{name} (cannot be read as safetensors|is damaged)"):
        load(base, sol=file, lune=LUNE)


def without(key):
    return lambda t: {k: v for k, v in t.items() if k != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("conv_in.weight"), "missing: conv_in.weight$"),
        (
            lambda t: {k.replace("conv_in.bias", "conv_inn.bias"): v for k, v in t.items()},
            r"missing: conv_in.bias; unexpected: conv_inn.bias. Was conv_inn.bias meant to be conv_in.bias\?",
        ),
        (lambda t: prefixed("net.", t), r'missing: .* and \d+ more; .*The keys have the prefix "net."'),
        (lambda t: {**t, "a": torch.ones(1), "b": torch.ones(1)}, "unexpected: a, b$"),
        (lambda t: {**t, "conv_in.bias": torch.ones(7)}, r"misshapen: conv_in.bias \(7 instead of 64\)"),
        (lambda t: {**t, "conv_in.bias": torch.ones(32).char()}, r"not floats: conv_in.bias \(torch.int8\)"),
        (
            lambda t: {**t, "conv_in.weight": torch.ones(32, 9, 3, 3)},
            "latents have 9 channels, not 4: an inpainting",
        ),
        (
            lambda t: {k: torch.ones(*v.shape[:-1], 64) if "attn2.to_k" in k else v for k, v in t.items()},
            "trained on text features of 64 channels",
        ),
        (lambda t: load_file(experts_path() / "vae" / SOL.name), "unexpected: .*decoder"),
        (lambda t: {"decoder.conv_in.weight": torch.ones(1), "quant_conv.bias": torch.ones(1)}, "like a VAE"),
        (
            lambda t: load_file(experts_path() / "text_encoder" / "model.safetensors"),
            "This looks like a text encoder",
        ),
        (lambda t: {"mid_block.x.lora_A.weight": torch.ones(1)}, "like a LoRA: use load_lora_weights"),
        (lambda t: {**t, "add_embedding.linear_1.bias": torch.ones(1)}, "like an SDXL UNet"),
        (lambda t: {"double_blocks.0.a": torch.ones(1)}, "a transformer, not a UNet"),
        (
            lambda t: {**original_names(t), "input_blocks.1.7.weight": torch.ones(1)},
            "unexpected: model.diffusion_model.input_blocks.1.7.weight. These look like original-format keys",
        ),
        (
            lambda t: {**t, "unet.conv_in.bias": torch.ones(32)},
            "conv_in.bias twice, under different prefixes",
        ),
    ],
)
def test_the_wrong_tensors_are_named_and_what_was_probably_meant(base, tmp_path, sol, change, message):
    save_file({k: v.contiguous() for k, v in change(sol).items()}, tmp_path / "sol.safetensors")
    with pytest.raises(CheckpointError, match=message) as error:
        load(base, sol=tmp_path / "sol.safetensors", lune=LUNE)
    assert str(error.value).startswith(str(tmp_path / "sol.safetensors"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cfg": {"a": 1}, "gstep": 3}, "holds no state dict: .*found cfg, gstep"),
        ([1, 2], "holds no state dict: .*found list"),
        ({}, "found nothing"),
        (
            {"student": {"a": torch.ones(1)}, "model": {"b": torch.ones(1)}},
            r"several state dicts \(student, model",
        ),
    ],
)
def test_a_torch_file_without_a_state_dict(base, tmp_path, content, message):
    torch.save(content, tmp_path / "sol.pt")
    with pytest.raises(CheckpointError, match=message):
        load(base, sol=tmp_path / "sol.pt", lune=LUNE)


def change_config(file: Path, **settings) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("unet", {"in_channels": 9}, "sol has in_channels 9, but the VAE's latents have 4"),
        ("unet", {"out_channels": 8}, "sol has out_channels 8"),
        (
            "unet",
            {"cross_attention_dim": 768},
            "cross_attention_dim 768, but the text encoder's features have 128",
        ),
        ("vae", {"latent_channels": 16}, "VAE's latents have 16 channels"),
        ("text_encoder", {"hidden_size": 64}, "128, but the text encoder's features have 64 channels"),
        ("unet", {"_class_name": "UNet3DConditionModel"}, "is a UNet3DConditionModel"),
        ("unet", {"norm_num_groups": 7}, "its config makes no UNet2DConditionModel"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_any_weights_are_read(
    base, monkeypatch, part, settings, message
):
    change_config(base / part / "config.json", **settings)
    shutil.copy(SOL, base / "unet")
    monkeypatch.setattr(
        "moe_sampler.loading.weights.read_tensors", lambda *_: pytest.fail("weights were read")
    )
    with pytest.raises(ValueError, match=message):
        load(base, sol=base / "unet", lune=LUNE)


def test_parts_that_do_not_fit_are_refused_when_they_are_put_together(demo_pipeline):
    unet = diffusers.UNet2DConditionModel.from_config({**demo_pipeline.unet_sol.config, "in_channels": 8})
    with pytest.raises(ValueError, match="sol has in_channels 8"):
        HybridPipeline(**{**demo_pipeline.components, "unet_sol": unet}, experts=["sol", "lune"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(), CheckpointError, "has no experts of its own: .*preset"),
        (
            dict(pretrained_model_name_or_path=SOL),
            CheckpointError,
            "is a file: the base is a folder or hub id",
        ),
        (
            dict(pretrained_model_name_or_path=None, sol=SOL),
            ValueError,
            "the folder or hub id of the base, or",
        ),
        (dict(preset="sd99"), ValueError, 'unknown preset "sd99": use sd15'),
        (dict(sol=SOL, experts={"hybrid": SOL}), ValueError, "but not hybrid"),
        (dict(sol=SOL, experts={"My Expert": SOL}), ValueError, "lower-case word"),
        (dict(sol=SOL, offload="disk"), ValueError, 'unknown offload "disk"'),
        (dict(sol=SOL, stride=3), TypeError, "unknown arguments or parts of a pipeline: stride"),
        (dict(sol=SOL.with_suffix(".onnx")), CheckpointError, "there is no"),
        (dict(sol=SOL, dtype=torch.half, torch_dtype=torch.half), ValueError, "are the same"),
    ],
)
def test_wrong_arguments(base, arguments, error, message):
    with pytest.raises(error, match=message):
        HybridPipeline.from_pretrained(**{"pretrained_model_name_or_path": base, **arguments})


def test_unknown_suffixes(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"a.onnx is none of .safetensors, .pt"):
        read_tensors([tmp_path / "a.onnx"])


def test_three_experts_of_different_settings_survive_saving(base, tmp_path):
    pipe = load(
        base,
        lune=LUNE,
        sd15=SOL,
        experts={"mine": ExpertSource(SOL, {"_class_name": "DDIMScheduler", "clip_sample": False})},
        handoff=[0.9, 0.5],
        mine_guidance=1.0,
        sd15_guidance=3.0,
    )
    assert pipe.expert_names == ("lune", "sd15", "mine")
    wanted = pipe("a castle", **QUICK)
    assert wanted.plan.experts == ("lune", "sd15", "mine")
    pipe.save_pretrained(tmp_path / "saved")
    assert sorted(d.name for d in (tmp_path / "saved").iterdir() if d.is_dir()) == sorted(
        [
            *("vae", "text_encoder", "tokenizer"),
            *(f"{p}_{e}" for p in ("unet", "scheduler") for e in pipe.expert_names),
        ]
    )
    for offload in ("none", "expert"):
        again = load(tmp_path / "saved", offload=offload)
        made = again("a castle", **QUICK)
        assert made.plan == wanted.plan and torch.equal(made.images, wanted.images)
        again.save_pretrained(tmp_path / "twice")
        twice = load(tmp_path / "twice")("a castle", **QUICK)
        assert torch.equal(twice.images, wanted.images)
        shutil.rmtree(tmp_path / "twice")
