"""Between pixels and latents: a VAE's two directions, and images as users have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

__all__ = ["check_image", "decode_latents", "encode_images", "encode_pixels", "image_size"]


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
    """
    if output_type == "latent":
        return latents
    latents = latents.to(dtype or vae.dtype) / vae.config.scaling_factor + _shift(vae)
    return processor.postprocess(vae.decode(latents, return_dict=False)[0].float(), output_type=output_type)


def encode_pixels(pixels: torch.Tensor, vae: Any) -> torch.Tensor:
    """float32 latents [B, C, h, w] of pixels [B, 3, H, W] in [-1, 1]: the most likely ones, not a sample, so
    that an image's latents depend on nothing but the image."""
    encoded = vae.encode(pixels.to(vae.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return (latents.float() - _shift(vae)) * vae.config.scaling_factor


@torch.no_grad()
def encode_images(vae: Any, images: Sequence[Image.Image]) -> torch.Tensor:
    """float32 [B, C, h, w]: scaled latents, the most likely ones, of RGB images of one size.

    latents = (encoded - shift_factor) * scaling_factor, with the numbers of the VAE's own config.
    """
    pixels = VaeImageProcessor(do_resize=False).preprocess(list(images))
    return encode_pixels(pixels.to(vae.device), vae)


def image_size(image: Any) -> tuple[int, int]:
    """(height, width) of an image, or of the first of a list."""
    first = image[0] if isinstance(image, list) else image
    if isinstance(first, Image.Image):
        return first.height, first.width
    if isinstance(first, torch.Tensor):
        return int(first.shape[-2]), int(first.shape[-1])
    return int(first.shape[-3]), int(first.shape[-2])


def check_image(image: Any, prompts: int) -> None:
    """Raise ValueError for what cannot be an image to start from.

    Args:
        image: PIL, NumPy [H, W, 3] or [B, H, W, 3] or a tensor [3, H, W] or [B, 3, H, W], both in [0, 1]; or
            a list of these, one a prompt.
        prompts: how many there are; one image serves all.
    """
    if isinstance(image, list) and not image:
        raise ValueError("image must hold at least one image")
    kinds = {type(one) for one in image} if isinstance(image, list) else {type(image)}
    kind = next(iter(kinds))
    if len(kinds) > 1 or not (issubclass(kind, Image.Image | torch.Tensor) or kind.__name__ == "ndarray"):
        raise ValueError(
            "image must be a PIL image, a NumPy array, a tensor or a list of one of these, got "
            + ", ".join(sorted(k.__name__ for k in kinds))
        )
    batched = not isinstance(image, list) and not isinstance(image, Image.Image) and image.ndim == 4
    shapes = [] if issubclass(kind, Image.Image) else [image] if not isinstance(image, list) else image
    axis = -3 if issubclass(kind, torch.Tensor) else -1
    for one in shapes:
        if (
            one.ndim not in ((3, 4) if batched or not isinstance(image, list) else (3,))
            or one.shape[axis] != 3
        ):
            raise ValueError(f"an image has three channels, got shape {tuple(one.shape)}")
    count = len(image) if isinstance(image, list) or batched else 1
    if count not in (1, prompts):
        raise ValueError(f"{prompts} prompts need one image or as many, got {count}")
