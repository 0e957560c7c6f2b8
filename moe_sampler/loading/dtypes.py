"""Number formats of models, as users name them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["Dtypes", "read_dtypes"]

Dtype = torch.dtype | str
Dtypes = Dtype | Mapping[str, Dtype]


def _read(given: Any, auto: Callable[[], torch.dtype] | None) -> torch.dtype:
    name = str(given).removeprefix("torch.")
    if name == "auto" and auto is not None:
        return auto()
    if name == "auto":
        raise ValueError(
            'dtype="auto" is for loading: name one here, such as float16, or one by component, '
            '{"default": "float16", "vae": "float32"}'
        )
    dtype = getattr(torch, name, None) if isinstance(given, str) else given
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"a dtype is float32, float16, bfloat16 or torch's own, got {given!r}")
    return dtype


def read_dtypes(dtype: Any, torch_dtype: Any = None, auto: Callable[[], torch.dtype] | None = None) -> Any:
    """The dtype of all models or by component, with "default" for the others; None where neither was given.

    Args:
        dtype, torch_dtype: one of them: a `torch.dtype`, its name, or a mapping of these by component.
        auto: what "auto" is; without it that is refused.

    Raises:
        ValueError: both, or no number format.
    """
    if dtype is not None and torch_dtype is not None:
        raise ValueError("dtype and torch_dtype are the same: give one of them")
    given = torch_dtype if dtype is None else dtype
    if isinstance(given, Mapping):
        return {name: _read(one, auto) for name, one in given.items()}
    return None if given is None else _read(given, auto)
