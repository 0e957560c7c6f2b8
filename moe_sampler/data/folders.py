"""Images and captions in a folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from .captions import read_caption, report_empty
from .digests import content, fingerprint, remembered
from .listing import METADATA, Listing, list_folder, split
from .metadata import read_metadata
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

    Hidden files and folders, and what file managers leave behind, are no data. Other files are left out, and
    a warning says how many of which kind.

    Args:
        folder: where they are.
        max_pixels: of an image; see `pictures.pixel_limit`.

    Raises:
        ValueError: an image without caption, a caption without image, an image of a format that isn't read,
            tars among the images, or no image at all.
    """

    def __init__(self, folder: str | Path, max_pixels: int | None = None) -> None:
        self.folder, self.max_pixels = Path(folder), max_pixels
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
        self._samples = self._listed(listing) + self._beside(listing)
        empty = [name for name, caption in self._samples if not caption]
        report_empty(empty, len(self._samples), self.folder)
        if listing.others:
            say(f"{printable(self.folder)}: left out {kinds(listing.others)}")

    def _listed(self, listing: Listing) -> list[tuple[str, str]]:
        """Takes what lists name out of the listing: images, and texts beside them."""
        samples: list[tuple[str, str]] = []
        folders = [name.rpartition("/")[0] for name in listing.metadata]
        if len(set(folders)) < len(folders):
            raise ValueError(f"{printable(self.folder)} has {some(listing.metadata)}: keep one of them")
        known = set(listing.images)
        for metadata, folder in zip(listing.metadata, folders, strict=True):
            rows = read_metadata(self.folder / metadata, folder)
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

    def _beside(self, listing: Listing) -> list[tuple[str, str]]:
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
        return [(name, self._caption(captions[split(name)[0]][0])) for name in listing.images]

    def _caption(self, name: str) -> str:
        path = self.folder / name
        return read_caption(path.read_bytes(), str(path))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> CaptionedImage:
        name, caption = self._samples[index]
        return CaptionedImage(name, read_picture(self.folder / name, max_pixels=self.max_pixels), caption)

    def describe(self) -> dict[str, Any]:
        """With a fingerprint of every image's content and caption, in order."""
        files = {name: self.folder / name for name, _ in self._samples}
        digests = remembered(f"folder {self.folder.resolve()}", files, lambda name: content(files[name]))
        rows = [[name, digests[name], text] for name, text in self._samples]
        return {"kind": "folder", "fingerprint": fingerprint(rows)}
