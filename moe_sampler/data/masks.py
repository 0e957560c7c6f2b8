"""What of an image counts in a loss: grey pictures, white where it does and black where it doesn't."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from .digests import content, fingerprint, remembered
from .listing import list_folder, split
from .pictures import fit_image, read_picture
from .reports import printable, say, some

__all__ = ["MaskFolder", "Masked", "fit_mask", "has_masks", "mask_of"]


@runtime_checkable
class Masked(Protocol):
    """A source that may have masks."""

    @property
    def has_masks(self) -> bool:
        """Whether it has."""
        ...

    def mask(self, index: int) -> Image.Image | None:
        """Of an image, in its proportions; None where all of it counts."""
        ...


class MaskFolder:
    """A folder of masks, by the images' names: `masks/set/a.png` or `.jpg` for `set/a.jpg`.

    Args:
        folder: where they are.
        images: names of the images, relative to theirs. One without a mask counts as a whole, and a line says
            how many these are.
        max_pixels: of a mask; see `pictures.pixel_limit`.

    Raises:
        ValueError: no folder, a mask of no image, two masks of one.
    """

    def __init__(self, folder: str | Path, images: Sequence[str], max_pixels: int | None = None) -> None:
        self._folder, self._max_pixels = Path(folder), max_pixels
        if not self._folder.is_dir():
            raise ValueError(f"masks: {printable(folder)} is not a folder")
        listing = list_folder(self._folder)
        listing.check(self._folder)
        self._masks: dict[str, str] = {}
        for name in listing.images:
            if (key := split(name)[0]) in self._masks:
                raise ValueError(
                    f"{printable(folder)} has two masks, {self._masks[key]} and {name}: keep one"
                )
            self._masks[key] = name
        strange = sorted(set(self._masks) - {split(name)[0] for name in images})
        if strange:
            names = some([self._masks[key] for key in strange])
            raise ValueError(f"{printable(folder)} has masks of no image: {names}")
        bare = [name for name in images if split(name)[0] not in self._masks]
        if bare:
            say(f"{printable(folder)}: {len(bare)} of {len(images)} images have no mask: {some(bare)}")

    def __getitem__(self, image: str) -> Image.Image | None:
        """Of an image by its name."""
        name = self._masks.get(split(image)[0])
        if name is None:
            return None
        return read_picture(self._folder / name, max_pixels=self._max_pixels).convert("L")

    def describe(self) -> str:
        """A fingerprint of every mask."""
        files = {name: self._folder / name for name in self._masks.values()}
        digests = remembered(f"masks {self._folder.resolve()}", files, lambda name: content(files[name]))
        return fingerprint(sorted(digests.items()))


def fit_mask(mask: Image.Image | None, size: tuple[int, int], latents: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w], from 0 to 255: cut as its image is, then averaged over each latent pixel.

    mask: None for all of it. size: (height, width) of the image. latents: (h, w).
    """
    if mask is None:
        return np.full(latents, 255, np.uint8)
    fitted = fit_image(mask.convert("L"), *size)
    height, width = latents
    return np.asarray(fitted.resize((width, height), Image.Resampling.BOX))


def has_masks(source: Any) -> bool:
    """Whether a source, of any kind, has any."""
    return isinstance(source, Masked) and source.has_masks


def mask_of(source: Any, index: int) -> Image.Image | None:
    """A source's mask of an image, if it has masks."""
    return source.mask(index) if has_masks(source) else None
