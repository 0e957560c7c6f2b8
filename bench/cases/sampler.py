"""Uses of the sampling kernels."""

from __future__ import annotations

import torch

from bench.cases.case import DTYPES, FP32, Built, Case, Tensors, using
from moe_sampler.kernels import conversions, guidance, noise, sampler_step
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
    memories: int = 0,
    x0: bool = False,
    seeds: bool = False,
    noise: bool = False,
    nexts: int = 0,
) -> Built:
    x, table = make(shape), make((50, ROW_WIDTH))
    outputs = [make(_twice(shape) if guided else shape, dtype) for _ in range(experts)]
    next_inputs = [make(_twice(shape) if guided else shape, dtype) for _ in range(nexts)]
    remembered = [make(shape) for _ in range(memories)]
    prediction = make(shape) if x0 else None
    drawn = make(shape[:1], torch.int64) if seeds else None
    given = make(shape) if noise else None
    step = sampler_step.Step(x, outputs, table, 3, remembered, prediction, next_inputs, drawn, given)
    noises = () if given is None else (given,)
    predictions = () if prediction is None else (prediction,)
    cached = (table,) if drawn is None else (table, drawn)
    return Built(
        sampler_step.launch_of(step),
        (x, *outputs, *remembered, *noises),
        (x, *remembered[-1:], *predictions, *next_inputs),
        cached,
    )


STEPS = {
    "one output": {},
    "guided, next input": {"guided": True, "nexts": 1},
    "guided, noise in the kernel, next input": {"guided": True, "seeds": True, "nexts": 1},
    "noise tensor, one memory": {"noise": True, "memories": 1},
    "guided, three memories, next input": {"guided": True, "memories": 3, "nexts": 1},
    "crossfade: four outputs, one memory, noise, next inputs": {
        "experts": 2,
        "guided": True,
        "memories": 1,
        "seeds": True,
        "nexts": 2,
    },
    "four experts: eight outputs, three memories, x0, noise, next inputs": {
        "experts": 4,
        "guided": True,
        "memories": 3,
        "x0": True,
        "seeds": True,
        "nexts": 4,
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


def _zero_star(make: Tensors, shape: tuple[int, ...], dtype: torch.dtype) -> Built:
    guided, output = make(shape), make(_twice(shape), dtype)
    return Built(guidance.zero_star_launch_of(guided, output, 5.0), (), (guided,), (output,), loops=True)


def _projected(make: Tensors, shape: tuple[int, ...], dtype: torch.dtype, momentum: float = 0.0) -> Built:
    guided, output, x = make(shape), make(_twice(shape), dtype), make(shape)
    running = make(shape) if momentum else None
    numbers = (1.0, -0.8, 5.0, 0.0, 2.5, momentum)
    launch = guidance.projected_launch_of(guided, output, x, running, *numbers)
    kept = () if running is None else (running,)
    return Built(launch, (), (guided, *kept), (output, x, *kept), loops=True)


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
    for dtype in DTYPES:  # read twice, the second time from the cache
        found.append(Case("zero_star_guidance", "", dtype, _zero_star))
        found.append(Case("projected_guidance", "", dtype, _projected))
        found.append(Case("projected_guidance", "momentum", dtype, using(_projected, momentum=-0.5)))
    found.append(Case("shift_sigmas", "", FP32, _shift, (1 << 20,), (4096,)))
    return found
