"""SIGTERM and Ctrl-C: a request to save and stop, not a death."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupts", "interrupts"]


class Interrupts:
    """signal: the one that came, or None."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Within the context the first SIGTERM or SIGINT is only noted; a second one does what it always did.

    In a thread other than the main one, where Python lets nobody handle signals, nothing is noted.
    """
    noted = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, _frame: FrameType | None) -> None:
        noted.signal = signal.Signals(number)
        signal.signal(number, before[signal.Signals(number)])

    try:
        for number in before:
            signal.signal(number, note)
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
