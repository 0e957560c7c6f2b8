"""Every kernel at the shapes and dtypes it is used with, as launches to compile, count and time.

for case in cases():
    built = case.build(case.shape, "meta")
    print(case, aot.compile_launch(built.launch, 90))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_sampler.kernels import conversions, noise, sampler_step
from moe_sampler.kernels._jit import Launch
from moe_sampler.kernels.rows import ROW_WIDTH

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (FP32, FP16, BF16)
STATE, SMALL_STATE = (32, 4, 64, 64), (2, 4, 32, 32)


class Built(NamedTuple):
    """A launch and what it must do: each element of `read` and `written` exactly once.

    `cached` are small operands that many programs share: only their first reading comes from memory.
    flops: of matrix products, exps: exponentials, where they could matter more than bytes.
    """

    launch: Launch
    read: tuple[Tensor, ...]
    written: tuple[Tensor, ...]
    cached: tuple[Tensor, ...] = ()
    flops: int = 0
    exps: int = 0


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
        return self.make(_Tensors(device), shape, self.dtype)

    def __str__(self) -> str:
        parts = (self.operation, self.variant, str(self.dtype).removeprefix("torch."))
        return ", ".join(part for part in parts if part)


class _Tensors:
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


def _twice(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (2 * shape[0], *shape[1:])


def _step(
    make: _Tensors,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    experts: int = 1,
    guided: bool = False,
    history: bool = False,
    seeds: bool = False,
    noise: bool = False,
    nexts: int = 0,
) -> Built:
    x, table = make(shape), make((50, ROW_WIDTH))
    outputs = [make(_twice(shape) if guided else shape, dtype) for _ in range(experts)]
    next_inputs = [make(_twice(shape) if guided else shape, dtype) for _ in range(nexts)]
    previous = make(shape) if history else None
    drawn = make(shape[:1], torch.int64) if seeds else None
    given = make(shape) if noise else None
    second = outputs[1] if experts == 2 else None
    first_next, second_next = (*next_inputs, None, None)[:2]
    step = sampler_step.Step(
        x, outputs[0], second, table, 3, previous, first_next, second_next, drawn, given, 0
    )
    present = tuple(t for t in (previous, given) if t is not None)
    written = tuple(t for t in (previous,) if t is not None)
    cached = (table,) if drawn is None else (table, drawn)
    return Built(
        sampler_step.launch_of(step),
        (x, *outputs, *present),
        (x, *written, *next_inputs),
        cached,
    )


def _using(builder: Callable[..., Built], **settings) -> Callable[..., Built]:
    return lambda make, shape, dtype: builder(make, shape, dtype, **settings)


STEPS = {
    "one output": {},
    "guided, next input": {"guided": True, "nexts": 1},
    "guided, noise in the kernel, next input": {"guided": True, "seeds": True, "nexts": 1},
    "noise tensor, history": {"noise": True, "history": True},
    "crossfade: four outputs, history, noise, next inputs": {
        "experts": 2,
        "guided": True,
        "history": True,
        "seeds": True,
        "nexts": 2,
    },
}


def _epsilon(make: _Tensors, shape: tuple[int, ...], dtype: torch.dtype) -> Built:
    velocity, x, alpha, sigma = make(shape, dtype), make(shape), make(shape[:1]), make(shape[:1])
    out = make(shape, dtype)
    launch = conversions.epsilon_launch_of(out, velocity, x, alpha, sigma)
    return Built(launch, (velocity, x), (out,), (alpha, sigma))


def _euler(make: _Tensors, shape: tuple[int, ...], dtype: torch.dtype) -> Built:
    x, velocity = make(shape), make(shape, dtype)
    return Built(conversions.euler_launch_of(x, velocity, step_down=0.1), (x, velocity), (x,))


def _shift(make: _Tensors, shape: tuple[int, ...], dtype: torch.dtype) -> Built:
    sigmas, out = make(shape), make(shape)
    return Built(conversions.shift_launch_of(out, sigmas, 3.0), (sigmas,), (out,))


def _noise(make: _Tensors, shape: tuple[int, ...], dtype: torch.dtype) -> Built:
    out, seeds = make(shape, dtype), make(shape[:1], torch.int64)
    return Built(noise.launch_of(out, seeds, 0, 0), (), (out,), (seeds,))


def cases() -> list[Case]:
    """Every kernel, for every dtype it supports."""
    found = [
        Case("sampler_step_", variant, dtype, _using(_step, **settings))
        for variant, settings in STEPS.items()
        for dtype in DTYPES
    ]
    for operation, make in (
        ("velocity_to_epsilon", _epsilon),
        ("euler_step_", _euler),
        ("philox_normal", _noise),
    ):
        found += [Case(operation, "", dtype, make) for dtype in DTYPES]
    found.append(Case("shift_sigmas", "", FP32, _shift, (1 << 20,), (4096,)))
    return found
