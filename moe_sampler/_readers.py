"""Reading what strangers wrote: the right value, or one error of one line that names the file.

Every JSON and TOML file of this package is read here. Files that aren't files, too large, or too deep are
refused before anything is made of them; `typed` builds dataclasses of exactly the types they declare.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import CheckpointError

__all__ = [
    "check_regular",
    "parse_json",
    "read_json",
    "read_regular",
    "read_toml",
    "regular_bytes",
    "typed",
]

T = TypeVar("T")

MOST_BYTES = 64 * 2**20
_DEEPEST = 64


def read_regular(path: Path, error: type[ValueError] = CheckpointError, most: int = MOST_BYTES) -> str:
    """A file's text, UTF-8.

    Raises:
        error: as `regular_bytes`, or it is no UTF-8.
    """
    try:
        return regular_bytes(path, error, most).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{path} cannot be read: it is no UTF-8 ({problem.reason})") from None


def regular_bytes(path: Path, error: type[ValueError] = CheckpointError, most: int = MOST_BYTES) -> bytes:
    """What is in a file. A pipe or device isn't waited for.

    Raises:
        error: it isn't there, is no regular file, or is larger than `most` bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise error(f"{path} cannot be read: it is not a regular file")
        with os.fdopen(descriptor, "rb") as file:
            if status.st_size > most:
                raise error(f"{path} cannot be read: its {status.st_size:,} bytes are more than {most:,}")
            return file.read(most + 1)
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
        if isinstance(problem, error):
            raise
        raise error(f"{path} cannot be read: {getattr(problem, 'strerror', None) or problem}") from None


def check_regular(path: Path, error: type[ValueError] = CheckpointError) -> None:
    """Raise `error` unless a library may open it and read on: a pipe would keep it waiting."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return
        reason = "it is not a regular file"
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
    raise error(f"{path} cannot be read: {reason}")


def parse_json(text: str, where: object, error: type[ValueError] = CheckpointError) -> Any:
    """What a JSON text says. where: what the error names."""
    try:
        value = json.loads(text)
    except ValueError as problem:
        raise error(f"{where} is damaged: no JSON ({problem})") from None
    except RecursionError:
        raise error(f"{where} is damaged: nested more than {_DEEPEST} deep") from None
    _check_depth(value, where, error)
    return value


def _check_depth(value: Any, where: object, error: type[ValueError]) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise error(f"{where} is damaged: nested more than {_DEEPEST} deep")


def read_json(
    path: Path, error: type[ValueError] = CheckpointError, most: int = MOST_BYTES
) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        error: as `read_regular`; it is no JSON, or no object.
    """
    value = parse_json(read_regular(path, error, most), path, error)
    if not isinstance(value, dict):
        raise error(f"{path} is damaged: it holds no JSON object")
    return value


def read_toml(path: Path, error: type[ValueError] = CheckpointError) -> dict[str, Any]:
    """The tables of a TOML file."""
    text = read_regular(path, error, 2**20)
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is not TOML: {str(problem) or 'nested too deep'}") from None
    _check_depth(tables, path, error)
    return tables


def typed(cls: type[T], value: Any, where: str, **defaults: Any) -> T:
    """A dataclass from a JSON object: every key known, every value of its declared type and finite.

    Args:
        cls: a dataclass of str, bool, int, float, None, Any, dicts, lists, tuples and other dataclasses.
        value: from `parse_json`.
        where: what the error names, such as "steps[3].level".
        defaults: for keys that may be missing though the dataclass has no default.

    Raises:
        TypeError: it says where, what was wanted and what is there.
        ValueError: what the dataclass itself refuses.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{where} must be an object, got {_shown(value)}")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    unknown = [key for key in value if key not in fields]
    if unknown:
        raise TypeError(f"{where} has no {_shown(unknown[0])}")
    given = {**defaults, **value}
    for name, field in fields.items():
        none = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if none and name not in given:
            raise TypeError(f"{where}.{name} is missing")
    return cls(**{name: _value(hints[name], each, f"{where}.{name}") for name, each in given.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else typed(hint, value, where)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value in inner:
            return value
        raise TypeError(f"{where} must be one of {', '.join(map(str, inner))}, got {_shown(value)}")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _value(next(each for each in inner if each is not type(None)), value, where)
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        return origin(_value(inner[0], each, f"{where}[{i}]") for i, each in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _value(inner[1], each, f"{where}.{key}") for key, each in value.items()}
    plain = origin or hint
    if plain is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if abs(value) <= 1e300 and math.isfinite(value):
            return value
    elif plain is int and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) < 2**63:
            return value
    elif plain in (str, bool, dict, list) and isinstance(value, plain):
        return value
    raise TypeError(f"{where} must be a {getattr(plain, '__name__', plain)}, got {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
