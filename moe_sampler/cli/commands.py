"""What every subcommand is made with: groups of options, and errors of one line."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, cast, get_type_hints

import typer
import typer.main
from typer.core import TyperGroup

__all__ = ["command_group", "one_line_errors", "takes"]


def command_group(name: str, text: str, module: str) -> typer.Typer:
    """Subcommands under one name, which wait in a module of this package until one of them is asked for.

    module: has them as `app`.
    """

    class Group(TyperGroup):
        def _fill(self) -> None:
            if not self.commands:
                app = typer.main.get_command(import_module(f".{module}", __package__).app)
                self.commands.update(cast(TyperGroup, app).commands)

        def list_commands(self, ctx: Any) -> list[str]:
            self._fill()
            return super().list_commands(ctx)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            self._fill()
            return super().get_command(ctx, cmd_name)

    return typer.Typer(name=name, cls=Group, no_args_is_help=True, rich_markup_mode="markdown", help=text)


def takes(**groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with the options of these groups, each of which it gets as one object by its keyword."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = inspect.signature(function).parameters.values()
        parameters = [p.replace(annotation=hints[p.name]) for p in own if p.name not in groups]
        for cls in groups.values():
            hints = get_type_hints(cls, include_extras=True)
            parameters += [
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=field.default,
                    annotation=hints[field.name],
                )
                for field in dataclasses.fields(cls)
            ]

        def command(**given: Any) -> None:
            for name, cls in groups.items():
                given[name] = cls(**{field.name: given.pop(field.name) for field in dataclasses.fields(cls)})
            with one_line_errors():
                function(**given)

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Wrong input ends with one clear line and exit code 2, Ctrl-C with one word and 130."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.secho(f"error: {' '.join(str(error).split())}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
