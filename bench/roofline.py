"""How fast a kernel could be at best: bytes against bandwidth, arithmetic against its units. On paper."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bench.aot import Compiled
from bench.cases.case import Built


@dataclass(frozen=True)
class Device:
    """Peak figures of one GPU from NVIDIA's data sheets. Bandwidth in bytes/s.

    half: tensor cores on 16-bit operands, dense, FLOP/s. single: float32 without tensor cores, FLOP/s.
    """

    name: str
    architecture: int
    bandwidth: float
    multiprocessors: int
    clock: float
    half: float
    single: float

    def issue_rate(self) -> float:
        """Warp instructions a second: four schedulers a multiprocessor, one instruction a clock each."""
        return 4 * self.multiprocessors * self.clock

    def exp_rate(self) -> float:
        """Exponentials a second: 16 a clock and multiprocessor."""
        return 16 * self.multiprocessors * self.clock


DEVICES = (
    Device("A100 80GB", 80, 2.039e12, 108, 1.41e9, 312e12, 19.5e12),
    Device("H100 SXM", 90, 3.35e12, 132, 1.83e9, 989e12, 67e12),
    Device("B200", 100, 8.0e12, 148, 1.85e9, 2250e12, 75e12),
)
BY_ARCHITECTURE = {device.architecture: device for device in DEVICES}


def bytes_moved(built: Built) -> int:
    """Bytes between the chip and its memory, each operand read or written once."""
    return sum(t.nbytes for t in (*built.read, *built.written, *built.cached))


def seconds(built: Built, code: Compiled, dtype: torch.dtype, device: Device) -> tuple[float, str]:
    """The longest of what must pass through memory and through the arithmetic units, and its name.

    Launch latency (2 to 5 µs without a CUDA graph) comes on top of it.
    """
    limits = {"memory": bytes_moved(built) / device.bandwidth}
    if built.flops:
        rate = device.single if dtype == torch.float32 else device.half
        limits["matrix products"] = built.flops / rate
        limits["exponentials"] = built.exps / device.exp_rate()
    elif not built.loops:
        warps = math.prod(built.launch.grid) * code.warps
        limits["issue"] = code.instructions * warps / device.issue_rate()
    name = max(limits, key=limits.__getitem__)
    return limits[name], name
