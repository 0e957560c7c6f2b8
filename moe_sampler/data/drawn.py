"""Sources made of others: several captions of an image, or the first so many images."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from .masks import has_masks, mask_of
from .samples import CaptionedImage, Source

__all__ = ["Captioned", "DrawnCaptions", "FirstOf"]


@runtime_checkable
class Captioned(Source, Protocol):
    """A source that may have several captions of an image."""

    @property
    def several(self) -> bool:
        """Whether it has."""
        ...

    def captions(self, index: int) -> list[str]:
        """All of them, at least one."""
        ...


class FirstOf:
    """The first `count` images of a source, or all where it has fewer."""

    def __init__(self, source: Source, count: int) -> None:
        self._source, self._count = source, min(count, len(source))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> CaptionedImage:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._source[index]

    @property
    def several(self) -> bool:
        return isinstance(self._source, Captioned) and self._source.several

    def captions(self, index: int) -> list[str]:
        return self._source.captions(index) if isinstance(self._source, Captioned) else [self[index].caption]

    @property
    def has_masks(self) -> bool:
        return has_masks(self._source)

    def mask(self, index: int) -> Image.Image | None:
        return mask_of(self._source, index)

    def describe(self) -> dict[str, Any]:
        return {**self._source.describe(), "count": self._count}


class DrawnCaptions:
    """Every image `per_image` times in a row, each time with another of its captions, in an order drawn from
    the seed and the image's place; where there are no more, they begin anew.

    Args:
        source: whose images these are.
        per_image: how often.
        seed: of the order.
    """

    def __init__(self, source: Source, per_image: int = 1, seed: int = 0) -> None:
        self._source, self._per_image, self._seed = source, per_image, seed

    def __len__(self) -> int:
        return len(self._source) * self._per_image

    def __getitem__(self, index: int) -> CaptionedImage:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image, turn = divmod(index, self._per_image)
        sample = self._source[image]
        captions = self._source.captions(image) if isinstance(self._source, Captioned) else [sample.caption]
        order = np.random.default_rng([self._seed, image]).permutation(len(captions))
        return sample._replace(caption=captions[order[turn % len(captions)]])

    @property
    def has_masks(self) -> bool:
        return has_masks(self._source)

    def mask(self, index: int) -> Image.Image | None:
        return mask_of(self._source, index // self._per_image)

    def describe(self) -> dict[str, Any]:
        drawn = {"captions_per_image": self._per_image, "caption_seed": self._seed}
        return {**self._source.describe(), **drawn}
