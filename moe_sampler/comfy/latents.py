"""A LATENT through a plan: noise, previews and progress as ComfyUI's own samplers have them."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.sample
import latent_preview
import torch

from .opened import Work
from .running import noise_of_seeds, run
from .setups import PlannedRun

__all__ = ["sampled"]


def sampled(
    planned: PlannedRun, latent: dict[str, Any], seed: int, own_noise: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(The LATENT that a plan makes; what the last expert believed).

    Args:
        planned: the plan and its experts.
        latent: a LATENT; its `noise_mask` says where it is changed, its `batch_index` which images of a
            larger batch these are.
        seed: of the first image; the steps' own noise counts it up over the batch.
        own_noise: whether the run starts from this package's noise or from ComfyUI's.
    """
    host = planned.experts[0].model
    image = comfy.sample.fix_empty_latent_channels(host, latent["samples"])
    if image.is_nested:
        raise ValueError(
            "latents of several parts (video with sound) can't be sampled by a plan: use KSampler"
        )
    indices = latent.get("batch_index") or range(image.shape[0])
    seeds = [(seed + index) % 2**64 for index in indices]
    noise = noise_of_seeds(image.shape, seeds) if own_noise else _comfys_noise(image, seed, latent)
    believed: dict[str, torch.Tensor] = {}
    show = latent_preview.prepare_callback(host, len(planned.plan), believed)
    work = Work(image, noise, latent.get("noise_mask"), seed)
    made = run(planned, work, seeds, show)
    return _out(latent, host, made), _out(latent, host, believed["x0"])


def _comfys_noise(image: torch.Tensor, seed: int, latent: dict[str, Any]) -> torch.Tensor:
    return comfy.sample.prepare_noise(image, seed, latent.get("batch_index"))


def _out(latent: dict[str, Any], model: Any, samples: torch.Tensor) -> dict[str, Any]:
    """The LATENT with these samples, from the models' scale to ComfyUI's."""
    samples = model.model.process_latent_out(samples.float())
    return {**latent, "samples": samples.to(comfy.model_management.intermediate_device())}
