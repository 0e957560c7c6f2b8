"""Images and captions in tables: data sets of the Hugging Face hub, and parquet files.

They are read by `datasets`; pictures are decoded here, as those of any other source.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .captions import check_text, report_empty
from .cells import CAPTIONS, IMAGES, cell_picture
from .digests import content, fingerprint, remembered
from .options import Reading
from .reports import printable
from .samples import CaptionedImage

__all__ = ["TableRows", "hub_table", "parquet_table"]

_KEPT = 256
_COMMIT = re.compile("[0-9a-f]{40}")


def hub_table(name: str, reading: Reading, max_pixels: int | None = None) -> TableRows:
    """A data set `owner/name` of the hub, at one commit, which its description names.

    Raises:
        ValueError: `datasets` isn't installed, no such data set, split or subset, or columns that aren't
            there.
    """
    datasets = _datasets()
    try:
        revision = reading.revision
        if revision is None or not _COMMIT.fullmatch(revision):
            from huggingface_hub import HfApi

            revision = HfApi().dataset_info(name, revision=revision).sha
        data = datasets.load_dataset(
            name, reading.subset, split=reading.split, revision=revision, streaming=reading.streaming
        )
    except Exception as error:  # the hub's, the network's and those of scripts that read the files
        raise ValueError(f"there is no folder {name}, and no data set can be read: {_line(error)}") from None
    about = {
        "kind": "hub",
        "name": name,
        "revision": revision,
        "subset": reading.subset,
        "split": reading.split,
    }
    return TableRows(data, name, about, reading, max_pixels)


def parquet_table(files: Sequence[Path], reading: Reading, max_pixels: int | None = None) -> TableRows:
    """Parquet files, one after the other.

    Raises:
        ValueError: `datasets` isn't installed, damaged files, or columns that aren't there.
    """
    datasets = _datasets()
    where = printable(files[0] if len(files) == 1 else files[0].parent)
    try:
        data = datasets.load_dataset(
            "parquet", data_files=[str(file) for file in files], split="train", streaming=reading.streaming
        )
    except Exception as error:
        raise ValueError(f"{where} can't be read as parquet: {_line(error)}") from None
    own = {str(number): file for number, file in enumerate(files)}
    owner = "parquet " + "\n".join(str(file.resolve()) for file in files)
    digests = remembered(owner, own, lambda number: content(own[number]))
    about = {"kind": "parquet", "fingerprint": fingerprint([*digests.values()])}
    rows = _parquet_rows(files) if reading.streaming else None
    return TableRows(data, where, about, reading, max_pixels, rows)


class TableRows:
    """The rows of a `datasets.Dataset` or `IterableDataset` as captioned images.

    A column of images holds pictures, files' bytes, or both as `datasets` has them; a caption's column holds
    a text, or a list of texts. What is streamed is read in order; to go back, or far ahead, begins anew.

    Args:
        data: the data set.
        name: what errors call it.
        about: plain values that say which data these are.
        reading: columns and count.
        max_pixels: of an image; see `pictures.pixel_limit`.
        length: of streamed data that don't know it.

    Raises:
        ValueError: columns that aren't there or can't be told, streamed data of unknown length without a
            count.
    """

    def __init__(
        self,
        data: Any,
        name: str,
        about: Mapping[str, Any],
        reading: Reading | None = None,
        max_pixels: int | None = None,
        length: int | None = None,
    ) -> None:
        reading = Reading() if reading is None else reading
        self._name, self._max_pixels = name, max_pixels
        self._streamed = not hasattr(data, "__len__")
        columns = self._columns(data)
        self.image = self._image_column(columns, reading.image_field)
        self.fields = self._caption_columns(columns, reading.caption_fields)
        self.masks = None if reading.mask_field is None else self._there(columns, reading.mask_field)
        for column in filter(None, (self.image, self.masks)):
            if type(columns[column]).__name__ == "Image":
                data = data.cast_column(column, _datasets().Image(decode=False))
        self._data = data
        self.several = len(self.fields) > 1 or any(_is_list(columns[name]) for name in self.fields)
        self._length = self._count(data, reading, length)
        self._about = {**about, "image": self.image, "captions": list(self.fields)}
        if self.masks is not None:
            self._about["masks"] = self.masks
        if reading.count is not None:
            self._about["count"] = self._length
        self._lock, self._next, self._rows = threading.Lock(), 0, iter(())
        self._kept: OrderedDict[int, Any] = OrderedDict()
        if not self._streamed:
            texts = data.select_columns(list(self.fields))
            empty = [f"row {i}" for i in range(self._length) if not any(self._texts(texts[i], i))]
            report_empty(empty, self._length, name)

    def _columns(self, data: Any) -> dict[str, Any]:
        features = data.features
        if features is None:  # streamed, and nothing says them
            row = next(iter(data), None)
            features = {} if row is None else dict.fromkeys(row)
        return dict(features)

    def _image_column(self, columns: Mapping[str, Any], wanted: str | None) -> str:
        if wanted is not None:
            return self._there(columns, wanted)
        typed = [name for name, kind in columns.items() if type(kind).__name__ == "Image"]
        usual = [name for name in IMAGES if name in columns]
        if len(typed) == 1 or (not typed and usual):
            return (typed or usual)[0]
        raise ValueError(
            f"{self._name} has {len(typed)} columns of images among {', '.join(columns)}: name one by "
            "image_field"
        )

    def _caption_columns(self, columns: Mapping[str, Any], wanted: Sequence[str]) -> tuple[str, ...]:
        if wanted:
            return tuple(self._there(columns, name) for name in wanted)
        usual = [name for name in CAPTIONS if name in columns]
        if not usual:
            raise ValueError(
                f"{self._name} has no column {' or '.join(CAPTIONS)}, only {', '.join(columns)}: name those "
                "of captions by caption_fields"
            )
        return (usual[0],)

    def _there(self, columns: Mapping[str, Any], name: str) -> str:
        if name not in columns:
            raise ValueError(f"{self._name} has no column {name}, only {', '.join(columns)}")
        return name

    def _count(self, data: Any, reading: Reading, length: int | None) -> int:
        if not self._streamed:
            length = len(data)
        elif length is None:
            splits = getattr(data.info, "splits", None) or {}
            length = getattr(splits.get(reading.split), "num_examples", None) or None
        if length is None and reading.count is None:
            raise ValueError(f"{self._name} doesn't say how many rows it has: give count")
        known = [number for number in (length, reading.count) if number is not None]
        if not min(known):
            raise ValueError(f"{self._name} has no rows")
        return min(known)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> CaptionedImage:
        if not 0 <= index < self._length:
            raise IndexError(index)
        row = self._row(index)
        key = f"{self._name}, row {index}"
        return CaptionedImage(key, self._picture(row, self.image, key), self._texts(row, index)[0])

    @property
    def has_masks(self) -> bool:
        return self.masks is not None

    def mask(self, index: int) -> Image.Image | None:
        """Of a row, None where it has none: all of the image counts."""
        row = self._row(index)
        if self.masks is None or row[self.masks] is None:
            return None
        return self._picture(row, self.masks, f"{self._name}, row {index}").convert("L")

    def captions(self, index: int) -> list[str]:
        """All of a row, at least one."""
        return self._texts(self._row(index), index)

    def describe(self) -> dict[str, Any]:
        return dict(self._about)

    def _row(self, index: int) -> Mapping[str, Any]:
        if not self._streamed:
            return self._data[index]
        with self._lock:
            if index not in self._kept:
                if index < self._next or index - self._next > _KEPT or not self._next:
                    self._rows, self._next = iter(self._data.skip(index) if index else self._data), index
                while self._next <= index:
                    row = next(self._rows, None)
                    if row is None:
                        raise ValueError(f"{self._name} ends before row {self._next}: give a smaller count")
                    self._kept[self._next] = row
                    self._next += 1
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            return self._kept[index]

    def _texts(self, row: Mapping[str, Any], index: int) -> list[str]:
        found: list[str] = []
        for field in self.fields:
            value = row[field]
            texts = [] if value is None else [value] if isinstance(value, str) else value
            if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{self._name}, row {index}: {field} holds no text and no list of texts")
            found += [check_text(text, f"{self._name}, row {index}").strip() for text in texts]
        return [text for text in found if text] or [""]

    def _picture(self, row: Mapping[str, Any], column: str, key: str) -> Image.Image:
        return cell_picture(row[column], f"{key}: {column}", self._max_pixels)


def _datasets() -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError('tables are read by datasets: pip install "moe-sampler[datasets]"') from None
    return datasets


def _is_list(feature: Any) -> bool:
    """Of a column, or of what a first row has there."""
    return isinstance(feature, list) or type(feature).__name__ in ("List", "LargeList", "Sequence")


def _parquet_rows(files: Sequence[Path]) -> int:
    import pyarrow.parquet  # pyright: ignore[reportMissingImports]

    return sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)


def _line(error: Exception) -> str:
    return printable(" ".join(str(error).split())[:300] or type(error).__name__)
