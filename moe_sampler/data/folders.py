"""Images and captions in a folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .captions import read_caption, report_empty
from .digests import content, fingerprint, remembered
from .listing import METADATA, Listing, list_folder, split
from .masks import MaskFolder
from .metadata import read_metadata
from .options import FILENAME
from .pictures import SUFFIXES, read_picture
from .reports import kinds, printable, say, some
from .samples import CaptionedImage

__all__ = ["ImageFolder"]


class ImageFolder:
    """A folder of images, also in subfolders and linked ones, whose captions are either

    - in `metadata.jsonl` or `metadata.csv`, as `datasets`' ImageFolder reads them: {"file_name": "a.png",
      "text": "a castle"} a line, in the order of its lines, every image in that folder and below named once;
      or
    - beside each image, in a .txt file of the same name up to the last dot; in the order of the names.

    or both, or in other columns of the list, or nowhere but in the images' names, as `caption_fields` says.

    Hidden files and folders, and what file managers leave behind, are no data. Other files are left out, and
    a warning says how many of which kind.

    Args:
        folder: where they are.
        max_pixels: of an image; see `pictures.pixel_limit`.
        caption_fields: columns of the list, "text" also for .txt files, "filename" for the images' names.
            Several are several captions of an image; a row may leave some of them empty.
        masks: a folder with masks of the images, as `MaskFolder`.

    Raises:
        ValueError: an image without caption, a caption without image, an image of a format that isn't read,
            tars among the images, or no image at all.
    """

    def __init__(
        self,
        folder: str | Path,
        max_pixels: int | None = None,
        caption_fields: Sequence[str] = ("text",),
        masks: str | Path | None = None,
    ) -> None:
        self.folder, self.max_pixels = Path(folder), max_pixels
        self._columns = [name for name in caption_fields if name != FILENAME]
        self._named = len(self._columns) < len(caption_fields)
        if not self.folder.is_dir():
            raise ValueError(f"{printable(self.folder)} is not a folder")
        listing = list_folder(self.folder)
        listing.check(self.folder)
        if listing.tars:
            raise ValueError(
                f"{printable(self.folder)} has both images and .tar files ({some(listing.tars)}): keep them "
                "in folders of their own"
                if listing.images
                else f"{printable(self.folder)} has .tar files and no images: use open_source or TarFiles"
            )
        if not listing.images:
            other = Counter(listing.others)
            other[".txt"] = len(listing.texts)
            other += Counter()  # without zeros
            raise ValueError(
                f"{printable(self.folder)} has no images ({', '.join(sorted(SUFFIXES))})"
                + (f", only {kinds(other)}" if other else "")
            )
        if not self._columns:  # names alone: texts are no captions
            listing.others.update(dict.fromkeys([".txt"], len(listing.texts)) if listing.texts else {})
            listing.others.update(split(name)[1] for name in listing.metadata)
            found = [(name, []) for name in listing.images]
        else:
            found = self._listed(listing) + self._beside(listing)
        self._samples = [(name, [text for text in texts if text]) for name, texts in found]
        if self._named:
            for name, texts in self._samples:
                texts.append(_own_name(name))
        names = [name for name, _ in self._samples]
        self._masks = None if masks is None else MaskFolder(masks, names, max_pixels)
        empty = [name for name, captions in self._samples if not captions]
        report_empty(empty, len(self._samples), self.folder)
        if listing.others:
            say(f"{printable(self.folder)}: left out {kinds(listing.others)}")

    def _listed(self, listing: Listing) -> list[tuple[str, list[str]]]:
        """Takes what lists name out of the listing: images, and texts beside them."""
        samples: list[tuple[str, list[str]]] = []
        folders = [name.rpartition("/")[0] for name in listing.metadata]
        if len(set(folders)) < len(folders):
            raise ValueError(f"{printable(self.folder)} has {some(listing.metadata)}: keep one of them")
        known = set(listing.images)
        for metadata, folder in zip(listing.metadata, folders, strict=True):
            rows = read_metadata(self.folder / metadata, folder, self._columns)
            absent = sorted({name for name, _ in rows} - known)
            if absent:
                raise ValueError(
                    f"{printable(self.folder / metadata)} names {some(absent)}, which "
                    f"{printable(self.folder)} doesn't have"
                )
            samples += rows
        counts = Counter(name for name, _ in samples)
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            raise ValueError(
                f"{printable(self.folder)}: {some(listing.metadata)} names {some(twice)} more than once"
            )
        below = [
            name
            for name in listing.images
            if name not in counts and any(not f or name.startswith(f"{f}/") for f in folders)
        ]
        if below:
            raise ValueError(
                f"{printable(self.folder)}: {some(listing.metadata)} doesn't name {some(below)}: add "
                "captions or remove the images"
            )
        listing.images = [name for name in listing.images if name not in counts]
        replaced = {split(name)[0] for name in counts}
        left = [name for name in listing.texts if split(name)[0] in replaced]
        listing.texts = [name for name in listing.texts if split(name)[0] not in replaced]
        if left:
            listing.others[f".txt beside images that {METADATA[0]} or {METADATA[1]} names"] = len(left)
        return samples

    def _beside(self, listing: Listing) -> list[tuple[str, list[str]]]:
        if listing.images and self._columns != ["text"]:
            wanted = ", ".join(self._columns)
            raise ValueError(
                f"{printable(self.folder)}: {some(listing.images)} are in no {METADATA[0]} with {wanted}; "
                'files beside images are "text"'
            )
        captions: dict[str, list[str]] = {}
        for text in listing.texts:
            captions.setdefault(split(text)[0], []).append(text)
        images = Counter(split(name)[0] for name in listing.images)
        bare = [name for name in listing.images if split(name)[0] not in captions]
        if bare:
            raise ValueError(
                f"{some(bare)} in {printable(self.folder)} have no caption: write it to a .txt file of the "
                f"same name, or all captions to {METADATA[0]}"
            )
        if max(images.values(), default=1) > 1:
            shared = [name for name in listing.images if images[split(name)[0]] > 1]
            raise ValueError(
                f"{printable(self.folder)} has images that share a caption file ({some(shared)}): their "
                "names must differ"
            )
        alone = [name for name in listing.texts if split(name)[0] not in images]
        if alone:
            raise ValueError(
                f"{some(alone)} in {printable(self.folder)} have no image: a .txt file is the caption of an "
                "image of the same name; move others away"
            )
        several = [names for names in captions.values() if len(names) > 1]
        if several:
            raise ValueError(f"{printable(self.folder)} has {some(several[0])}: keep one caption an image")
        return [(name, [self._caption(captions[split(name)[0]][0])]) for name in listing.images]

    def _caption(self, name: str) -> str:
        path = self.folder / name
        return read_caption(path.read_bytes(), str(path))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> CaptionedImage:
        name, captions = self._samples[index]
        picture = read_picture(self.folder / name, max_pixels=self.max_pixels)
        return CaptionedImage(name, picture, captions[0] if captions else "")

    @property
    def several(self) -> bool:
        return len(self._columns) + self._named > 1

    def captions(self, index: int) -> list[str]:
        """All of an image, at least one."""
        return self._samples[index][1] or [""]

    @property
    def has_masks(self) -> bool:
        return self._masks is not None

    def mask(self, index: int) -> Image.Image | None:
        """Of an image, None where all of it counts."""
        return None if self._masks is None else self._masks[self._samples[index][0]]

    def describe(self) -> dict[str, Any]:
        """With a fingerprint of every image's content and caption, in order."""
        files = {name: self.folder / name for name, _ in self._samples}
        digests = remembered(f"folder {self.folder.resolve()}", files, lambda name: content(files[name]))
        rows = [
            [name, digests[name], "\n".join(texts) if self.several else "".join(texts)]
            for name, texts in self._samples
        ]
        masks = {} if self._masks is None else {"masks": self._masks.describe()}
        return {"kind": "folder", "fingerprint": fingerprint(rows), **masks}


def _own_name(image: str) -> str:
    """What an image's name says: "a castle at dusk" of "set/a_castle_at_dusk.png"."""
    return split(image.rpartition("/")[2])[0].replace("_", " ").strip()
