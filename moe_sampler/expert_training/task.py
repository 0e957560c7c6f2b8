"""An expert's training as a `Task` of the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from PIL import Image
from torch import Tensor, nn

from .._transfers import OnDevice
from ..architectures import architecture_of, shape_of
from ..loading.parts import scheduler_from_config
from ..pipelines.latents import decode_latents
from ..publishing.modelspec import describe_expert
from ..publishing.upload import Address
from ..sampling.experts import Expert
from ..sampling.loop import sample
from ..sampling.planner import plan
from ..training.draws import Draws
from ..training.settings import SettingsError, to_tables
from ..training.task import Losses, Published
from .captions import TextStates, TextTable
from .david import AssessedUNet, structure_classes
from .images import LatentImages
from .objectives import Levels, Objective
from .settings import DavidSettings, ExpertSettings

__all__ = ["VALIDATION_LEVELS", "ExpertTask"]

VALIDATION_LEVELS = (0.95, 0.8, 0.65, 0.5, 0.35, 0.2, 0.05)
"""Shares of noise at which held-out errors are measured."""
_VALIDATION_BATCH = 32


class ExpertTask:
    """Sol, Lune or an ε-expert on latents and captions.

    Args:
        unet: trained, in place.
        objective: what it learns.
        data: to train on.
        text: captions to states.
        texts: the data's texts, where they were encoded ahead; by default they are in the loop.
        settings: caption dropout, structure pictures, and what validation shows.
        held_out: for validation; None for none.
        assessor: a module as `Assessor` says, trained along, whose weights the samples get.
        david: settings of the structure classes that an assessor is told.
        vae: decodes the pictures of `samples`; without it there are none.
        name: of the run; by default the objective's kind.

    Raises:
        SettingsError: data that don't fit the UNet, or don't have what the settings ask for.
    """

    weights_name = "diffusion_pytorch_model.safetensors"
    steps_alike = True

    def __init__(
        self,
        unet: ModelMixin,
        objective: Objective,
        data: LatentImages,
        text: TextStates,
        settings: ExpertSettings | None = None,
        *,
        held_out: LatentImages | None = None,
        assessor: nn.Module | None = None,
        david: DavidSettings | None = None,
        vae: Any = None,
        texts: TextTable | None = None,
        name: str | None = None,
    ) -> None:
        self.settings = settings = ExpertSettings() if settings is None else settings
        channels = shape_of(unet).in_channels
        if data.latents.shape[1] != channels:
            raise SettingsError(
                f"the latents have {data.latents.shape[1]} channels, the UNet takes {channels}"
            )
        if settings.structure_below > 0 and data.structure is None:
            raise SettingsError("structure_below needs structure pictures, which these data don't have")
        self.name = objective.kind if name is None else name
        self.unet, self.objective, self.data, self.text = unet, objective, data, text
        self.texts = text.table(data.captions.texts) if texts is None else texts
        self.held_out, self.vae = held_out, vae
        self._architecture = architecture_of(unet)
        self.assessed = assessor is not None
        self.model: nn.Module = unet if assessor is None else AssessedUNet(unet, assessor)
        self.david = DavidSettings() if david is None else david
        if self.assessed:
            self.classes = OnDevice(structure_classes(data.latents, self.david.structure_classes))

    @staticmethod
    def collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The data make whole batches."""
        return batch

    def loss(self, model: nn.Module, batch: dict[str, Tensor], draws: Draws) -> Losses:
        levels = self.objective.draw(draws)
        x0 = self._data(*self.data.tensors(batch), levels)
        rows = self.data.captions.draw(batch["index"], draws, self.settings.caption_dropout)
        states = self.texts.states(rows)
        pair = self.objective.pair(x0, levels, seeds=draws.seeds("noise"))
        if not self.assessed:
            answer = self._answer(model, pair.noisy, pair.timestep, states)
            errors = self.objective.errors(answer, pair.target, levels)
            return Losses(errors.mean(), {}, errors.detach(), levels.noise)
        structure = self.classes.on(x0.device)[batch["index"]]
        answer, weights, extra = model(pair.noisy, pair.timestep, states, levels.noise, structure)
        errors = self.objective.errors(answer, pair.target, levels)
        loss = (weights * errors).mean()
        terms = {"unweighted": errors.detach().mean(), "weight_spread": weights.std(correction=0)}
        if extra is not None:
            terms["assessor"], loss = extra.detach(), loss + extra
        return Losses(loss, terms, errors.detach(), levels.noise)

    def _answer(self, model: nn.Module, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """The UNet's prediction, without what an assessor adds."""
        if self.assessed:
            return model(x, timestep, encoder_hidden_states)[0]
        return self._architecture.call(model, x, timestep, encoder_hidden_states)

    def _data(self, latents: Tensor, structure: Tensor | None, levels: Levels) -> Tensor:
        """Full pictures, or structure pictures where there is little noise."""
        if structure is None or self.settings.structure_below == 0:
            return latents.contiguous()
        flat = (levels.noise < self.settings.structure_below).view(-1, 1, 1, 1)
        return torch.where(flat, structure, latents)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """ "loss": the objective's error, averaged over VALIDATION_LEVELS; and x0's error at each of them."""
        if self.held_out is None:
            return {}
        device = next(model.parameters()).device
        found: dict[str, float] = {}
        losses = []
        for level in VALIDATION_LEVELS:
            error, x0_error = self._errors_at(model, self.held_out, level, device)
            losses.append(error)
            found[f"x0_error/{level:g}"] = x0_error
        return {"loss": sum(losses) / len(losses), **found}

    def _errors_at(
        self, model: nn.Module, test: LatentImages, level: float, device: torch.device
    ) -> tuple[float, float]:
        """(The objective's error, x0's error), means over the held-out images, with one noise an image."""
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for start in range(0, len(test), _VALIDATION_BATCH):
            indices = list(range(start, min(start + _VALIDATION_BATCH, len(test))))
            draws = Draws(0, 0, range(start, start + len(indices)), len(test), device)
            share = torch.full((len(indices),), level, dtype=torch.float64, device=device)
            levels = self.objective.at(share)
            flat = None if test.structure is None else test.structure[indices].to(device)
            x0 = self._data(test.latents[indices].to(device), flat, levels)
            pair = self.objective.pair(x0, levels, seeds=draws.seeds("validation"))
            states = self.text(test.captions.first(indices), device)
            answer = self._answer(model, pair.noisy, pair.timestep, states)
            own = self.objective.errors(answer, pair.target, levels)
            of_x0 = (self.objective.x0(answer, pair.noisy, levels) - x0).square().mean((1, 2, 3))
            sums += torch.stack([own.double().sum(), of_x0.double().sum()])
        error, x0_error = (sums / len(test)).tolist()
        return error, x0_error

    @torch.no_grad()
    def samples(self, model: nn.Module) -> list[Image.Image]:
        """Pictures of the first held-out captions, from fixed seeds."""
        count = min(self.settings.num_validation_images, len(self.held_out or ()))
        if self.vae is None or self.held_out is None or not count:
            return []
        device = next(model.parameters()).device
        texts = self.held_out.captions.first(range(count))
        expert = Expert.from_scheduler_config(
            self.objective.kind,
            self.objective.scheduler,
            partial(self._answer, model),
            guidance_scale=self.settings.guidance_scale,
        )
        latents = sample(
            plan(expert, steps=self.settings.num_inference_steps),
            expert,
            shape=(count, *self.held_out.latents.shape[1:]),
            seeds=list(range(count)),
            device=device,
            cond={"encoder_hidden_states": self.text(texts, device)},
            uncond={"encoder_hidden_states": self.text([""] * count, device)},
        )
        return decode_latents(latents, self.vae.to(device), VaeImageProcessor())

    def shipped(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The UNet's, by its own names."""
        if not self.assessed:
            return dict(tensors)
        return {name.removeprefix("unet."): t for name, t in tensors.items() if name.startswith("unet.")}

    def beside(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The assessor's, in a file of its own."""
        rest = {name: t for name, t in tensors.items() if not name.startswith("unet.")}
        return {"assessor.safetensors": rest} if self.assessed else {}

    def published(self, address: Address, license: str | None) -> Published:
        """What its folder says of the expert."""
        kind = self.objective.kind
        header = describe_expert(
            Path(address.source).name,
            {**self.unet.config, "_class_name": type(self.unet).__name__},
            self.objective.scheduler,
            self.objective.prediction,
            scale=None if self.vae is None else 2 ** (len(self.vae.config["block_out_channels"]) - 1),
            license=license,
        )
        source = f"ExpertSource({address.arguments})"
        given = f"{kind}={source}" if kind in ("sol", "lune") else f'experts={{"mine": {source}}}'
        told = f"As an expert on the base it was trained on: `HybridPipeline.from_pretrained(base, {given})`."
        return Published(header, ["## Loading", told], (SCHEDULER_CONFIG_NAME,))

    def save_config(self, folder: Path) -> None:
        """What an expert's folder says of it: its model, and what it was trained on."""
        self.unet.save_config(folder)
        scheduler_from_config(self.objective.scheduler).save_pretrained(folder)

    def describe(self) -> dict[str, Any]:
        found = {
            "expert": self.objective.kind,
            "trained_on": dict(self.objective.scheduler),
            "density": self.objective.density,
            "levels": to_tables(self.objective.settings),
            "settings": to_tables(self.settings),
            "data": self.data.about,
        }
        return {**found, "david": to_tables(self.david)} if self.assessed else found
