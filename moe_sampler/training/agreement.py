"""What all processes want, without a wait for the device."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from .._transfers import to_device

__all__ = ["StopAgreement"]


class StopAgreement:
    """Whether any process wants to stop, found without a wait for the device.

    Alone, a process answers itself. Several hear at every step what all of them wanted at the step before:
    that answer has arrived, while this step's is still behind the work that the device was given.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._before: tuple[Tensor, torch.cuda.Event | None] | None = None

    def ask(self, wanted: bool) -> bool:
        """All processes ask at every step, and get the same answer."""
        if self._accelerator.num_processes == 1:
            return wanted
        flag = to_device(torch.tensor(float(wanted)), self._accelerator.device)
        answer = self._accelerator.reduce(flag, "sum")
        assert isinstance(answer, Tensor)
        before, self._before = self._before, _read_later(answer)
        if before is None:
            return False
        read, arrived = before
        if arrived is not None:
            arrived.synchronize()
        return bool(read > 0)


def _read_later(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """(The tensor on the host, what to wait for before it is read)."""
    if tensor.device.type != "cuda":
        return tensor, None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived
