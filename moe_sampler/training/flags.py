"""Flags of a command out of settings: every field is one, and a TOML file may give them instead."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer

from .settings import from_tables, help_of, read_toml

__all__ = ["with_settings"]

T = TypeVar("T")


def with_settings(groups: type[T], run: Callable[..., None]) -> Callable[..., None]:
    """A command's function: the parameters of `run` but its last, `settings`, then CONFIG and a flag a field.

    Args:
        groups: a dataclass of dataclasses, each of which is a table of the file and a panel of --help. A
            field whose name two groups have is `--group-field`.
        run: gets `settings`, the file's values with the given flags in their place. Its docstring is the
            command's help.
    """
    fields = _fields(groups)
    own = list(inspect.signature(run, eval_str=True).parameters.values())[:-1]
    config = inspect.Parameter(
        "config",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=None,
        annotation=Annotated[
            Path | None, typer.Argument(help="TOML file with the settings below.", show_default=False)
        ],
    )
    flags = [_parameter(name, *field) for name, field in fields.items()]

    def command(**given: Any) -> None:
        path = given.pop("config")
        tables = {group: {} for group in help_of(groups)} | ({} if path is None else read_toml(path))
        for name, (group, field, *_) in fields.items():
            value = given.pop(name)
            # What is no table in the file is refused below, with its name.
            if value is not None and value != [] and isinstance(tables[group], dict):
                tables[group][field] = list(value) if isinstance(value, tuple) else value
        run(**given, settings=from_tables(groups, tables))

    command.__doc__, command.__name__ = run.__doc__, run.__name__
    command.__signature__ = inspect.Signature([*own, config, *flags])
    return command


def _fields(groups: type) -> dict[str, tuple[str, str, Any, str, Any]]:
    """By the flag's name: group, field, type, help and default."""
    found = [
        (group, field.name, *help_of(cls)[field.name], field.default)
        for group, (cls, _) in help_of(groups).items()
        for field in dataclasses.fields(cls)
    ]
    counts = Counter(field for _, field, *_ in found)
    return {f"{f[0]}_{f[1]}" if counts[f[1]] > 1 else f[1]: f for f in found}


def _parameter(name: str, group: str, field: str, kind: Any, text: str, default: Any) -> inspect.Parameter:
    many = get_origin(kind) is tuple
    plain, choices = _plain(get_args(kind)[0] if many else kind)
    shown = default not in (None, dataclasses.MISSING, ()) and f" Default: {_show(default)}."
    flag = f"--{name.replace('_', '-')}"
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if plain is bool else flag,
        help=_sentence(text) + (shown or ""),
        rich_help_panel=group.capitalize(),
        metavar=choices,
        show_default=False,
    )
    annotation = Annotated[(list[plain] if many else plain) | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _plain(kind: Any) -> tuple[type, str | None]:
    """(What typer should parse, the choices to show)."""
    if get_origin(kind) in (Union, types.UnionType):
        return _plain(next(part for part in get_args(kind) if part is not type(None)))
    if get_origin(kind) is Literal:
        return str, "|".join(map(str, get_args(kind)))
    return kind, None


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?")) else f"{text[:1].upper()}{text[1:]}."


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
