"""What lies in a folder or a tar, by what it is to a data set: nothing is left out without a word.

Hidden files and folders, and those that file managers and notebooks leave behind, are no data.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from .pictures import SUFFIXES
from .reports import printable, some

__all__ = ["METADATA", "Listing", "is_hidden", "list_folder", "split"]

METADATA = ("metadata.jsonl", "metadata.csv")
# fmt: off
_UNREAD = frozenset((
    ".heic", ".heif", ".jxl", ".psd", ".svg", ".tga", ".ico", ".eps", ".exr", ".hdr", ".xcf", ".raw", ".dng",
    ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".j2k", ".jpx", ".qoi", ".pcx", ".dds",
))
# fmt: on
"""Pictures of formats that aren't read: an error, since a sample would be missing."""
_LEFT_BEHIND = frozenset(
    ("__macosx", "@eadir", "#recycle", "$recycle.bin", "thumbs.db", "ehthumbs.db", "desktop.ini")
)


@dataclass
class Listing:
    """Names by kind, in order, relative to the folder; `others` counts the rest by suffix."""

    images: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, regular: bool = True) -> None:
        base = name.rpartition("/")[2]
        suffix = split(base)[1]
        found = (
            self.images if suffix in SUFFIXES
            else self.texts if suffix == ".txt"
            else self.tars if suffix == ".tar"
            else self.unread if suffix in _UNREAD
            else self.metadata if base in METADATA
            else None
        )  # fmt: skip
        if found is None:
            self.others[kind_of(base)] += 1
        elif regular:
            found.append(name)
        else:
            self.broken.append(name)

    def check(self, where: object) -> None:
        """Raise ValueError for pictures that can't be read."""
        if self.unread:
            raise ValueError(
                f"{printable(where)} has pictures of formats that aren't read ({some(self.unread)}): make "
                "PNG or JPEG files of them, or move them away"
            )
        if self.broken:
            raise ValueError(
                f"{printable(where)}: {some(self.broken)} can't be read: no file, or a link to nothing"
            )


def split(name: str) -> tuple[str, str]:
    """("a/2021.05.01", ".jpg") of "a/2021.05.01.JPG": the last dot of the base name counts."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    return (folder + slash + stem, "." + suffix.lower()) if dot and stem else (name, "")


def kind_of(base: str) -> str:
    """A suffix, or the whole name of a file that has none; archives keep theirs together (.tar.gz)."""
    stem, suffix = split(base)
    inner = split(stem)[1]
    return f"{inner}{suffix}" if inner == ".tar" else suffix or base


def is_hidden(name: str) -> bool:
    """Whether a relative path's files are no data, by any of its parts."""
    parts = PurePosixPath(name).parts
    return any((p.startswith(".") and p != "..") or p.lower() in _LEFT_BEHIND for p in parts)


def list_folder(folder: Path) -> Listing:
    """All of a folder and its subfolders, linked ones too; a link to where one already is isn't followed.

    Raises:
        OSError: a folder that can't be read.
    """
    listing = Listing()
    real = folder.resolve()
    for name, regular in _walk(folder, "", frozenset(map(_identity, (real, *real.parents)))):
        listing.add(name, regular)
    for names in (listing.images, listing.texts, listing.metadata, listing.tars, listing.unread):
        names.sort()
    return listing


def _walk(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, bool]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if not entry.is_dir():
                yield prefix + entry.name, entry.is_file()
                continue
            identity = _identity(Path(entry.path))
            if identity not in above:
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", above | {identity})


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
