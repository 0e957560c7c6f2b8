"""Imports of packages as large as torch and diffusers, faster."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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


class _StandIn(ModuleType):
    """A module of which next to nothing is needed, until something else of it is asked for: the real one then
    takes its place.

    Args:
        name: of the module; its parents are imported.
        answers: what is needed of it.
    """

    def __init__(self, name: str, answers: Mapping[str, Any]) -> None:
        super().__init__(name)
        self.__spec__ = spec = importlib.util.find_spec(name)
        places = None if spec is None else spec.submodule_search_locations
        if places is not None:
            self.__path__ = places  # its modules are the real ones
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        own = sys.modules.get(self.__name__) is self
        if own and name in self._answers:
            return self._answers[name]
        if name.startswith("__"):  # `inspect` looks through all modules
            raise AttributeError(name)
        if own:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def _as_it_is(fn: Any = None, *_: Any, **__: Any) -> Any:
    return _as_it_is if fn is None else fn


_STAND_INS: dict[str, dict[str, Any]] = {
    # What marks functions for the compiler leaves them as they are, and no module is a compiled one.
    "torch._dynamo": {
        "allow_in_graph": _as_it_is,
        "assume_constant_result": _as_it_is,
        "disable": _as_it_is,
        "eval_frame": SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {})),
    },
    # Every condition is a plain one, and no number is a symbol.
    "torch.fx.experimental.symbolic_shapes": {
        "expect_true": lambda condition, skip=0: bool(condition),
        **dict.fromkeys(("guard_or_false", "guard_or_true", "guard_size_oblivious"), bool),
        "is_nested_int": lambda number: False,
        "sym_eq": lambda a, b: (list(a) == list(b)) if isinstance(a, tuple | list) else a == b,
    },
    "sympy": {"Basic": type("Basic", (), {})},
    # Its own modules are found without the list of all of them, for which it reads two thousand files.
    "transformers.models": {},
}
"""What is needed of modules on the way to others, by a process that compiles nothing."""


@contextmanager
def sparing(*names: str) -> Iterator[None]:
    """In the body packages of these names are as if not installed, but for what is imported already. Those in
    `_STAND_INS`, which others can't do without, have one, which stays."""
    modules: dict[str, Any] = sys.modules  # None is Python's own sign for what isn't there
    absent = [name for name in names if name not in modules and name not in _STAND_INS]
    modules.update(dict.fromkeys(absent))  # first: what a stand-in's parents find missing, they remember
    try:
        for name in names:
            if name not in modules:
                _stand_in(name)
        yield
    finally:
        for name in absent:
            if modules.get(name, modules) is None:
                del modules[name]


def _stand_in(name: str) -> None:
    sys.modules[name] = made = _StandIn(name, _STAND_INS[name])
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, made)


def _one_process() -> None:
    """Let transformers take it that torch can't distribute, which spares it torch.distributed.tensor."""
    import torch
    from transformers.utils import import_utils

    known = getattr(import_utils, "is_torch_distributed_available", None)
    if known is None or "WORLD_SIZE" in os.environ:
        return
    available, torch.distributed.is_available = torch.distributed.is_available, lambda: False
    try:
        known()  # which remembers its answer
    finally:
        torch.distributed.is_available = available


class _WhenAsked(Mapping):
    """A mapping that is made when something first asks it."""

    def __init__(self, make: Callable[[], Mapping[str, list[str]]]) -> None:
        self._made = functools.cache(make)

    def __getitem__(self, key: str) -> list[str]:
        return self._made()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made())

    def __len__(self) -> int:
        return len(self._made())


@contextmanager
def _distributions_when_asked() -> Iterator[None]:
    """In the body which distribution has which package is looked up when asked: diffusers lists all that are
    installed, for the names of three."""
    make = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = lambda: _WhenAsked(make)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = make


def import_pipelines(*, loras: bool = False, compiles: bool = False, borrows: bool = False) -> None:
    """diffusers, transformers and our pipelines, whatever the weights: before anything else imports some of
    diffusers, as a plan may.

    With any model they import, where it is installed, scipy (for some schedulers and losses), peft (for
    adapters), torch._dynamo (to mark what torch.compile may do), sympy, torch.distributed.tensor and a list
    of all models: two fifths of a cold start. A process that ends with its command spares itself what that
    has no use for.

    Args:
        loras, compiles: whether there are any, and whether anything is compiled.
        borrows: whether a plan is yet to be made with diffusers' schedulers, some of which want scipy.
    """
    needless = {"scipy": not borrows, "peft": not loras}
    needless |= dict.fromkeys(_STAND_INS, not compiles) | {"transformers.models": True}
    spared = [name for name, own in needless.items() if own and _ends_with_command]
    with without_collecting():
        try:
            with sparing(*spared), _distributions_when_asked():
                if spared and not loras:  # peft takes torch.distributed.tensor for imported
                    _one_process()
                importlib.import_module(_PIPELINES)
        except (ImportError, RuntimeError):  # the latter by diffusers' lazy modules
            if not spared:
                raise
            importlib.import_module(_PIPELINES)  # versions that can't do without
