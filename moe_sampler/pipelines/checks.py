"""What a call of the pipeline was asked for, checked before any work."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any

from .settings import by_expert

__all__ = [
    "check_generator",
    "check_latents",
    "check_options",
    "check_size",
    "check_strength",
    "guidance_by_expert",
    "seeds_of",
]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_size(height: Any, width: Any, multiple: int) -> None:
    """Both must be positive multiples: of what one latent is in pixels, times what the UNet halves."""
    for name, value in (("height", height), ("width", width)):
        if isinstance(value, bool) or value < multiple or value % multiple:
            lower = max(multiple, int(value // multiple) * multiple)
            raise ValueError(
                f"{name} must be a positive multiple of {multiple}, got {value}: use {lower}"
                + (f" or {lower + multiple}" if value > multiple else "")
            )


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be at least 1, and whole, got {value!r}")


def check_options(
    num_images_per_prompt: int,
    batch_size: int | None,
    output_type: str,
    callback_inputs: Sequence[str],
    known_inputs: Sequence[str],
) -> None:
    """The rest of what diffusers' pipelines check in `check_inputs`."""
    _check_count("num_images_per_prompt", num_images_per_prompt)
    if batch_size is not None:
        _check_count("batch_size", batch_size)
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f'unknown output_type "{output_type}": use {", ".join(OUTPUT_TYPES)}')
    unknown = [name for name in callback_inputs if name not in known_inputs]
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs may name {tuple(known_inputs)}, not {unknown}")


def check_strength(strength: Any, image: Any, latents: Any) -> float | None:
    """The share of the steps that an image goes through; None without an image."""
    if image is None:
        if strength is not None:
            raise ValueError("strength says how much of an image is changed: give image too")
        return None
    if latents is not None:
        raise ValueError("give either image, to start from it, or latents, not both")
    strength = 0.8 if strength is None else strength
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0.0 < strength <= 1.0:
        raise ValueError(f"strength must lie above 0 and at most at 1, got {strength!r}")
    return strength


def check_latents(latents: Any, shape: Sequence[int]) -> None:
    """The state to start from: of the batch's shape."""
    if latents is not None and tuple(latents.shape) != tuple(shape):
        raise ValueError(f"latents must have shape {tuple(shape)}, got {tuple(latents.shape)}")


def seeds_of(seed: Any, batch: int) -> list[int]:
    """One seed an image: a single `seed` counts up over the batch, so that each can be made alone."""
    if seed is None:
        seed = secrets.randbelow(2**31)
    try:
        if isinstance(seed, bool | str):
            raise TypeError
        count_up = not isinstance(seed, Iterable)
        seeds = [index(seed) + i for i in range(batch)] if count_up else [index(one) for one in seed]
    except TypeError:
        raise ValueError(f"seed must be an integer or a sequence of them, got {seed!r}") from None
    if len(seeds) != batch:
        raise ValueError(f"{batch} images need {batch} seeds, or one seed to count up from; got {len(seeds)}")
    return seeds


def check_generator(generator: Any, seed: Any, batch: int) -> None:
    """One for all, or one an image, as in diffusers."""
    if generator is None:
        return
    if seed is not None:
        raise ValueError("give either seed or generator, not both")
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"{batch} images need one generator or {batch}, got {len(generator)}")


def guidance_by_expert(
    guidance: float | Mapping[str, float] | None,
    own: Mapping[str, float | None],
    defaults: Mapping[str, Any],
    experts: Sequence[str],
) -> dict[str, float]:
    """Each expert's guidance scale: its own, else what was given for all, else the model's default.

    Args:
        guidance: for all experts, or by name.
        own: given as `sol_guidance` and the like.
        defaults: with `<name>_guidance`.
        experts: names.
    """
    shared = by_expert("guidance_scale", guidance, experts)
    given = by_expert("guidance", {name: value for name, value in own.items() if value is not None}, experts)
    return {
        name: next(v for v in (given[name], shared[name], defaults[f"{name}_guidance"]) if v is not None)
        for name in experts
    }
