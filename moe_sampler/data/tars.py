"""Images and captions in WebDataset's tars."""

from __future__ import annotations

import hashlib
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .captions import read_caption, report_empty
from .digests import fingerprint, remembered
from .listing import Listing, is_hidden, list_folder, split
from .pictures import read_picture
from .reports import kinds, printable, say, some
from .samples import CaptionedImage

__all__ = ["TarFiles"]

_BLOCK = 512


class _Place(NamedTuple):
    """Where a member's bytes are in its tar."""

    offset: int
    size: int


class _Sample(NamedTuple):
    """tar: which of the files. image: the member's name."""

    tar: int
    key: str
    image: str
    place: _Place
    caption: str


class TarFiles:
    """WebDataset tars, uncompressed. A sample is an image and a .txt caption of one name, KEY.jpg and
    KEY.txt; KEY may have dots of its own, as in a folder that became a tar.

    By WebDataset's convention files of one name up to its *first* dot belong together, so images with further
    words in their suffix (KEY.seg.png) are companions of a sample KEY. They are left out, as other files are,
    and a warning says how many of which kind. Hidden files and folders are no data.

    Args:
        tars: the files, or a folder of `.tar` files, also in subfolders, read in the order of their names.
        max_pixels: of an image; see `pictures.pixel_limit`.

    Raises:
        ValueError: no tars, damaged ones or such as end early, an image without caption, a caption without
            image, or an image of a format that isn't read.
    """

    def __init__(self, tars: str | Path | Sequence[str | Path], max_pixels: int | None = None) -> None:
        self.max_pixels = max_pixels
        others: Counter[str] = Counter()
        if isinstance(tars, (str, Path)):
            path = Path(tars)
            self.tars = self._in_folder(path, others) if path.is_dir() else [path]
        else:
            self.tars = [Path(tar) for tar in tars]
        if not self.tars:
            raise ValueError(
                f"{printable(tars)} has no .tar files" + (f", only {kinds(others)}" * bool(others))
            )
        self._samples = [sample for i, tar in enumerate(self.tars) for sample in _samples(i, tar, others)]
        named = some(self.tars)
        if not self._samples:
            raise ValueError(f"{named}: no samples in there" + (f", only {kinds(others)}" * bool(others)))
        report_empty([s.key for s in self._samples if not s.caption], len(self._samples), named)
        if others:
            say(f"{named}: left out {kinds(others)}")

    @staticmethod
    def _in_folder(folder: Path, others: Counter[str]) -> list[Path]:
        listing = list_folder(folder)
        listing.check(folder)
        if listing.images:
            raise ValueError(
                f"{printable(folder)} has both images and .tar files ({some(listing.images)}): keep them in "
                "folders of their own"
            )
        packed = [kind for kind in listing.others if kind.startswith((".tar.", ".tgz", ".zip"))]
        if packed:
            raise ValueError(f"{printable(folder)} has archives of {some(packed)}: unpack them to .tar files")
        others += listing.others
        others += Counter({".txt": len(listing.texts), "metadata": len(listing.metadata)})
        return [folder / name for name in listing.tars]

    def __len__(self) -> int:
        return len(self._samples)

    def _read(self, sample: _Sample) -> bytes:
        with open(self.tars[sample.tar], "rb") as file:
            return _read(file, sample.place, f"{self.tars[sample.tar]}: {sample.image}")

    def __getitem__(self, index: int) -> CaptionedImage:
        sample = self._samples[index]
        name = f"{self.tars[sample.tar]}: {sample.image}"
        return CaptionedImage(
            sample.key, read_picture(self._read(sample), name, self.max_pixels), sample.caption
        )

    def describe(self) -> dict[str, Any]:
        """With a fingerprint of every image's content and caption, in order."""
        files = {str(i): tar for i, tar in enumerate(self.tars)}
        samples: dict[str, list[_Sample]] = {name: [] for name in files}
        for sample in self._samples:
            samples[str(sample.tar)].append(sample)
        owner = "tars " + "\n".join(str(tar.resolve()) for tar in self.tars)
        digests = remembered(owner, files, lambda name: _digest(files[name], samples[name]))
        return {"kind": "webdataset", "fingerprint": fingerprint([list(digests.values())])}


def _digest(tar: Path, samples: list[_Sample]) -> str:
    rows = []
    with open(tar, "rb") as file:
        for sample in samples:
            image = _read(file, sample.place, f"{tar}: {sample.image}")
            rows.append([sample.key, hashlib.sha256(image).hexdigest(), sample.caption])
    return fingerprint(rows)


def _read(file: BinaryIO, place: _Place, name: str) -> bytes:
    file.seek(place.offset)
    data = file.read(place.size)
    if len(data) < place.size:
        raise ValueError(f"{printable(name)} is cut off: the tar has changed since it was opened")
    return data


def _samples(number: int, tar: Path, others: Counter[str]) -> Iterator[_Sample]:
    """Those of one tar, in its order; what is left out is added to `others`."""
    listing, places = Listing(), _places(tar, others)
    for name, place in places.items():
        listing.add(name, place is not None)
    listing.check(tar)
    found = {name: place for name, place in places.items() if place is not None}
    others += listing.others
    others += Counter({".tar": len(listing.tars), "metadata": len(listing.metadata)})
    groups: dict[str, tuple[list[str], list[str]]] = {}
    images, texts = set(listing.images), set(listing.texts)
    for name in places:
        if name in images or name in texts:
            groups.setdefault(split(name)[0], ([], []))[name in texts].append(name)
    whole = {key for key, (pictures, captions) in groups.items() if len(pictures) == len(captions) == 1}
    for key, (pictures, captions) in sorted(groups.items()):
        if key in whole:
            continue
        first = _first_dot(key)
        if first == key or first not in whole:
            raise ValueError(
                f"{printable(tar)}: {printable(key)} has {len(pictures)} images and {len(captions)} .txt "
                "captions; a sample has one of each, of the same name"
            )
        for name in pictures + captions:
            others[name[len(first) :].lower()] += 1
    with open(tar, "rb") as file:
        for key in filter(whole.__contains__, groups):
            (image,), (text,) = groups[key]
            caption = read_caption(_read(file, found[text], f"{tar}: {text}"), f"{tar}: {text}")
            yield _Sample(number, key, image, found[image], caption)


def _first_dot(key: str) -> str:
    folder, slash, base = key.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _places(tar: Path, others: Counter[str]) -> dict[str, _Place | None]:
    """Where each file's bytes are, in the tar's order; None for a link to what isn't there.

    Raises:
        ValueError: no uncompressed tar, a damaged one, one that ends early, or a file that is in it twice.
    """
    found: dict[str, _Place | None] = {}
    links: dict[str, str] = {}
    twice: list[str] = []
    for member in _headers(tar):
        name = posixpath.normpath(member.name)
        if is_hidden(name) or member.isdir():
            continue
        if name in found:
            twice.append(name)
        if member.isreg():
            found[name] = _Place(member.offset_data, member.size)
        elif member.islnk() or member.issym():
            found[name] = None
            beside = posixpath.dirname(name) if member.issym() else ""
            links[name] = posixpath.normpath(posixpath.join(beside, member.linkname))
        else:
            others["neither file nor link"] += 1
    if twice:
        raise ValueError(f"{printable(tar)} has {some(twice)} more than once: make it anew")
    for name, target in links.items():
        passed = {name}
        while target in links and target not in passed:
            passed.add(target)
            target = links[target]
        found[name] = found.get(target)
    return found


def _headers(tar: Path) -> list[tarfile.TarInfo]:
    try:
        with open(tar, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            size = os.fstat(file.fileno()).st_size
            for member in archive:
                if member.issparse():
                    raise tarfile.ReadError(f"{member.name} is stored sparse: make it without --sparse")
                if member.isreg() and not 0 <= member.size <= size - member.offset_data:
                    raise tarfile.ReadError(f"it ends early: {member.name} is cut off")
            _check_end(file, archive.offset)
            return archive.getmembers()
    except Exception as error:  # tarfile raises almost anything on damaged headers
        reason = printable(" ".join(str(error).split()) or type(error).__name__)
        raise ValueError(f"{printable(tar)} cannot be read as an uncompressed tar: {reason}") from None


def _check_end(file: BinaryIO, offset: int) -> None:
    """tarfile takes what it can't read for the end."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise tarfile.ReadError("it ends early, without the two empty blocks that end a tar")
    if any(block):
        raise tarfile.ReadError(f"the header at byte {offset} is damaged")
    while block := file.read(1 << 20):
        if any(block.strip(b"\0")):
            raise tarfile.ReadError(
                f"more follows its end at byte {offset}: join tars by `tar --concatenate`, not by `cat`"
            )
