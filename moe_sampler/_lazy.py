"""Names of a package that import their module when they are first asked for (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_names(
    namespace: dict[str, Any], modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package.

    Args:
        namespace: the package's `globals()`.
        modules: the names that each of its modules has.
    """
    package = namespace["__name__"]
    source = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in source:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        namespace[name] = getattr(import_module(f".{source[name]}", package), name)
        return namespace[name]

    return get, lambda: sorted({*namespace, *source})
