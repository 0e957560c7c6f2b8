"""Between pixels and latents: a VAE's two directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ..errors import NonFiniteError
from .finite import check_finite, finite
from .start_images import pixels_of

__all__ = ["decode_latents", "encode_images", "encode_pixels", "latent_scaling"]


def latent_scaling(vae: Any) -> tuple[float, float]:
    """(scaling_factor, shift_factor) of a VAE's config, as diffusers' pipelines use them: what a model sees
    is (encoded - shift) * scale."""
    return vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0


def decode_latents(
    latents: torch.Tensor,
    vae: Any,
    processor: VaeImageProcessor,
    output_type: str = "pil",
    dtype: torch.dtype | None = None,
    scaling: tuple[float, float] | None = None,
) -> Any:
    """Images from float32 latents [B, C, h, w]; "latent" gives them back as they are.

    dtype: what the VAE computes in, from a caller that knows; the VAE looks through all its modules for it.
    scaling: (scale, shift) of the latents, where they aren't those of the VAE's config.

    Raises:
        NonFiniteError: NaN or an infinity in the images, or in the latents.
    """
    if output_type == "latent":
        return latents
    scale, shift = latent_scaling(vae) if scaling is None else scaling
    scaled = latents.to(dtype or vae.dtype) / scale + shift
    decoded = vae.decode(scaled, return_dict=False)[0].float()
    if not finite(decoded) and not finite(latents):
        raise NonFiniteError("NaN or an infinity in the latents that were to be decoded")
    check_finite("the decoded images", decoded, "the VAE", vae)
    return processor.postprocess(decoded, output_type=output_type)


def encode_pixels(
    pixels: torch.Tensor,
    vae: Any,
    scaling: tuple[float, float] | None = None,
    noise: Callable[[torch.Size], torch.Tensor] | None = None,
) -> torch.Tensor:
    """float32 latents [B, C, h, w] of pixels [B, 3, H, W] in [-1, 1]: the most likely ones, so that an
    image's latents depend on nothing but the image.

    scaling: (scale, shift) in place of those of the VAE's config. noise: from a shape to float32 N(0, 1), for
    a sample of the VAE's distribution instead.
    """
    encoded = vae.encode(pixels.to(vae.dtype))
    if not hasattr(encoded, "latent_dist"):
        latents = encoded.latents
    elif noise is None:
        latents = encoded.latent_dist.mode()
    else:
        found = encoded.latent_dist
        latents = found.mean.float() + found.std.float() * noise(found.mean.shape)
    check_finite("the latents of the images", latents, "the VAE", vae)
    scale, shift = latent_scaling(vae) if scaling is None else scaling
    return (latents.float() - shift) * scale


@torch.no_grad()
def encode_images(
    vae: Any,
    images: Sequence[Image.Image],
    scaling: tuple[float, float] | None = None,
    noise: Callable[[torch.Size], torch.Tensor] | None = None,
) -> torch.Tensor:
    """float32 [B, C, h, w]: the latents of RGB images of one size, as `encode_pixels` makes them."""
    height, width = images[0].height, images[0].width
    return encode_pixels(pixels_of(images, height, width).to(vae.device), vae, scaling, noise)
