"""Noise that depends on (seed, step, element) alone, beside a generator's."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.measure import DEVICE, OURS, Comparison
from moe_sampler.kernels import philox_normal

SUITE = "noise"
SHAPES = ((1, 4, 64, 64), (4, 4, 64, 64), (1, 16, 128, 128), (16, 4, 64, 64))


def comparisons() -> Iterator[Comparison]:
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            seeds = torch.arange(shape[0], device=DEVICE)
            out = torch.empty(shape, dtype=dtype, device=DEVICE)
            providers = {
                OURS: lambda s=shape, d=dtype, i=seeds: lambda: philox_normal(s, i, dtype=d),
                "Tensor.normal_": lambda o=out: o.normal_,
            }
            case = {"shape": "x".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch.")}
            yield Comparison(SUITE, case, providers, moved_bytes=out.nbytes)
