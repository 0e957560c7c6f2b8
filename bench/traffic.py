"""Bytes that a launch reads and writes, counted in Triton's interpreter: every access, through its mask.

Needs TRITON_INTERPRET=1 from the start of the process, and a launch over CPU tensors, which it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
from torch import Tensor

from moe_sampler.kernels._jit import Launch


@dataclass
class Traffic:
    """Bytes of one tensor: how many were asked for in all, and how many different ones."""

    read: int = 0
    written: int = 0
    distinct_read: int = 0
    distinct_written: int = 0


def count_traffic(launch: Launch) -> dict[int, Traffic]:
    """Run the launch; the traffic of each of its tensors by its position among the arguments.

    Raises an IndexError for an access outside every tensor.
    """
    tensors = {i: t for i, t in enumerate(launch.args) if isinstance(t, Tensor)}
    counters = {i: _Counter(t) for i, t in tensors.items()}

    def record(pointers: np.ndarray, mask: np.ndarray, itemsize: int, write: bool) -> None:
        addresses = pointers[np.broadcast_to(mask, pointers.shape)].ravel().astype(np.int64)
        if not len(addresses):
            return
        # One access goes to one tensor, as one pointer does in a kernel's code.
        owner = next((c for c in counters.values() if c.holds(addresses, itemsize)), None)
        if owner is None:
            raise IndexError(f"{launch.kernel.__name__} reaches outside its tensors")
        owner.add(addresses, itemsize, write)

    with _watched(record):
        launch.run(next(iter(tensors.values())).device)
    return {i: counter.total() for i, counter in counters.items()}


class _Counter:
    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.start, self.stop = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        self.asked = {False: 0, True: 0}
        self.touched = {write: np.zeros(storage.nbytes(), dtype=bool) for write in (False, True)}

    def holds(self, addresses: np.ndarray, itemsize: int) -> bool:
        return self.start <= addresses.min() and addresses.max() + itemsize <= self.stop

    def add(self, addresses: np.ndarray, itemsize: int, write: bool) -> None:
        self.asked[write] += len(addresses) * itemsize
        for byte in range(itemsize):
            self.touched[write][addresses - self.start + byte] = True

    def total(self) -> Traffic:
        read, written = (int(self.touched[write].sum()) for write in (False, True))
        return Traffic(self.asked[False], self.asked[True], read, written)


@contextmanager
def _watched(record) -> Iterator[None]:
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    load, store = Builder.create_masked_load, Builder.create_masked_store

    def watched_load(self, pointers, mask, *rest):
        record(pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8, False)
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        record(pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8, True)
        return store(self, pointers, value, mask, *rest)

    with (
        patch.object(Builder, "create_masked_load", watched_load),
        patch.object(Builder, "create_masked_store", watched_store),
    ):
        yield
