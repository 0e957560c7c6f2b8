"""Imports of packages as large as torch and diffusers, faster."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

__all__ = ["end_with_command", "import_pipelines", "sparing", "without_collecting"]

_PIPELINES = "moe_sampler.pipelines.hybrid"
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


class _NoCompiler(ModuleType):
    """torch._dynamo for a process that compiles nothing: what only marks functions for the compiler leaves
    them as they are, and no module is a compiled one; for anything else the real one is imported."""

    NAME = "torch._dynamo"
    eval_frame = SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {}))

    def __init__(self) -> None:
        super().__init__(self.NAME)
        torch = importlib.util.find_spec("torch")
        places = [] if torch is None else torch.submodule_search_locations or []
        self.__path__ = [str(Path(place) / "_dynamo") for place in places]  # its modules are the real ones

    @staticmethod
    def allow_in_graph(fn: Any) -> Any:
        return fn

    assume_constant_result = allow_in_graph

    @staticmethod
    def disable(fn: Any = None, *_: Any, **__: Any) -> Any:
        return _NoCompiler.allow_in_graph if fn is None else fn

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # `inspect` looks through all modules
            raise AttributeError(name)
        if sys.modules.get(self.NAME) is self:
            del sys.modules[self.NAME]
        return getattr(importlib.import_module(self.NAME), name)


@contextmanager
def sparing(*names: str) -> Iterator[None]:
    """In the body packages of these names are as if not installed, but for what is imported already. In place
    of torch._dynamo, which torch can't do without, the process gets one that does nothing until it must."""
    spared = {name: _NoCompiler() if name == _NoCompiler.NAME else None for name in names}
    spared = {name: module for name, module in spared.items() if name not in sys.modules}
    modules: dict[str, Any] = sys.modules  # None is Python's own sign for what isn't there
    modules.update(spared)
    try:
        yield
    finally:
        for name in [name for name in spared if modules.get(name, modules) is None]:
            del modules[name]


def import_pipelines(*, loras: bool, compiles: bool) -> None:
    """diffusers, transformers and our pipelines, whatever the weights.

    With any model they import, where it is installed, scipy (for some schedulers and losses), peft (for
    adapters) and torch._dynamo (to mark what torch.compile may do): a third of a cold start. A process that
    ends with its command spares itself what that has no use for: its plan is made, so that schedulers that
    want scipy are there.

    Args:
        loras, compiles: whether there are any, and whether anything is compiled.
    """
    needless = {"scipy": True, "peft": not loras, _NoCompiler.NAME: not compiles}
    spared = [name for name, own in needless.items() if own and _ends_with_command]
    with without_collecting():
        try:
            with sparing(*spared):
                importlib.import_module(_PIPELINES)
        except (ImportError, RuntimeError):  # the latter by diffusers' lazy modules
            if not spared:
                raise
            importlib.import_module(_PIPELINES)  # versions that can't do without
