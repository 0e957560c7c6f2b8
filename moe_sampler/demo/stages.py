"""The stages of the demo's training: what each one needs, trains and leaves behind."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderTiny, ConfigMixin, ModelMixin
from torch import nn
from transformers import CLIPTokenizer

from ..expert_training import ExpertTask, LatentImages, TextStates
from ..pipelines.speed import lay_out
from ..training.interrupts import Interrupts
from ..training.trainer import Trainer
from ..training.training_settings import TrainingSettings
from .autoencoder import decoder_loss, encode_all, joint_loss, new_autoencoder
from .data import SceneSet, write_array
from .experts import OBJECTIVES, encode_texts, expert_task, latent_images, new_unet
from .export import export_experts
from .scene_task import SceneTask, run_stage, stage_settings
from .text import WIDTH, TextTrainer, new_text_encoder, text_loss
from .tokenizer import write_tokenizer
from .weights import fill, read_average, trained_steps

M = TypeVar("M", bound=nn.Module)

WAVES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("scenes",),),
    (("autoencoder",), ("text",)),
    (("latents",),),
    (("trunk",),),
    (("sol", "decoder"), ("lune",)),
    (("export",),),
)
"""Waves of chains: a wave needs the ones before it, its chains run side by side, a chain's stages in turn.
Two processes with half of the cores each are faster than one with all of them."""
SHARES = {
    **{"scenes": 0.07, "autoencoder": 0.11, "text": 0.11, "latents": 0.06, "trunk": 0.15},
    **{"sol": 0.36, "decoder": 0.22, "lune": 0.58, "export": 0.03},
}
"""Of the time of a run that is told its minutes."""
STAGES = tuple(stage for wave in WAVES for chain in wave for stage in chain)
EXPERTS = ("trunk", "sol", "lune")
TRAINED = ("autoencoder", "text", "trunk", "decoder", "sol", "lune")


_ON_CUDA = {
    **{"mixed_precision": "bf16", "cuda_graph": True},
    **{"checkpointing_steps": 2000, "logging_steps": 50},
}


@dataclass(frozen=True)
class Recipe:
    """Sizes of a training run, and every stage's training settings."""

    scenes: int
    width: int
    decoder_width: int
    channels: tuple[int, int, int]
    stages: Mapping[str, Mapping[str, Any]]

    def steps(self, name: str) -> int:
        return self.stages[name]["max_train_steps"]


_LEARNING: Mapping[str, Mapping[str, Any]] = {
    "autoencoder": {"learning_rate": 2e-3, "warmup": 50},
    "text": {"learning_rate": 1e-3, "ema": 0.99},
    "decoder": {"learning_rate": 1.5e-3},
    "trunk": {"learning_rate": 2e-3, "decay_share": 0.2, "floor": 0.5},
}
"""What is the same in a stage of any length."""


def _stages(optimizer: str, rate: float, **lengths: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """By stage, of how many steps and of how many samples each. rate: Sol's and Lune's learning rate."""
    return {
        name: stage_settings(steps, batch=batch, **{"learning_rate": rate, **_LEARNING.get(name, {})})
        | {"optimizer": optimizer}
        for name, (steps, batch) in lengths.items()
    }


SHIPPED = Recipe(
    scenes=48_000,
    width=32,
    decoder_width=48,
    channels=(64, 96, 160),
    stages=_stages(
        "adamw",
        1.5e-3,
        **{"autoencoder": (5100, 256), "text": (1250, 512), "decoder": (4500, 128)},
        **{"trunk": (2050, 512), "sol": (3500, 512), "lune": (5900, 512)},
    ),
)
"""What made the experts that ship, on a GPU: in round numbers the steps that docs/DEMO.md names."""
QUICK = replace(
    SHIPPED,
    stages=_stages(
        "muon",
        2e-3,
        **{"autoencoder": (2000, 24), "text": (700, 64), "decoder": (2600, 8)},
        **{"trunk": (900, 24), "sol": (2100, 24), "lune": (3800, 24)},
    ),
)
"""As much of it as two cores make in an hour and a half, with Muon: docs/DEMO.md has what comes of it."""


def default_recipe(large: bool) -> Recipe:
    """Of a run that began on a GPU (large), or on a CPU."""
    return SHIPPED if large else QUICK


def _channels_last(model: M) -> M:
    """The layout that convolutions are faster in."""
    lay_out([model], channels_last=True)
    return model


@dataclass(frozen=True)
class Workshop:
    """A work folder: scenes, latents and checkpoints of one run.

    device: "cpu" or "cuda", where the stages run now. timed: whether they take the time they are given, and
        not the recipe's steps.
    """

    folder: Path
    seed: int = 0
    recipe: Recipe = SHIPPED
    device: str = "cpu"
    timed: bool = False
    compiled: bool = False

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def latents_file(self) -> Path:
        return self.folder / "latents.npy"

    @property
    def states_file(self) -> Path:
        return self.folder / "text_states.npy"

    def scenes(self) -> SceneSet:
        self.tokenizer()
        return SceneSet(self.folder / "scenes", self.recipe.scenes, tokenizer=self.folder / "tokenizer")

    def stage_seed(self, name: str) -> int:
        return self.seed + ("autoencoder", "text", "trunk", "sol", "lune", "decoder").index(name)

    def _build(self, name: str, make: Callable[[], M]) -> M:
        """Initial weights from the stage's seed, leaving the global generator alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.stage_seed(name))
            return make()

    def tokenizer(self) -> CLIPTokenizer:
        folder = self.folder / "tokenizer"
        if not (folder / "tokenizer_config.json").exists():
            write_tokenizer(folder)
        return CLIPTokenizer.from_pretrained(folder)

    def autoencoder(self, trained: bool = True) -> AutoencoderTiny:
        """The joint stage's autoencoder; with `trained`, its averaged weights and the latents' scale."""
        recipe = self.recipe
        model = self._build("autoencoder", lambda: new_autoencoder(recipe.width, recipe.decoder_width))
        if trained:
            self._fill(model, "autoencoder")
            if self.latents_file.exists():
                ConfigMixin.register_to_config(model, scaling_factor=self.scaling_factor())
        return _channels_last(model)

    def scaling_factor(self) -> float:
        return float(np.load(self.folder / "scale.npy"))

    def text_trainer(self, trained: bool = True) -> TextTrainer:
        tokenizer = self.tokenizer()
        model = self._build("text", lambda: TextTrainer(new_text_encoder(tokenizer)))
        return self._fill(model, "text") if trained else model

    def unet(self, name: str, trained: bool = True) -> ModelMixin:
        """trunk, sol or lune; untrained Sol and Lune start from the trunk's averaged weights."""
        model = self._build(name, lambda: new_unet(self.recipe.channels))
        if trained or name != "trunk":
            self._fill(model, name if trained else "trunk")
        return _channels_last(model)

    def _fill(self, model: M, name: str) -> M:
        return fill(model, self.checkpoints / f"{name}.safetensors")

    def finished(self, name: str) -> bool:
        """Whether a stage has nothing left to do."""
        if name == "scenes":
            return self.scenes().complete()
        if name == "latents":
            return self.latents_file.exists()
        if name == "export":
            return False
        needed = 1 if self.timed else self.recipe.steps(name)
        return trained_steps(self.checkpoints / f"{name}.safetensors") >= needed

    def settings(self, name: str) -> dict[str, Any]:
        """Training settings of one of TRAINED."""
        found = dict(self.recipe.stages[name])
        if self.device == "cuda":
            found |= _ON_CUDA
        if self.compiled and name in EXPERTS:
            found["torch_compile"] = True
        return found

    def train(self, name: str, deadline: float | None = None) -> None:
        """Run one of TRAINED to its end, continuing from its last checkpoint.

        deadline: of a timed run, as `time.time` counts.
        """
        run_stage(self.task(name), self.checkpoints, self.stage_seed(name), self.settings(name), deadline)

    def task(self, name: str) -> SceneTask | ExpertTask:
        """What a stage trains."""
        if name in EXPERTS:
            states = np.load(self.states_file, mmap_mode="c")  # what is read of it all processes share
            unet = self.unet(name, trained=False)
            data = latent_images(name, self.scenes(), np.load(self.latents_file))
            return expert_task(name, unet, data, states, self.text())
        scenes = self.scenes()
        if name == "autoencoder":
            model = self.autoencoder(trained=False)
            loss = joint_loss(model, scenes)
        elif name == "text":
            model = self.text_trainer(trained=False)
            loss = text_loss(model, scenes)
        else:
            model = self.autoencoder()
            model.encoder.requires_grad_(False)
            loss = decoder_loss(model, self.text_trainer().images, np.load(self.latents_file), scenes)
        return SceneTask(name, model, loss, len(scenes))

    def text(self) -> TextStates:
        return TextStates(self.text_trainer().text, self.tokenizer())

    def precompile(self, name: str) -> None:
        """Make a step of one of EXPERTS, of nothing, so that its stage finds it compiled in torch's cache."""
        settings = {**self.settings(name), "cuda_graph": False}
        count = settings["train_batch_size"]
        latents = torch.zeros(count, 4, 16, 16)
        data = LatentImages(latents, [""] * count, {}, latents if OBJECTIVES[name][2] else None)
        tokenizer = self.tokenizer()
        text = TextStates(new_text_encoder(tokenizer), tokenizer)
        states = np.zeros((1, tokenizer.model_max_length, WIDTH), np.float16)
        unet = _channels_last(new_unet(self.recipe.channels))
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingSettings(output_dir=Path(folder), seed=0, **settings)
            trainer = Trainer(expert_task(name, unet, data, states, text), arguments, quiet=True)
            trainer.make_step(iter(trainer.loader()), 0.0, Interrupts())

    def encode(self) -> None:
        """Cache the states of all texts, all latents, scaled to unit variance, and the scale."""
        batch = 512 if self.device == "cuda" else 16
        scenes = self.scenes()
        write_array(self.states_file, encode_texts(scenes, self.text(), 4 * batch, self.device))
        latents = encode_all(self.autoencoder(), scenes.pictures, batch, self.device)
        scale = 1.0 / float(latents[:, 0].std())
        write_array(self.folder / "scale.npy", np.array(scale))
        write_array(self.latents_file, latents * np.float32(scale))

    def export(self, output: Path) -> None:
        """Write the trained experts to `output`."""
        vae = self.autoencoder()
        vae.decoder.load_state_dict(read_average(self.checkpoints / "decoder.safetensors", "decoder."))
        export_experts(output, vae, self.text_trainer().text, self.unet("sol"), self.unet("lune"))
