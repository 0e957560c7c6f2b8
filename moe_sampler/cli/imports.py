"""Imports of packages as large as torch and diffusers, faster."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_collecting"]


@contextmanager
def without_collecting() -> Iterator[None]:
    """Python's search for garbage waits while its body imports, and never looks through what that made.

    Imports make very many objects and no garbage. Looking for some meanwhile takes a second of diffusers'
    import, and looking through it all again while weights are loaded and at the process's end another.
    """
    imported, collects = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > imported:
            gc.freeze()
        if collects:
            gc.enable()
