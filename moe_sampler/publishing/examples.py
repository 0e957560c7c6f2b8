"""Pictures that a saved folder's card shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .. import __version__
from ..sampling.plan import SamplingPlan
from ..viewing.images import save_png, zoom, zoom_factor
from ..viewing.parameters import parameters_text
from .card import Example

__all__ = ["FOLDER", "save_examples"]

FOLDER = "examples"


def save_examples(
    folder: Path,
    prompts: Sequence[str],
    images: Sequence[Image.Image],
    plan: SamplingPlan,
    settings: Mapping[str, Any],
) -> list[Example]:
    """Write them with their settings, so that `--like` makes them again.

    Args:
        folder: that is saved.
        prompts, images: one each; an image's seed is its place.
        plan: that made them.
        settings: of all; None is left out.
    """
    (folder / FOLDER).mkdir()
    found = []
    for seed, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        factor = zoom_factor(image.size)
        own = {"prompt": prompt, "seed": seed, **settings, "version": __version__, "zoom": factor}
        own = {key: value for key, value in own.items() if value is not None}
        file = f"{FOLDER}/{seed + 1}.png"
        save_png(zoom(image, factor), folder / file, own, parameters_text(own, plan, image.size))
        found.append(Example(prompt, file))
    return found
