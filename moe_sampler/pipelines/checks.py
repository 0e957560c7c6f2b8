"""What a call of the pipeline was asked for, checked before any work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any

from .._numbers import number, whole
from ..data.pictures import MAX_PIXELS, pixel_limit
from .choices import MAX_IMAGES, MAX_SIDE, OUTPUT_TYPES, check_choice

if TYPE_CHECKING:
    import torch

__all__ = ["Request", "Start", "check_size", "check_strength"]


def check_size(height: Any, width: Any, multiple: int) -> tuple[int, int]:
    """Both, as ints. They must be positive multiples: of what one latent is in pixels, times what the UNet
    halves."""
    sides = {name: _side(name, value, multiple) for name, value in (("height", height), ("width", width))}
    limit = pixel_limit()
    if sides["height"] * sides["width"] > limit:
        raise ValueError(
            f"{sides['height']} x {sides['width']} pixels are more than the limit of {limit:.0f}: make it "
            f"smaller, or raise the limit with {MAX_PIXELS}"
        )
    return sides["height"], sides["width"]


def _side(name: str, value: Any, multiple: int) -> int:
    side = whole(name, value, MAX_SIDE)
    if side < multiple or side % multiple:
        lower = max(multiple, side // multiple * multiple)
        raise ValueError(
            f"{name} must be a positive multiple of {multiple}, got {side}: use {lower}"
            + (f" or {lower + multiple}" if side > multiple else "")
        )
    return side


@dataclass(frozen=True)
class Request:
    """How many images a call makes, and what it returns them as.

    Args:
        prompts: image i belongs to prompt i // images_per_prompt.
        images_per_prompt: as given.
        batch_size: images that are sampled at once; all by default.
        output_type: one of `choices.OUTPUT_TYPES`.

    Raises:
        ValueError: what cannot be.
    """

    prompts: int
    images_per_prompt: int
    batch_size: int
    output_type: str

    @classmethod
    def read(cls, prompts: int, images_per_prompt: int, batch_size: int | None, output_type: str) -> Request:
        images_per_prompt = whole("num_images_per_prompt", images_per_prompt, MAX_IMAGES)
        if prompts * images_per_prompt > MAX_IMAGES:
            raise ValueError(
                f"{prompts} prompts with {images_per_prompt} images each are more than the {MAX_IMAGES} "
                "images that one call makes: call several times"
            )
        if batch_size is not None:
            batch_size = whole("batch_size", batch_size, MAX_IMAGES)
        check_choice("output_type", output_type, OUTPUT_TYPES)
        return cls(prompts, images_per_prompt, batch_size or prompts * images_per_prompt, output_type)

    @property
    def images(self) -> int:
        return self.prompts * self.images_per_prompt


@dataclass(frozen=True)
class Start:
    """What a call's images are made out of.

    Args:
        seeds: one an image, or
        generator: one for all or one an image, as in diffusers.
        latents: the state to start from, or None to draw it.
    """

    seeds: list[int] | None
    generator: torch.Generator | list[torch.Generator] | None
    latents: torch.Tensor | None

    @classmethod
    def read(cls, seed: Any, generator: Any, latents: Any, shape: Sequence[int]) -> Start:
        """shape: [images, C, h, w] of the latents.

        Raises:
            ValueError: what doesn't fit it, or both a seed and a generator.
        """
        generator = list(generator) if isinstance(generator, tuple) else generator
        _check_generator(generator, seed, shape[0])
        if latents is not None:
            _check_latents(latents, tuple(shape))
        return cls(seeds_of(seed, shape[0]) if generator is None else None, generator, latents)


def _check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    import torch

    if not isinstance(latents, torch.Tensor):
        raise ValueError(f"latents must be a tensor, got {type(latents).__name__}")
    if not latents.is_floating_point():
        raise ValueError(f"latents must be floats, got {latents.dtype}")
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")


def check_strength(strength: Any, image: Any, latents: Any) -> float | None:
    """The share of the steps that an image goes through; None without an image."""
    if image is None:
        if strength is not None:
            raise ValueError("strength says how much of an image is changed: give image too")
        return None
    if latents is not None:
        raise ValueError("give either image, to start from it, or latents, not both")
    strength = 0.8 if strength is None else number("strength", strength)
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength must lie above 0 and at most at 1, got {strength!r}")
    return strength


def seeds_of(seed: Any, batch: int) -> list[int]:
    """One seed an image: a single `seed` counts up over the batch, so that each can be made alone. None draws
    one from torch's global generator, so that `torch.manual_seed` decides, as in diffusers."""
    if seed is None:
        import torch

        seed = int(torch.randint(2**31, ()))
    try:
        if isinstance(seed, bool | str):
            raise TypeError
        if getattr(seed, "ndim", 1) == 0 or not isinstance(seed, Iterable):
            first = index(seed)
            seeds = [first + i for i in range(batch)]
        else:
            seeds = [index(one) for one in seed]
    except TypeError:
        raise ValueError(f"seed must be an integer or a sequence of them, got {seed!r}") from None
    if len(seeds) != batch:
        raise ValueError(f"{batch} images need {batch} seeds, or one seed to count up from; got {len(seeds)}")
    return seeds


def _check_generator(generator: Any, seed: Any, batch: int) -> None:
    """One for all, or one an image, as in diffusers."""
    if generator is None:
        return
    if seed is not None:
        raise ValueError("give either seed or generator, not both")
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"{batch} images need one generator or {batch}, got {len(generator)}")
