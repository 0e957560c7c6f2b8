"""How a source is read, beyond where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["FILENAME", "Reading"]

FILENAME = "filename"
"""As a caption's field: the image's name, `a_castle_at_dusk.png`, without suffix and underscores."""


@dataclass(frozen=True)
class Reading:
    """What to read of a source.

    Args:
        caption_fields: where captions stand: columns of a table or of a folder's metadata list, "text" for
            .txt files beside images, "filename" for the images' names. Several are several captions of an
            image. By default what the kind of source usually has.
        captions_per_image: samples made of each image, each with another of its captions as long as there
            are any; which, and in what order, is drawn from `seed`.
        masks: folder of masks of a folder's images, by their names.
        mask_field: column of a table's masks.
        image_field: of a table; by default its only column of images.
        split, subset, revision: of a data set on the hub.
        streaming: read a data set as it comes, without keeping a copy of it on the disk.
        count: the first so many images; all by default.
        seed: of the captions drawn.
    """

    caption_fields: tuple[str, ...] = ()
    captions_per_image: int = 1
    masks: Path | None = None
    mask_field: str | None = None
    image_field: str | None = None
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    streaming: bool = False
    count: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("captions_per_image", self.captions_per_image), ("count", self.count)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def of_tables(self) -> list[str]:
        """What is set that only tables have."""
        changed = {
            "image_field": self.image_field,
            "mask_field": self.mask_field,
            "split": None if self.split == "train" else self.split,
            "subset": self.subset,
            "revision": self.revision,
            "streaming": self.streaming or None,
        }
        return [name for name, value in changed.items() if value is not None]
