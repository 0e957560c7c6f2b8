"""Captions in a list: `metadata.jsonl` or `metadata.csv`, as `datasets`' ImageFolder reads them."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path

from .._readers import parse_json, regular_bytes
from .captions import check_text, read_text
from .reports import printable

__all__ = ["read_metadata"]

MOST_BYTES = 2**31
"""Some ten million captions."""
_LIKE = '{"file_name": "a.png", "text": "..."}'


def read_metadata(path: Path, folder: str, fields: Sequence[str] = ("text",)) -> list[tuple[str, list[str]]]:
    """(image, captions) a line, in order; names are relative to the list's own `folder`.

    fields: where a line has its captions; of several, a line has at least one.

    Raises:
        ValueError: a line without a file's name and a text; it names file and line.
    """
    text = read_text(regular_bytes(path, ValueError, MOST_BYTES), str(path))
    read = _csv_rows if path.suffix == ".csv" else _json_rows
    found = []
    for number, name, captions in read(path, text, fields):
        for caption in captions:
            check_text(caption, f"{path}:{number}")
        # As `datasets` does; Windows writes backslashes.
        normal = posixpath.normpath(posixpath.join(folder, name)).replace("\\", "/")
        found.append((normal, [caption.strip() for caption in captions]))
    return found


def _json_rows(path: Path, text: str, fields: Sequence[str]) -> Iterator[tuple[int, str, list[str]]]:
    like = _LIKE if tuple(fields) == ("text",) else _LIKE.replace("text", fields[0])
    # Not splitlines: JSON may hold other line separators within a text.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, "it", ValueError)
            name = row["file_name"]
            captions = [row[field] for field in fields if len(fields) == 1 or row.get(field) is not None]
            if not isinstance(name, str) or not all(isinstance(caption, str) for caption in captions):
                raise TypeError(f"file_name and {', '.join(fields)} must be strings")
            if not captions:
                raise KeyError(fields[0])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{printable(path)}:{number} must be like {like}: {error!r}") from None
        yield number, name, captions


def _csv_rows(path: Path, text: str, fields: Sequence[str]) -> Iterator[tuple[int, str, list[str]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if not {"file_name", *fields} <= set(reader.fieldnames or ()):
            columns = ", ".join(("file_name", *fields[:-1]))
            raise ValueError(
                f"{printable(path)}:1 must name the columns {columns} and {fields[-1]}, separated by commas, "
                "got "
                f"{', '.join(map(printable, reader.fieldnames or ())) or 'nothing'}"
            )
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{printable(path)}:{reader.line_num} has more or fewer fields than the first line: put "
                    "texts that hold commas in double quotes"
                )
            yield reader.line_num, row["file_name"], [row[field] for field in fields]
    except csv.Error as error:
        raise ValueError(f"{printable(path)}:{reader.line_num} is no CSV: {error}") from None
