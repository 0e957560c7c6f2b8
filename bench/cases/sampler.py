"""Uses of the sampling kernels."""

from __future__ import annotations

import torch

from bench.cases.case import DTYPES, FP32, Built, Case, Tensors, using
from moe_sampler.kernels import conversions, noise, sampler_step
from moe_sampler.kernels.rows import ROW_WIDTH


def _twice(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (2 * shape[0], *shape[1:])


def _step(
    make: Tensors,
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


def _epsilon(make: Tensors, shape: tuple[int, ...], dtype: torch.dtype) -> Built:
    velocity, x, alpha, sigma = make(shape, dtype), make(shape), make(shape[:1]), make(shape[:1])
    out = make(shape, dtype)
    launch = conversions.epsilon_launch_of(out, velocity, x, alpha, sigma)
    return Built(launch, (velocity, x), (out,), (alpha, sigma))


def _euler(make: Tensors, shape: tuple[int, ...], dtype: torch.dtype) -> Built:
    x, velocity = make(shape), make(shape, dtype)
    return Built(conversions.euler_launch_of(x, velocity, step_down=0.1), (x, velocity), (x,))


def _shift(make: Tensors, shape: tuple[int, ...], dtype: torch.dtype) -> Built:
    sigmas, out = make(shape), make(shape)
    return Built(conversions.shift_launch_of(out, sigmas, 3.0), (sigmas,), (out,))


def _noise(make: Tensors, shape: tuple[int, ...], dtype: torch.dtype) -> Built:
    out, seeds = make(shape, dtype), make(shape[:1], torch.int64)
    return Built(noise.launch_of(out, seeds, 0, 0), (), (out,), (seeds,))


def sampler_cases() -> list[Case]:
    """The step, the conversions and the noise."""
    found = [
        Case("sampler_step_", variant, dtype, using(_step, **settings))
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
