"""The student as something a `Trainer` trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from moe_sampler.kernels import flow_training_pair, weighted_mse
from moe_sampler.publishing.upload import Address
from moe_sampler.tinyflux.model.lora import WEIGHTS, lora_file
from moe_sampler.tinyflux.model.published import REFERENCE, describe_student, loading_sections
from moe_sampler.tinyflux.model.tinyflux import PROJECTOR, TinyFlux
from moe_sampler.tinyflux.training.alignment import Alignment
from moe_sampler.tinyflux.training.objective_settings import ObjectiveSettings
from moe_sampler.tinyflux.training.objectives import student_loss, tokens
from moe_sampler.tinyflux.training.routed import RoutedTeachers
from moe_sampler.tinyflux.training.teachers import FeatureTeachers
from moe_sampler.tinyflux.training.time_settings import TimeSettings
from moe_sampler.training import Draws, Losses
from moe_sampler.training.task import Published, length

__all__ = ["StudentTask"]

_VALIDATION_SEED = 2**40  # no sample of a run has a seed that is as round


class StudentTask:
    """Implements `moe_sampler.training.Task`.

    Args:
        model: the student.
        data: items as `FeatureCache` and `MultiSource` have them.
        objective, time, teachers, routed, alignment: as `student_loss` takes them.
        held_out: likewise, for validation; None for none.
        noise_levels: at which held-out velocities are measured.
        validation_batch_size: samples at once.
        paint: makes pictures with the student, for eyes; None for none.
        lora_alpha: of the adapters, where these are what is trained and saved.
        about: of the data and all else that makes the run, plain values.
    """

    name = "tinyflux"
    weights_name = "model.safetensors"

    def __init__(
        self,
        model: TinyFlux,
        data: Dataset,
        *,
        objective: ObjectiveSettings,
        time: TimeSettings,
        teachers: FeatureTeachers | None = None,
        routed: RoutedTeachers | None = None,
        alignment: Alignment | None = None,
        held_out: Dataset | None = None,
        noise_levels: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
        validation_batch_size: int = 32,
        paint: Callable[[TinyFlux], list[Image.Image]] | None = None,
        lora_alpha: float | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.data = model, data
        self.objective, self.time, self.teachers, self.routed = objective, time, teachers, routed
        self.alignment, self.lora_alpha = alignment, lora_alpha
        if lora_alpha is not None:
            self.weights_name = WEIGHTS
        self.ships_config = lora_alpha is None
        self.held_out, self.noise_levels = held_out, tuple(noise_levels)
        self.validation_batch_size, self.paint = validation_batch_size, paint
        self.about = dict(about or {})

    @property
    def steps_alike(self) -> bool:
        """Without experts in the loop whose calls are planned on the host."""
        maps = None if self.alignment is None else self.alignment.teacher
        return self.routed is None and not any(
            teacher is not None and teacher.planned for teacher in (self.teachers, maps)
        )

    def loss(self, model: nn.Module, batch: Mapping[str, Any], draws: Draws) -> Losses:
        """See `student_loss`."""
        return student_loss(
            model,
            self.model,
            batch,
            draws,
            objective=self.objective,
            time=self.time,
            teachers=self.teachers,
            routed=self.routed,
            alignment=self.alignment,
        )

    def validate(self, model: nn.Module) -> dict[str, float]:
        """The velocity's mean squared error on held-out samples, where the student predicts the experts'
        features itself, as it does alone: "loss" over all levels, and "noise 0.5" at one.

        A sample's noise is the same at every level and in every validation.
        """
        if self.held_out is None or not length(self.held_out):
            return {}
        device = self.model.device
        sums = torch.zeros(len(self.noise_levels), dtype=torch.float64, device=device)
        first = 0
        for batch in DataLoader(self.held_out, self.validation_batch_size):
            latents = batch["latents"].to(device).contiguous()
            seeds = torch.arange(first, first + len(latents), device=device) + _VALIDATION_SEED
            first += len(latents)
            for index, level in enumerate(self.noise_levels):
                errors = self._errors(model, batch, latents, seeds, level)
                sums[index] += errors.double().sum()
        means = (sums / first).tolist()
        by_level = {f"noise {s:g}": mean for s, mean in zip(self.noise_levels, means, strict=True)}
        return {"loss": sum(means) / len(means), **by_level}

    def _errors(
        self, model: nn.Module, batch: Mapping[str, Any], latents: Tensor, seeds: Tensor, level: float
    ) -> Tensor:
        """float32 [B]."""
        device = latents.device
        noise = torch.full((len(latents),), level, device=device)
        pair = flow_training_pair(
            latents, noise, seeds=seeds, prediction="reversed_flow_prediction", dtype=torch.float32
        )
        mask = batch.get("prompt_mask")
        out = model(
            tokens(pair.noisy),
            batch["prompt_embeds"].to(device),
            batch["pooled_prompt_embeds"].to(device),
            1 - noise,
            size=tuple(latents.shape[2:]),
            encoder_attention_mask=None if mask is None else mask.to(device),
        )
        return weighted_mse(out.sample, tokens(pair.target), reduction="none")

    def samples(self, model: nn.Module) -> list[Image.Image]:
        """What `paint` makes."""
        return [] if self.paint is None else self.paint(self.model)

    def shipped(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Without the projector, which only the alignment needs; of a LoRA its adapters, as a file has
        them."""
        if self.lora_alpha is not None:
            return lora_file(tensors, self.lora_alpha)
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(PROJECTOR)}

    def published(self, address: Address, license: str | None) -> Published:
        """What its folder says of the student, or of the LoRA."""
        config, title = self.model.config, Path(address.source).name
        header = describe_student(title, config, license, lora=not self.ships_config)
        if self.ships_config:
            return Published(header, loading_sections(config, address), (REFERENCE,))
        load = f"pipe.load_lora_weights({address.arguments})"
        told = f"On a `StudentPipeline` of the student that it was trained on: `{load}`."
        return Published(header, ["## Loading", told])

    def describe(self) -> dict[str, Any]:
        """The data, the student's config and what teaches it."""
        what = "TinyFlux student" if self.ships_config else "LoRA of a TinyFlux student"
        parameters = [(n, p) for n, p in self.model.named_parameters() if self.ships_config or ".lora_" in n]
        return {
            "summary": f"A {what}, trained with moe-sampler.",
            "tags": ["tinyflux", "text-to-image", *([] if self.ships_config else ["lora"])],
            "parameters": sum(p.numel() for name, p in parameters if not name.startswith(PROJECTOR)),
            "samples": length(self.data),
            "held-out samples": 0 if self.held_out is None else length(self.held_out),
            **self.about,
        }
