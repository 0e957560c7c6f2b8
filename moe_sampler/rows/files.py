"""A file of rows, a prompt each: text, JSON, CSV or parquet. What a row means is read elsewhere."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._readers import check_regular, parse_json, regular_bytes
from ..data.captions import read_text
from ..data.reports import printable
from ..errors import first_line
from ..pipelines.choices import any_of

__all__ = ["KINDS", "Row", "read_rows"]

KINDS = (".txt", ".jsonl", ".csv", ".parquet")
_MOST_BYTES = 2**31


@dataclass(frozen=True)
class Row:
    """A row as it stands in its file.

    Args:
        number: from 1, without headings and empty lines.
        place: what errors call it.
        cells: by column; what is empty isn't there.
        problem: why it can't be read, if it can't.
    """

    number: int
    place: str
    cells: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """(Rows in order, the columns that any of them has). Rows that can't be read have a `problem`.

    path: .txt, a prompt a line; .jsonl, an object a line; .csv with a heading; or .parquet.

    Raises:
        ValueError: a file of another kind, that isn't there or can't be read at all, or without a row.
    """
    suffix = path.suffix.lower()
    if suffix not in KINDS:
        raise ValueError(f"{printable(path)}: prompts are read from {any_of(KINDS)} files")
    if suffix == ".parquet":
        named, found = _parquet_rows(path)
    else:
        text = read_text(regular_bytes(path, ValueError, _MOST_BYTES), str(path))
        named, found = {".txt": _lines, ".jsonl": _objects, ".csv": _records}[suffix](path, text)
    rows = [
        Row(number, f"{printable(path.name)}{where}", {}, value)
        if isinstance(value, str)
        else Row(number, f"{printable(path.name)}{where}", _filled(value))
        for number, (where, value) in enumerate(found, 1)
    ]
    if not rows:
        raise ValueError(f"{printable(path)} has no rows")
    return rows, list(dict.fromkeys([*named, *(name for row in rows for name in row.cells)]))


_Found = tuple[list[str], Iterator[tuple[str, dict[str, Any] | str]]]
"""Columns known beforehand; and of every row, where it stands and its cells, or why it has none."""


def _filled(cells: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in cells.items() if not _is_empty(value)}


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _lines(_: Path, text: str) -> _Found:
    lines = ((f":{n}", line.strip()) for n, line in enumerate(text.split("\n"), 1))
    return ["prompt"], ((where, {"prompt": line}) for where, line in lines if line)


def _objects(_: Path, text: str) -> _Found:
    def rows() -> Iterator[tuple[str, dict[str, Any] | str]]:
        # Not splitlines: JSON may hold other line separators within a text.
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                value = parse_json(line, "the line", ValueError)
            except ValueError as error:
                yield f":{number}", first_line(error)
                continue
            yield f":{number}", value if isinstance(value, dict) else "the line holds no JSON object"

    return [], rows()


def _records(path: Path, text: str) -> _Found:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or ())
    except csv.Error as error:
        raise ValueError(f"{printable(path)}:1 is no CSV: {error}") from None
    twice = [name for name in columns if columns.count(name) > 1]
    if twice:
        raise ValueError(f'{printable(path)} has two columns "{printable(twice[0])}"')

    def rows() -> Iterator[tuple[str, dict[str, Any] | str]]:
        try:
            for row in reader:
                where = f":{reader.line_num}"
                if None in row or None in row.values():
                    yield where, "more or fewer fields than the first line: quote texts that hold commas"
                else:
                    yield where, row
        except csv.Error as error:
            raise ValueError(f"{printable(path)}:{reader.line_num} is no CSV: {error}") from None

    return columns, rows()


def _parquet_rows(path: Path) -> _Found:
    try:
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError('parquet files are read by pyarrow: pip install "moe-sampler[datasets]"') from None
    check_regular(path, ValueError)
    try:
        # ParquetFile, as read_table would look for a data set of several files.
        table = pyarrow.parquet.ParquetFile(path).read()
    except Exception as error:  # Arrow's own errors, of damaged files almost any
        raise ValueError(f"{printable(path)} cannot be read as parquet: {first_line(error)}") from None
    return table.column_names, ((f", row {n}", row) for n, row in enumerate(table.to_pylist(), 1))
