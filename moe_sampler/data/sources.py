"""A source of images and captions from a path or a hub id alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .drawn import Captioned, DrawnCaptions, FirstOf
from .folders import ImageFolder
from .listing import list_folder
from .options import Reading
from .reports import printable
from .samples import Source
from .tables import hub_table, parquet_table
from .tars import TarFiles

__all__ = ["open_source"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def open_source(path: str | Path, max_pixels: int | None = None, **reading: Any) -> Source:
    """`TarFiles` of a .tar or a folder that has some, a table of .parquet files or a folder of them,
    `ImageFolder` of any other folder; a data set of the hub where `path` is none of these and like
    `owner/name`.

    Args:
        path: what to read.
        max_pixels: of an image; see `pictures.pixel_limit`.
        reading: as `Reading` has it.

    Raises:
        ValueError: none of these, or what they raise.
    """
    wanted = Reading(**reading)
    source = _open(Path(path), max_pixels, wanted)
    if wanted.count is not None and len(source) > wanted.count:
        source = FirstOf(source, wanted.count)
    if wanted.captions_per_image == 1 and not (isinstance(source, Captioned) and source.several):
        return source
    return DrawnCaptions(source, wanted.captions_per_image, wanted.seed)


def _open(path: Path, max_pixels: int | None, wanted: Reading) -> Source:
    found = _table(path, max_pixels, wanted)
    if found is not None:
        if wanted.masks is not None:
            raise ValueError("masks: a table has them in a column (mask_field), not in a folder")
        return found
    if others := wanted.of_tables():
        raise ValueError(f"{', '.join(others)}: only for data sets of the hub and parquet files")
    if path.is_dir():
        tars = list_folder(path)
        if not tars.tars or tars.images:
            fields = wanted.caption_fields or ("text",)
            return ImageFolder(path, max_pixels, fields, wanted.masks)
    elif not path.is_file() or path.suffix.lower() != ".tar":
        hint = ", nor a .tar or .parquet: unpack it" if path.exists() else " or a data set like owner/name"
        raise ValueError(f"{printable(path)} is not a folder{hint}")
    if wanted.masks is not None:
        raise ValueError("masks: a folder of them is for a folder of images, not for tars")
    if wanted.caption_fields not in ((), ("text",)):
        raise ValueError('caption_fields: a tar has its captions in .txt files alone, which are "text"')
    return TarFiles(path, max_pixels)


def _table(path: Path, max_pixels: int | None, wanted: Reading) -> Source | None:
    """Where it is one."""
    if not path.exists() and _HUB_ID.fullmatch(str(path)):
        return hub_table(str(path), wanted, max_pixels)
    if path.suffix.lower() == ".parquet" and path.is_file():
        return parquet_table([path], wanted, max_pixels)
    if path.is_dir() and (tables := sorted(path.rglob("*.parquet"))) and not list_folder(path).images:
        return parquet_table(tables, wanted, max_pixels)
    return None
