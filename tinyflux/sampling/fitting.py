"""Whether a student, its encoders and the experts beside it belong together."""

from __future__ import annotations

import os
from typing import Any

from moe_sampler import HybridPipeline
from moe_sampler.loading.folders import read_config
from moe_sampler.loading.hub import Hub
from moe_sampler.pipelines.latents import latent_scaling
from moe_sampler.tinyflux.features.encoders import StudentEncoders
from moe_sampler.tinyflux.features.latent_space import same_latents
from moe_sampler.tinyflux.model.tinyflux import TinyFlux

__all__ = ["check_experts", "check_student", "default_side", "scaling_of"]


def check_student(student: TinyFlux, encoders: StudentEncoders) -> None:
    """Whether a student takes what its encoders give.

    Raises:
        TypeError: not a TinyFlux.
        ValueError: numbers of channels that differ, with both.
    """
    if not isinstance(student, TinyFlux):
        raise TypeError(f"student must be a TinyFlux, got {type(student).__name__}")
    text = encoders.clip if encoders.t5 is None else encoders.t5
    fits = {
        "in_channels": ("the VAE's latents", encoders.vae.config["latent_channels"]),
        "joint_attention_dim": ("the text encoder's states", text.model.config.hidden_size),
        "pooled_projection_dim": ("CLIP's pooled states", encoders.clip.model.config.hidden_size),
    }
    for setting, (what, size) in fits.items():
        if student.config[setting] != size:
            raise ValueError(
                f"the student's {setting} is {student.config[setting]}, but {what} have {size} channels: "
                "give the encoders that it was trained with"
            )


def scaling_of(student: TinyFlux, vae: Any) -> tuple[float, float]:
    """(scale, shift) of the student's latents: its own, as far as it knows them, else its VAE's."""
    scale, shift = latent_scaling(vae)
    own_scale, own_shift = student.config["latent_scale"], student.config["latent_shift"]
    return scale if own_scale is None else own_scale, shift if own_shift is None else own_shift


def check_experts(student: TinyFlux, encoders: StudentEncoders, experts: HybridPipeline) -> None:
    """Whether experts can work on the student's latents.

    Raises:
        ValueError: another latent space, or experts that aren't all in memory.
    """
    if experts.offload != "none":
        raise ValueError('experts that guide a student work beside it: load them with offload="none"')
    scaled = scaling_of(student, encoders.vae) == latent_scaling(experts.vae)
    if not scaled or not same_latents(encoders.vae, experts.vae):
        raise ValueError(
            "the student and the experts work on different latents: experts can only guide a student that "
            "was trained with their own VAE"
        )


def default_side(pipeline: str | os.PathLike, hub: Hub | None = None) -> int | None:
    """Side of a pipeline's latents as its denoiser's config says, if it says so.

    pipeline: a folder or hub id.
    """
    parts = ("unet*", "transformer")
    folder = (hub or Hub()).look(os.fspath(pipeline)).local([f"{part}/config.json" for part in parts])
    configs = [path for part in parts for path in sorted(folder.glob(f"{part}/config.json"))]
    sizes = [read_config(path).get("sample_size") for path in configs]
    return next((size for size in sizes if isinstance(size, int)), None)
