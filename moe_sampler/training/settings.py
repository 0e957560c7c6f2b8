"""Settings of a training run: frozen dataclasses, filled from TOML tables and flags.

A field is `name: Annotated[type, "what it does"] = default`. Groups are dataclasses whose fields are
dataclasses, each a table of the TOML file.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .. import _readers

__all__ = ["SettingsError", "flat", "from_tables", "help_of", "nearest", "read_toml", "to_tables"]

T = TypeVar("T")


class SettingsError(ValueError):
    """A setting that doesn't exist, is missing, or has a value it can't have; the message names it."""


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file."""
    return _readers.read_toml(Path(path), SettingsError)


def help_of(cls: type) -> dict[str, tuple[Any, str]]:
    """(type, what it does) of every field."""
    found = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        text = hint.__metadata__[0] if get_origin(hint) is Annotated else ""
        found[name] = (get_args(hint)[0] if get_origin(hint) is Annotated else hint, text)
    return found


def from_tables(cls: type[T], tables: Mapping[str, Any], where: str = "") -> T:
    """A settings object from nested tables.

    Raises:
        SettingsError: unknown names (with the nearest known one), missing ones, values of another type, or
            what the dataclass itself refuses.
    """
    fields = help_of(cls)
    for name in tables:
        if name not in fields:
            raise SettingsError(f"there is no setting {_place(where, name)}{nearest(name, fields)}")
    values = {name: _value(fields[name][0], value, _place(where, name)) for name, value in tables.items()}
    missing = [
        _place(where, field.name)
        for field in dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise SettingsError(f"give {', '.join(missing)}")
    try:
        return cls(**values)
    except ValueError as error:
        raise SettingsError(f"{where}: {error}" if where else str(error)) from None


def to_tables(settings: Any) -> dict[str, Any]:
    """Nested plain values; what is None is left out, as TOML has no such value."""
    found = {}
    for field in dataclasses.fields(settings):
        value = _plain(getattr(settings, field.name))
        if value is not None:
            found[field.name] = value
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_tables(value)
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with names like `table.name`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?`, or nothing where no known name is like it."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def _place(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _value(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if not isinstance(value, Mapping):
            raise SettingsError(f"{where} is a table of settings, got {value!r}")
        return from_tables(kind, value, where)
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        options = [option for option in get_args(kind) if option is not type(None)]
        if value is None and len(options) < len(get_args(kind)):
            return None
        errors = []
        for option in options:
            try:
                return _value(option, value, where)
            except SettingsError as error:
                errors.append(error)
        raise errors[0]
    if origin is Literal:
        if value not in get_args(kind):
            names = ", ".join(map(str, get_args(kind)))
            raise SettingsError(f"{where} must be one of {names}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise SettingsError(f"{where} must be a list, got {value!r}")
        return tuple(_value(get_args(kind)[0], part, where) for part in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        name = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}
        raise SettingsError(f"{where} must be {name.get(kind.__name__, kind.__name__)}, got {value!r}")
    return value
