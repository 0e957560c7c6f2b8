"""Flags of a training command: one a setting, over a TOML file that holds the same."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from ..training.settings import from_tables, help_of, read_toml
from .options import one_line_errors

__all__ = ["takes_settings"]

_CONFIG = Annotated[
    Path | None, typer.Option(help="TOML file with a table a group of settings; flags win over it.")
]


def takes_settings(cls: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with a flag for every setting of `cls`, which it gets as one object, `settings`.

    A parameter of the command itself with a setting's name takes the place of that flag.

    Args:
        cls: a dataclass of groups of settings; no two groups have a setting of the same name.
    """
    groups = {group: kind for group, (kind, _) in help_of(cls).items()}
    group_of = {field.name: group for group, kind in groups.items() for field in dataclasses.fields(kind)}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = [p for p in inspect.signature(function).parameters.values() if p.name != "settings"]
        parameters = [p.replace(annotation=hints[p.name]) for p in own]
        parameters.append(_parameter("config", _CONFIG))
        for group, kind in groups.items():
            known = help_of(kind)
            for field in dataclasses.fields(kind):
                if field.name not in hints:
                    option = typer.Option(
                        help=_with_default(known[field.name][1], field.default), rich_help_panel=group.title()
                    )
                    annotation = Annotated[_plain(known[field.name][0]) | None, option]
                    parameters.append(_parameter(field.name, annotation))

        def command(config: Path | None, **given: Any) -> None:
            with one_line_errors():
                tables: dict[str, Any] = {group: {} for group in groups}
                tables |= read_toml(config) if config else {}
                for name, group in group_of.items():
                    # What is no table in the file is refused below, with its name.
                    if given.get(name) not in (None, []) and isinstance(tables[group], dict):
                        tables[group][name] = given[name]
                settings = from_tables(cls, tables)
                function(**{p.name: given[p.name] for p in own}, settings=settings)

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _plain(kind: Any) -> Any:
    """What a flag of this type is given as: an option of a union, a list for a tuple."""
    if get_origin(kind) in (Union, types.UnionType):
        return _plain(next(option for option in get_args(kind) if option is not type(None)))
    if get_origin(kind) is tuple:
        return list[get_args(kind)[0]]
    return kind


def _with_default(text: str, default: Any) -> str:
    """The help text, which ends with the default where there is one and the text doesn't say it."""
    text = text.rstrip(".")
    unsaid = default is dataclasses.MISSING or default is None or "efault" in text
    shown = str(default).lower() if isinstance(default, bool) else default
    return f"{text}." if unsaid else f"{text}. Default: {shown}."
