"""Captions in a list: `metadata.jsonl` or `metadata.csv`, as `datasets`' ImageFolder reads them."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterator
from pathlib import Path

from .._readers import parse_json, regular_bytes
from .captions import check_text, read_text
from .reports import printable

__all__ = ["read_metadata"]

MOST_BYTES = 2**31
"""Some ten million captions."""
_LIKE = '{"file_name": "a.png", "text": "..."}'


def read_metadata(path: Path, folder: str) -> list[tuple[str, str]]:
    """(image, caption) a line, in order; names are relative to the list's own `folder`.

    Raises:
        ValueError: a line without a file's name and a text; it names file and line.
    """
    text = read_text(regular_bytes(path, ValueError, MOST_BYTES), str(path))
    rows = _csv_rows(path, text) if path.suffix == ".csv" else _json_rows(path, text)
    found = []
    for number, name, caption in rows:
        check_text(caption, f"{path}:{number}")
        # As `datasets` does; Windows writes backslashes.
        normal = posixpath.normpath(posixpath.join(folder, name)).replace("\\", "/")
        found.append((normal, caption.strip()))
    return found


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, str, str]]:
    # Not splitlines: JSON may hold other line separators within a text.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, "it", ValueError)
            name, caption = row["file_name"], row["text"]
            if not isinstance(name, str) or not isinstance(caption, str):
                raise TypeError("file_name and text must be strings")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{printable(path)}:{number} must be like {_LIKE}: {error!r}") from None
        yield number, name, caption


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, str, str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if not {"file_name", "text"} <= set(reader.fieldnames or ()):
            raise ValueError(
                f"{printable(path)}:1 must name the columns file_name and text, separated by commas, got "
                f"{', '.join(map(printable, reader.fieldnames or ())) or 'nothing'}"
            )
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{printable(path)}:{reader.line_num} has more or fewer fields than the first line: put "
                    "texts that hold commas in double quotes"
                )
            yield reader.line_num, row["file_name"], row["text"]
    except csv.Error as error:
        raise ValueError(f"{printable(path)}:{reader.line_num} is no CSV: {error}") from None
