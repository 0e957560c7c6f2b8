"""From the host to a device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["OnDevice", "to_device"]


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device. From the host to a GPU it is copied in the background: out of pinned memory,
    since a copy out of any other memory waits until the device has done all that it was given before."""
    device = torch.device(device)
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "cpu")


class OnDevice:
    """A tensor that is brought to where it is used, once. That copy waits, and leaves no pinned memory.

    Args:
        tensor: anywhere.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def on(self, device: torch.device | str) -> Tensor:
        if self._tensor.device != torch.device(device):
            self._tensor = self._tensor.to(device)
        return self._tensor
