"""A kernel in one of its uses: the launch, and the bytes it cannot do without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_sampler.kernels._jit import Launch

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (FP32, FP16, BF16)
STATE, SMALL_STATE = (32, 4, 64, 64), (2, 4, 32, 32)


class Built(NamedTuple):
    """A launch and what it must do: each element of `read` and `written` exactly once.

    `cached` are operands that many programs share: only their first reading comes from memory.
    loops: the kernel loops, so that its code does not say how often an access runs. flops: of matrix
    products, exps: exponentials, where they could matter more than bytes. asked: bytes of the cached operands
    that all programs together ask for, where they ask again and again.
    """

    launch: Launch
    read: tuple[Tensor, ...]
    written: tuple[Tensor, ...]
    cached: tuple[Tensor, ...] = ()
    loops: bool = False
    flops: int = 0
    exps: int = 0
    asked: int = 0


@dataclass(frozen=True)
class Case:
    """One kernel in one of its uses. `shape` is the stated size, `small` one to run in the interpreter."""

    operation: str
    variant: str
    dtype: torch.dtype
    make: Callable[..., Built]
    shape: tuple[int, ...] = STATE
    small: tuple[int, ...] = SMALL_STATE

    def build(self, shape: tuple[int, ...], device: str) -> Built:
        return self.make(Tensors(device), shape, self.dtype)

    def __str__(self) -> str:
        parts = (self.operation, self.variant, str(self.dtype).removeprefix("torch."))
        return ", ".join(part for part in parts if part)


class Tensors:
    """Makes operands: empty ones on the meta device, and elsewhere numbers that a kernel can work with."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype = FP32) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        if not dtype.is_floating_point:
            return torch.ones(shape, dtype=dtype, device=self.device)
        # In (0, 1), so that it can be a noise level or a weight as well as a latent.
        return torch.rand(shape, device=self.device).clamp_(0.01, 0.99).to(dtype)


def using(builder: Callable[..., Built], **settings) -> Callable[..., Built]:
    """`builder` with some of its arguments given."""
    return lambda make, shape, dtype: builder(make, shape, dtype, **settings)
