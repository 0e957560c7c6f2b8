"""How far a long command is: a bar where someone looks on, else a line every half a minute."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import typer

__all__ = ["progress_bar"]

_EVERY = 30.0


@contextlib.contextmanager
def progress_bar(what: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, with a rate and the time when it will end; call it with (done, total).

    Args:
        what: is counted.
        shown: whether it is at all.
    """
    if not shown:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        with _bar(what) as told:
            yield told
    else:
        yield _Lines(what)


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task, pace = progress.add_task(what, total=None, visible=False, pace=""), _Pace()

        def told(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, visible=total > 0, pace=pace(done, total))

        yield told


class _Lines:
    def __init__(self, what: str) -> None:
        self._what, self._pace, self._said = what, _Pace(), time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        pace = self._pace(done, total)
        if time.monotonic() - self._said >= _EVERY and done < total:
            self._said = time.monotonic()
            typer.echo(f"{done} of {total} {self._what}" + (f", {pace}" if pace else ""), err=True)


class _Pace:
    """Of the work since something was first done: what comes before is loading."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int, total: int) -> str:
        now = time.time()
        if self._first is None and done:
            self._first = done, now
        count, seconds = (done - self._first[0], now - self._first[1]) if self._first else (0, 0.0)
        if not count or not seconds:
            return ""
        rate = count / seconds
        shown = f"{rate:.1f} a second" if rate >= 1 else f"{1 / rate:.1f} seconds each"
        if done >= total:
            return shown
        end = now + (total - done) / rate
        day = (
            ""
            if time.strftime("%j", time.localtime(end)) == time.strftime("%j", time.localtime(now))
            else "%d %b, "
        )
        return f"{shown}, until {time.strftime(f'{day}%H:%M', time.localtime(end))}"
