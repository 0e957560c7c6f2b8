"""The stages of the demo's training: what each one needs, trains and leaves behind.

Every stage runs in one process with one thread: two such processes side by side are faster than one with two
threads, and the weights then do not depend on the number of cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from .autoencoder import decoder_loss, encode_all, joint_loss, new_autoencoder
from .data import SceneSet, write_array
from .experts import Batches, lune_loss, new_unet, sol_loss, trunk_loss
from .export import export_experts
from .text import TextTrainer, new_text_encoder, text_loss
from .tokenizer import write_tokenizer
from .training import Schedule, Stage, read_tensors

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
    """Sizes and lengths of a training run."""

    scenes: int
    width: int
    decoder_width: int
    channels: tuple[int, int, int]
    autoencoder: Schedule
    autoencoder_batch: int
    text: Schedule
    text_batch: int
    decoder: Schedule
    decoder_batch: int
    trunk: Schedule
    sol: Schedule
    lune: Schedule
    batch: int


SHIPPED = Recipe(
    scenes=24_000,
    width=32,
    decoder_width=48,
    channels=(32, 64, 128),
    autoencoder=Schedule(2400, 2e-3, warmup=50),
    autoencoder_batch=24,
    text=Schedule(800, 1e-3, ema=0.99),
    text_batch=64,
    decoder=Schedule(3000, 1.5e-3),
    decoder_batch=8,
    trunk=Schedule(1200, 2e-3, decay_share=0.2, floor=0.5),
    sol=Schedule(2800, 1.5e-3),
    lune=Schedule(5000, 1.5e-3),
    batch=24,
)
"""What made the experts that ship."""


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

    def unet(self, name: str, trained: bool = True) -> UNet2DConditionModel:
        """trunk, sol or lune; untrained Sol and Lune start from the trunk's averaged weights."""
        model = self._build(name, lambda: new_unet(self.recipe.channels))
        if trained or name != "trunk":
            self._fill(model, name if trained else "trunk")
        return model.to(memory_format=torch.channels_last)

    def _fill(self, model: nn.Module, name: str) -> nn.Module:
        averaged = read_tensors(self.checkpoints / f"{name}.safetensors", "ema.")
        state = model.state_dict()
        unknown = set(averaged) - set(state)
        if unknown:
            raise ValueError(
                f"stage {name}'s checkpoint has tensors the model lacks, such as {sorted(unknown)[0]}"
            )
        model.load_state_dict({**state, **averaged})
        return model.eval()

    def finished(self, name: str) -> bool:
        """Whether a stage has nothing left to do."""
        if name == "scenes":
            return self.scenes().complete()
        if name == "latents":
            return self.latents_file.exists()
        if name == "export":
            return False
        return Stage.finished(self.checkpoints, name, getattr(self.recipe, name).steps)

    def train(
        self, name: str, stop_at: int | None = None, each_step: Callable[[], None] = lambda: None
    ) -> None:
        """Run one of TRAINED to its end, continuing from its checkpoint."""
        recipe = self.recipe
        if name == "autoencoder":
            model = self.autoencoder(trained=False)
            loss = joint_loss(model, self.scenes(), recipe.autoencoder_batch)
        elif name == "text":
            model = self.text_trainer(trained=False)
            loss = text_loss(model, self.tokenizer(), self.scenes(), recipe.text_batch)
        elif name == "decoder":
            model = self.autoencoder()
            model.encoder.requires_grad_(False)
            eye = self.text_trainer().images
            loss = decoder_loss(model, eye, np.load(self.latents_file), self.scenes(), recipe.decoder_batch)
        else:
            model = self.unet(name, trained=False)
            text: CLIPTextModel = self.text_trainer().text
            batches = Batches(self.scenes(), np.load(self.latents_file), self.tokenizer(), text, recipe.batch)
            loss = {"trunk": trunk_loss, "sol": sol_loss, "lune": lune_loss}[name](model, batches)
        stage = Stage(name, self.checkpoints, model, getattr(recipe, name), self.stage_seed(name))
        stage.run(loss, stop_at, each_step)

    def encode(self) -> None:
        """Cache all latents, scaled to unit variance, and the scale."""
        latents = encode_all(self.autoencoder(), self.scenes().pictures)
        scale = 1.0 / float(latents[:, 0].std())
        write_array(self.folder / "scale.npy", np.array(scale))
        write_array(self.latents_file, latents * np.float32(scale))

    def export(self, output: Path) -> None:
        """Write the trained experts to `output`."""
        vae = self.autoencoder()
        vae.decoder.load_state_dict(
            {
                **vae.decoder.state_dict(),
                **read_tensors(self.checkpoints / "decoder.safetensors", "ema.decoder."),
            }
        )
        export_experts(output, vae, self.text_trainer().text, self.unet("sol"), self.unet("lune"))
