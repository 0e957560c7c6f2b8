"""The seam between the package and the models of its experts: one kind of model is one file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file

import moe_sampler
import moe_sampler.kernels
import moe_sampler.tinyflux
from moe_sampler import Expert, ExpertSource, HybridPipeline, architectures, sample
from moe_sampler.architectures import ModelShape, register, shape_of, watchable
from moe_sampler.architectures.unet import UNET
from moe_sampler.cli.models import Model
from moe_sampler.demo import experts_path
from moe_sampler.errors import CheckpointError
from moe_sampler.tinyflux.features.extraction import ExpertFeatures

QUICK = dict(seed=5, num_inference_steps=3, guidance_scale=1.0, output_type="latent")


class ToyTransformer(ModelMixin, ConfigMixin):
    """A model with nothing of a UNet's: tokens in and out, other names in its config and its forward."""

    @register_to_config
    def __init__(self, tokens_a_side: int = 8, channels: int = 4, context: int = 128, patch: int = 4) -> None:
        super().__init__()
        self.into = torch.nn.Linear(channels, 16)
        self.text = torch.nn.Linear(context, 16)
        self.out = torch.nn.Linear(16, channels)

    def forward(self, tokens: torch.Tensor, *, level: torch.Tensor, context: torch.Tensor) -> dict:
        pooled = self.text(context.mean(1, keepdim=True))
        return {"tokens": self.out(torch.tanh(self.into(tokens) + pooled + 1e-3 * level.reshape(-1, 1, 1)))}


class Toy:
    """All that the package has to be told of it."""

    class_name = "ToyTransformer"
    prefixes = ("toy.",)

    def shape(self, config):
        channels = config["channels"]
        return ModelShape(config["tokens_a_side"], channels, channels, config["context"], config["patch"])

    def build(self, config):
        return ToyTransformer.from_config(dict(config))

    def call(self, model, x, timestep, prompt_embeds, **conditioning):
        tokens = x.flatten(2).transpose(1, 2)
        level = timestep.to(x.dtype)
        made = model(tokens, level=level, context=prompt_embeds, **conditioning)["tokens"]
        return made.transpose(1, 2).reshape(x.shape)

    def own_names(self, tensors, config):
        return {name.replace("first.", "into."): tensor for name, tensor in tensors.items()}

    def guess(self, tensors, expected, unexpected):
        return "This looks like a UNet" if any("down_blocks" in name for name in unexpected) else ""


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(architectures, "_KNOWN", dict(architectures._KNOWN))
    register(Toy())
    torch.manual_seed(0)


@pytest.fixture
def toy():
    return ToyTransformer().eval()


@pytest.fixture
def folder(tmp_path, toy) -> Path:
    """The demo's pipeline with the toy in Lune's place."""
    folder = tmp_path / "model"
    shutil.copytree(experts_path(), folder)
    shutil.rmtree(folder / "unet_lune")
    toy.save_pretrained(folder / "unet_lune")
    index = json.loads((folder / "model_index.json").read_text())
    index["unet_lune"] = ["somewhere", Toy.class_name]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def load(folder, **arguments):
    pipe = HybridPipeline.from_pretrained(folder, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_unets_class_is_named_in_one_file():
    folders = [Path(package.__file__).parent for package in (moe_sampler, moe_sampler.kernels)]
    folders.append(Path(moe_sampler.tinyflux.__file__).parent)
    files = {file for folder in folders for file in folder.rglob("*.py")}
    named = [file for file in files if UNET.class_name in file.read_text(encoding="utf-8")]
    assert len(files) > 100 and named == [folders[0] / "architectures" / "unet.py"]


def test_another_architecture_is_sampled(folder, toy):
    pipe = load(folder)
    assert isinstance(pipe.unet_lune, ToyTransformer) and type(pipe.unet_sol).__name__ == UNET.class_name
    alone = pipe("a castle", expert="lune", height=32, width=64, **QUICK)

    def predict(x, timestep, prompt_embeds):
        tokens = x.flatten(2).transpose(1, 2)
        level = timestep.to(x.dtype)
        made = toy(tokens, level=level, context=prompt_embeds)["tokens"]
        return made.transpose(1, 2).reshape(x.shape)

    prompt_embeds = pipe.encode_texts("a castle")
    with torch.no_grad():
        expected = sample(
            alone.plan,
            Expert.lune(predict),
            shape=alone.images.shape,
            seeds=[QUICK["seed"]],
            cond={"prompt_embeds": prompt_embeds},
        )
    assert torch.equal(alone.images, expected)
    both = pipe("a castle", handoff=0.5, height=32, width=64, **QUICK)
    calls = {call.name for step in both.plan.steps for call in step.calls}
    assert calls == {"sol", "lune"} and both.images.isfinite().all()
    assert torch.equal(
        load(folder, offload="expert")("a castle", handoff=0.5, height=32, width=64, **QUICK).images,
        both.images,
    )


def test_what_its_config_says_counts(folder):
    file = folder / "unet_lune" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(
        json.dumps({**config, "patch": 3})
    )  # with four latents of a UNet, and four pixels a latent
    pipe = load(folder)
    with pytest.raises(ValueError, match="height must be a positive multiple of 48"):
        pipe("a castle", height=32, width=32, **QUICK)
    assert Model({"model": str(folder)}).sizes() == (64, 48)
    file.write_text(json.dumps({**config, "context": 7}))
    with pytest.raises(ValueError, match="lune has cross_attention_dim 7"):
        load(folder)


def test_it_may_come_from_a_file_of_other_names(folder, toy, tmp_path):
    tensors = {f"toy.{name.replace('into.', 'first.')}": t for name, t in toy.state_dict().items()}
    (tmp_path / "alone").mkdir()
    save_file(tensors, tmp_path / "alone" / "diffusion_pytorch_model.safetensors")
    shutil.copy(folder / "unet_lune" / "config.json", tmp_path / "alone")
    pipe = load(experts_path(), lune=ExpertSource(tmp_path / "alone", "lune"))
    assert all(torch.equal(t, toy.state_dict()[name]) for name, t in pipe.unet_lune.state_dict().items())
    unet = load_file(experts_path() / "unet_sol" / "diffusion_pytorch_model.safetensors")
    save_file(unet, tmp_path / "alone" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensors of its ToyTransformer; .*This looks like a UNet"):
        load(experts_path(), lune=ExpertSource(tmp_path / "alone", "lune"))


def test_a_saved_pipeline_comes_back(folder, tmp_path):
    pipe = load(folder)
    pipe.save_pretrained(tmp_path / "again")
    call = dict(prompt="a castle", height=32, width=32, **QUICK)
    assert torch.equal(load(tmp_path / "again")(**call).images, pipe(**call).images)


def test_compiled_models_are_what_they_wrap(folder):
    pipe = load(folder)
    call = dict(prompt="a castle", height=32, width=32, **QUICK)
    plain = pipe(**call).images
    pipe.unet_lune = torch.compile(pipe.unet_lune, backend="eager")
    assert torch.equal(pipe(**call).images, plain)
    with pytest.raises(TypeError, match="not wrapped"):
        watchable(pipe.unet_lune)


def test_what_it_cannot_do_is_said(folder, toy):
    with pytest.raises(ValueError, match="ToyTransformer is known already"):
        register(Toy())
    with pytest.raises(TypeError, match="lune: the layers of a ToyTransformer can't be watched"):
        ExpertFeatures(lune=toy)
    with pytest.raises(ValueError, match="LoRAs are loaded into a UNet2DConditionModel, and lune is none"):
        load(folder).load_lora_weights({}, expert="lune")
    with pytest.raises(
        TypeError, match="must be a UNet2DConditionModel or ToyTransformer itself, not wrapped"
    ):
        shape_of(torch.nn.Linear(1, 1))


def test_a_unets_shape_and_insides():
    from diffusers import UNet2DConditionModel

    config = json.loads((experts_path() / "unet_sol" / "config.json").read_text())
    assert UNET.shape(config) == ModelShape(16, 4, 4, 128, 4)
    assert UNET.shape({}) == ModelShape(None, 4, 4, 1280, 8)  # diffusers' own defaults
    assert UNET.shape({"sample_size": [8, 8]}).sample_size == 8
    assert UNET.shape({"sample_size": [8, 16]}).sample_size is None
    unet = UNet2DConditionModel.from_config(config).eval()
    assert watchable(unet) is UNET and shape_of(unet) == UNET.shape(config)
    x, timestep, text = torch.randn(1, 4, 16, 16), torch.tensor(3), torch.randn(1, 5, 128)
    with torch.no_grad():
        assert torch.equal(UNET.call(unet, x, timestep, text), unet(x, timestep, text).sample)
