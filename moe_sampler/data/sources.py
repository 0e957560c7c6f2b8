"""A source of images and captions from a path alone."""

from __future__ import annotations

from pathlib import Path

from .folders import ImageFolder
from .listing import list_folder
from .reports import printable
from .samples import Source
from .tars import TarFiles

__all__ = ["open_source"]


def open_source(path: str | Path, max_pixels: int | None = None) -> Source:
    """`TarFiles` of a .tar or a folder that has some, `ImageFolder` of any other folder.

    Raises:
        ValueError: neither, or what the two raise.
    """
    path = Path(path)
    if path.is_dir():
        tars = list_folder(path)
        return TarFiles(path, max_pixels) if tars.tars and not tars.images else ImageFolder(path, max_pixels)
    if path.is_file() and path.suffix.lower() == ".tar":
        return TarFiles(path, max_pixels)
    raise ValueError(
        f"{printable(path)} is not a folder" + (", nor a .tar: unpack it" if path.exists() else "")
    )
