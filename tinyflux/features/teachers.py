"""The experts that teach, with the VAE whose latents they know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from moe_sampler.architectures import shape_of
from moe_sampler.loading.fingerprint import portable_fingerprint
from moe_sampler.tinyflux.features.block_maps import BlockMaps
from moe_sampler.tinyflux.features.extraction import ExpertFeatures, check_buckets

__all__ = ["MAP_TIMES", "Teachers", "image_side"]

MAP_TIMES = (0.75,)
"""At little noise a diffusion model's features say most of an image (DIFT, arXiv:2306.03881)."""


def image_side(pipe: Any) -> int | None:
    """Of the images that a HybridPipeline's experts were made for, in pixels, if their configs say it."""
    side = shape_of(pipe.expert_unet(pipe.expert_names[0])).sample_size
    return None if side is None else side * pipe.vae_scale_factor


@dataclass(frozen=True)
class Teachers:
    """The experts with the VAE whose latents they know.

    Args:
        features: of Sol, Lune or both, with their text encoder.
        vae: the experts' own.
        text_encoder: the model behind `features.encode_prompt`, for the manifest's fingerprint.
        maps: of one of these experts, to align a student's tokens with; None for none.
        map_times: increasing times they are taken at.

    Raises:
        ValueError: maps of another expert, or without times.
    """

    features: ExpertFeatures
    vae: AutoencoderKL | AutoencoderTiny
    text_encoder: nn.Module
    maps: BlockMaps | None = None
    map_times: tuple[float, ...] = MAP_TIMES

    def __post_init__(self) -> None:
        if self.maps is not None:
            object.__setattr__(self, "map_times", check_buckets(self.map_times))
            if self.maps.expert not in self.features.teachers:
                teachers = ", ".join(self.features.teachers)
                raise ValueError(f"the maps are {self.maps.expert}'s, but the teachers are {teachers}")

    @classmethod
    def from_pipeline(
        cls,
        pipe: Any,
        teachers: Sequence[str] | None = None,
        *,
        maps: BlockMaps | None = None,
        map_times: Sequence[float] = MAP_TIMES,
        **settings: Any,
    ) -> Teachers:
        """The experts of a HybridPipeline; `teachers` and `settings` as `ExpertFeatures.from_pipeline`."""
        features = ExpertFeatures.from_pipeline(pipe, teachers, **settings)
        return cls(features, pipe.vae, pipe.text_encoder, maps, tuple(map_times))

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {
            "vae": {"class": type(self.vae).__name__, "fingerprint": portable_fingerprint(self.vae)},
            "text_encoder": {
                "class": type(self.text_encoder).__name__,
                "fingerprint": portable_fingerprint(self.text_encoder),
            },
        }
        for name in self.features.teachers:
            path = getattr(self.features, f"{name}_path")
            described[name] = {
                "fingerprint": portable_fingerprint(getattr(self.features, name)),
                "path": type(path).__name__,
                "timesteps": [path.timestep(path.at(s)) for s in (0.25, 0.5, 0.75)],
            }
        return described
