"""A cache of the rows that `ExtractFeatures` made, from the parquet files they were written to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_sampler._readers import parse_json
from moe_sampler.tinyflux.features.cache_format import SCHEMA, CacheError, Manifest, checksum
from moe_sampler.tinyflux.features.cache_shards import build_shards
from moe_sampler.tinyflux.features.extract_rows import MADE

__all__ = ["import_rows", "parquet_files"]

_AT_ONCE = 64
"""Rows in memory beside a shard."""


def parquet_files(source: str | Path) -> list[Path]:
    """A parquet file, or a folder's, by name; none where there are none."""
    source = Path(source)
    if source.is_dir():
        return sorted(source.rglob("*.parquet"))
    return [source] if source.suffix.lower() == ".parquet" and source.is_file() else []


def import_rows(source: str | Path, folder: str | Path, *, shard_size: int = 256) -> Manifest:
    """Make a cache of rows of `ExtractFeatures`, in the order in which they lie in the files.

    Args:
        source: a parquet file or a folder of them, as `Dataset.write_parquet` writes them.
        folder: new, empty, or of an import that was interrupted.
        shard_size: samples a shard.

    Raises:
        CacheError: no such files, rows that were made in different ways, or damaged ones.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    rows = _Rows(parquet_files(source), Path(source))
    made = rows.made
    digests = {file.name: checksum(file) for file in rows.files}
    settings = {"source": {"kind": "rows", "sha256": digests}, **made["settings"], "shard_size": shard_size}
    wanted = Manifest(settings, made["encoders"], made["experts"], len(rows), (), made["version"])
    return build_shards(Path(folder), wanted, rows.parts)


class _Rows:
    """Rows of several files as one list, read from the front to the back."""

    def __init__(self, files: Sequence[Path], source: Path) -> None:
        try:
            import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise CacheError('parquet is read by pyarrow: pip install "moe-sampler[datasets]"') from None
        self.files, self._parquet, ways = list(files), parquet, set()
        self._counts = [0] * len(self.files)
        for number, file in enumerate(self.files):
            try:
                opened = parquet.ParquetFile(file)
                if MADE not in opened.schema_arrow.names:
                    raise CacheError(f"{file} has no column {MADE}: ExtractFeatures makes such rows")
                self._counts[number] = opened.metadata.num_rows
                ways |= set(opened.read([MADE]).column(MADE).unique().to_pylist())
            except (OSError, ValueError) as error:
                if isinstance(error, CacheError):
                    raise
                raise CacheError(f"{file} can't be read as parquet: {error}") from None
        if not ways:
            raise CacheError(f"{source} has no rows in .parquet files")
        self.made = self._read(sorted(map(str, ways)), source)
        self._stream: Iterator[Any] = iter(())
        self._next = len(self)

    def __len__(self) -> int:
        return sum(self._counts)

    def _read(self, ways: Sequence[str], source: Path) -> dict[str, Any]:
        found = [parse_json(text, f"{source}: the column {MADE}", CacheError) for text in ways]
        for made in found:
            if not isinstance(made, dict) or made.get("schema") != SCHEMA:
                raise CacheError(f"{source} has rows that this version doesn't read")
        first = found[0]
        for other in found[1:]:
            names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
            raise CacheError(f"{source} has rows made in different ways: they differ in {', '.join(names)}")
        return first

    def parts(self, first: int, length: int) -> Iterator[dict[str, Any]]:
        """Of a shard, as `build_shard` takes them; shards come in order."""
        if first < self._next:
            self._stream, self._next = self._single_rows(first), first
        while self._next < first:
            next(self._stream)
            self._next += 1
        rows = []
        for _ in range(length):
            rows.append(next(self._stream))
            self._next += 1
        names = self.made["shapes"]
        tensors = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in names}
        yield {**tensors, "captions": [row["caption"] for row in rows]}

    def _single_rows(self, first: int) -> Iterator[dict[str, Any]]:
        start = 0
        for file, count in zip(self.files, self._counts, strict=True):
            skipped, start = max(0, first - start), start + count
            if skipped >= count:
                continue
            columns = [*self.made["shapes"], "caption"]
            for batch in self._parquet.ParquetFile(file).iter_batches(_AT_ONCE, columns=columns):
                if skipped >= len(batch):
                    skipped -= len(batch)
                    continue
                arrays = {name: self._array(batch, name, file) for name in self.made["shapes"]}
                captions = batch.column("caption").to_pylist()
                for i in range(skipped, len(batch)):
                    yield {name: array[i] for name, array in arrays.items()} | {"caption": captions[i] or ""}
                skipped = 0

    def _array(self, batch: Any, name: str, file: Path) -> np.ndarray:
        """[rows, ...]: lists within lists, or one list a row, as Ray's tensors are."""
        dtype, *shape = self.made["shapes"][name]
        column = batch.column(name)
        column = getattr(column, "storage", column)
        if column.null_count:
            raise CacheError(f"{file} has rows without {name}")
        while hasattr(column, "flatten") and hasattr(column.type, "value_type"):
            column = column.flatten()
        values = column.to_numpy(zero_copy_only=False)
        if values.size != len(batch) * int(np.prod(shape, dtype=np.int64)):
            raise CacheError(f"{file} holds other shapes of {name} than its column {MADE} says")
        return values.astype(np.dtype(dtype)).reshape(len(batch), *shape)
