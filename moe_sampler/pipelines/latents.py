"""Between pixels and latents: a VAE's two directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ..errors import NonFiniteError
from .finite import check_finite, finite
from .start_images import pixels_of

__all__ = ["decode_latents", "encode_images", "encode_pixels"]


def _shift(vae: Any) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0


def decode_latents(
    latents: torch.Tensor,
    vae: Any,
    processor: VaeImageProcessor,
    output_type: str = "pil",
    dtype: torch.dtype | None = None,
) -> Any:
    """Images from float32 latents [B, C, h, w]; "latent" gives them back as they are.

    dtype: what the VAE computes in, from a caller that knows; the VAE looks through all its modules for it.

    Raises:
        NonFiniteError: NaN or an infinity in the images, or in the latents.
    """
    if output_type == "latent":
        return latents
    scaled = latents.to(dtype or vae.dtype) / vae.config.scaling_factor + _shift(vae)
    decoded = vae.decode(scaled, return_dict=False)[0].float()
    if not finite(decoded) and not finite(latents):
        raise NonFiniteError("NaN or an infinity in the latents that were to be decoded")
    check_finite("the decoded images", decoded, "the VAE", vae)
    return processor.postprocess(decoded, output_type=output_type)


def encode_pixels(pixels: torch.Tensor, vae: Any) -> torch.Tensor:
    """float32 latents [B, C, h, w] of pixels [B, 3, H, W] in [-1, 1]: the most likely ones, not a sample, so
    that an image's latents depend on nothing but the image."""
    encoded = vae.encode(pixels.to(vae.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    check_finite("the latents of the images", latents, "the VAE", vae)
    return (latents.float() - _shift(vae)) * vae.config.scaling_factor


@torch.no_grad()
def encode_images(vae: Any, images: Sequence[Image.Image]) -> torch.Tensor:
    """float32 [B, C, h, w]: scaled latents, the most likely ones, of RGB images of one size.

    latents = (encoded - shift_factor) * scaling_factor, with the numbers of the VAE's own config.
    """
    height, width = images[0].height, images[0].width
    return encode_pixels(pixels_of(images, height, width).to(vae.device), vae)
