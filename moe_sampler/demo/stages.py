"""The stages of the demo's training: what each one needs, trains and leaves behind.

Every stage runs in one process with one thread: two such processes side by side are faster than one with two
threads, and the weights then do not depend on the number of cores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, ModelMixin
from torch import nn
from transformers import CLIPTokenizer

from ..expert_training import ExpertTask
from .autoencoder import decoder_loss, encode_all, joint_loss, new_autoencoder
from .data import SceneSet, write_array
from .experts import expert_task, new_unet
from .export import export_experts
from .scene_task import SceneTask, run_stage, stage_settings
from .text import TextTrainer, new_text_encoder, text_loss
from .tokenizer import write_tokenizer
from .weights import fill, read_average, trained_steps

WAVES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("scenes",),),
    (("autoencoder",), ("text",)),
    (("latents",),),
    (("trunk",),),
    (("sol", "decoder"), ("lune",)),
    (("export",),),
)
"""Waves of chains: a wave needs the ones before it, its chains run side by side, a chain's stages in turn."""
STAGES = tuple(stage for wave in WAVES for chain in wave for stage in chain)
TRAINED = ("autoencoder", "text", "trunk", "decoder", "sol", "lune")


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


SHIPPED = Recipe(
    scenes=24_000,
    width=32,
    decoder_width=48,
    channels=(32, 64, 128),
    stages={
        "autoencoder": stage_settings(2400, 2e-3, 24, warmup=50),
        "text": stage_settings(800, 1e-3, 64, ema=0.99),
        "decoder": stage_settings(3000, 1.5e-3, 8),
        "trunk": stage_settings(1200, 2e-3, 24, decay_share=0.2, floor=0.5),
        "sol": stage_settings(2800, 1.5e-3, 24),
        "lune": stage_settings(5000, 1.5e-3, 24),
    },
)
"""What made the experts that ship, but for the order of the scenes and the noise, which were drawn in another
way then."""


@dataclass(frozen=True)
class Workshop:
    """A work folder: scenes, latents and checkpoints of one run."""

    folder: Path
    seed: int = 0
    recipe: Recipe = SHIPPED

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def latents_file(self) -> Path:
        return self.folder / "latents.npy"

    def scenes(self) -> SceneSet:
        return SceneSet(self.folder / "scenes", self.recipe.scenes)

    def stage_seed(self, name: str) -> int:
        return self.seed + ("autoencoder", "text", "trunk", "sol", "lune", "decoder").index(name)

    def _build(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
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
                model.register_to_config(scaling_factor=self.scaling_factor())
        return model.to(memory_format=torch.channels_last)

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
        return model.to(memory_format=torch.channels_last)

    def _fill(self, model: nn.Module, name: str) -> nn.Module:
        return fill(model, self.checkpoints / f"{name}.safetensors")

    def finished(self, name: str) -> bool:
        """Whether a stage has nothing left to do."""
        if name == "scenes":
            return self.scenes().complete()
        if name == "latents":
            return self.latents_file.exists()
        if name == "export":
            return False
        return trained_steps(self.checkpoints / f"{name}.safetensors") >= self.recipe.steps(name)

    def train(self, name: str) -> None:
        """Run one of TRAINED to its end, continuing from its last checkpoint."""
        run_stage(self.task(name), self.checkpoints, self.stage_seed(name), self.recipe.stages[name])

    def task(self, name: str) -> SceneTask | ExpertTask:
        """What a stage trains."""
        if name in ("trunk", "sol", "lune"):
            text = self.text_trainer().text
            latents = np.load(self.latents_file)
            unet = self.unet(name, trained=False)
            return expert_task(name, unet, self.scenes(), latents, self.tokenizer(), text)
        scenes = self.scenes()
        if name == "autoencoder":
            model = self.autoencoder(trained=False)
            loss = joint_loss(model, scenes)
        elif name == "text":
            model = self.text_trainer(trained=False)
            loss = text_loss(model, self.tokenizer(), scenes)
        else:
            model = self.autoencoder()
            model.encoder.requires_grad_(False)
            loss = decoder_loss(model, self.text_trainer().images, np.load(self.latents_file), scenes)
        return SceneTask(name, model, loss, len(scenes))

    def encode(self) -> None:
        """Cache all latents, scaled to unit variance, and the scale."""
        latents = encode_all(self.autoencoder(), self.scenes().pictures)
        scale = 1.0 / float(latents[:, 0].std())
        write_array(self.folder / "scale.npy", np.array(scale))
        write_array(self.latents_file, latents * np.float32(scale))

    def export(self, output: Path) -> None:
        """Write the trained experts to `output`."""
        vae = self.autoencoder()
        vae.decoder.load_state_dict(read_average(self.checkpoints / "decoder.safetensors", "decoder."))
        export_experts(output, vae, self.text_trainer().text, self.unet("sol"), self.unet("lune"))
