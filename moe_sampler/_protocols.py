"""Whether an object does what a protocol asks, on every version of Python alike.

From Python 3.12 on `isinstance` overlooks what an object gives through `__getattr__`, as wrappers do.
"""

from __future__ import annotations

import inspect
from typing import TypeGuard, TypeVar

__all__ = ["implements", "missing_names"]

T = TypeVar("T")


def missing_names(value: object, protocol: type) -> list[str]:
    """The protocol's names, those with underscores aside, that `value` hasn't got."""
    bases = [base for base in reversed(protocol.__mro__) if getattr(base, "_is_protocol", False)]
    names = [name for base in bases for name in (*inspect.get_annotations(base), *vars(base))]
    return [name for name in names if not name.startswith("_") and not hasattr(value, name)]


def implements(value: object, protocol: type[T]) -> TypeGuard[T]:
    """Whether none is missing."""
    return not missing_names(value, protocol)
