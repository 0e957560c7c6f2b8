"""A run in a thread of its own, which tells what it has as it has it, and ends when nobody listens."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Stop", "told"]

Stop = threading.Event
"""Set by whoever wants a run to end."""
_END = object()


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def told(work: Callable[[Callable[[Any], None]], None], stop: Stop) -> Iterator[Any]:
    """What `work` tells the function it is given, in order; then what it raises, if it does.

    stop: is set when the iterator is closed before its end, so that the work stops too.
    """
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            work(heard.put)
        except BaseException as error:
            heard.put(_Failed(error))
        heard.put(_END)

    threading.Thread(target=run, daemon=True).start()
    try:
        while (found := heard.get()) is not _END:
            if isinstance(found, _Failed):
                raise found.error
            yield found
    except GeneratorExit:
        stop.set()
        raise
