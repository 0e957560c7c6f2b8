"""Where the host may not wait for a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["waits_are_errors"]


@contextlib.contextmanager
def waits_are_errors() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
