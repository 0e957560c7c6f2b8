"""Batches as Ray hands them over: arrays or lists of one length, by column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

__all__ = ["check_columns", "column_of", "default_device", "plain"]


def default_device() -> str:
    """Of a worker: its GPU, where it has one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_columns(batch: Mapping[str, Any], wanted: Iterable[str], seed: str) -> None:
    """Raise ValueError for a column that isn't there. seed: the name of the seeds'."""
    for name in wanted:
        if name not in batch:
            why = ": what comes of a row follows from its seed, so give each one" if name == seed else ""
            raise ValueError(f"the data set has no column {name}, only {', '.join(batch)}{why}")


def column_of(values: Iterable[Any]) -> np.ndarray:
    """Of any objects, None among them."""
    values = list(values)
    column = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        column[i] = value
    return column


def plain(value: Any) -> Any:
    """NumPy's values, as Ray gives them, as Python's; not a number is nothing."""
    value = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, Mapping):  # a struct has all experts' fields
        return {name: plain(one) for name, one in value.items() if one is not None}
    return value
