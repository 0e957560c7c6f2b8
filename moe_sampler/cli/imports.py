"""Imports of packages as large as torch and diffusers, faster."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["end_with_command", "import_pipelines", "sparing", "without_collecting"]

_ends_with_command = False


def end_with_command() -> None:
    """This process makes what its command asks for, and nothing after it."""
    global _ends_with_command
    _ends_with_command = True


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


@contextmanager
def sparing(*names: str) -> Iterator[None]:
    """In the body packages of these names are as if not installed, but for what is imported already."""
    spared = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(spared))  # pyright: ignore[reportArgumentType]: Python's own sign for it
    try:
        yield
    finally:
        for name in spared:
            if sys.modules.get(name, sys) is None:
                del sys.modules[name]


def import_pipelines(*, loras: bool, compiles: bool) -> None:
    """diffusers, transformers and our pipelines, whatever the weights.

    With any model they import, where it is installed, scipy (for some schedulers and losses), peft (for
    adapters) and torch._dynamo (to mark what torch.compile may keep): a third of a cold start. A process that
    ends with its command spares itself what that has no use for: its plan is made, so that schedulers that
    want scipy are there.

    Args:
        loras, compiles: whether there are any, and whether anything is compiled.
    """
    needless = {"scipy": True, "peft": not loras, "torch._dynamo": not compiles}
    spared = [name for name, own in needless.items() if own and _ends_with_command]
    with without_collecting():
        try:
            with sparing(*spared):
                from ..pipelines import hybrid  # noqa: F401
        except (ImportError, RuntimeError):  # the latter by diffusers' lazy modules
            if not spared:
                raise
