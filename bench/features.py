"""Sol's attention statistics, streaming, beside attention matrices kept for every layer and then reduced."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import DEVICE, OURS, Call, Comparison
from moe_sampler.kernels import attention_statistics, combine_statistics

SUITE = "attention statistics"
HEADS = 8
# (layers, side of the map, head size) of Stable Diffusion 1.5's self-attention at 64×64 latents
STABLE_DIFFUSION = ((5, 64, 40), (5, 32, 80), (5, 16, 160), (1, 8, 160))
Layer = tuple[Tensor, Tensor, int]


def _layers(shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> list[Layer]:
    """(q, k, side) of every layer."""
    generator = torch.Generator().manual_seed(0)

    def drawn(side: int, size: int) -> Tensor:
        return torch.randn(1, HEADS, side**2, size, generator=generator).to(DEVICE, dtype)

    return [
        (drawn(side, size), drawn(side, size), side) for count, side, size in shapes for _ in range(count)
    ]


def _ours(layers: Sequence[Layer]) -> tuple[Tensor, Tensor]:
    statistics = [attention_statistics(q, k, side, side) for q, k, side in layers]
    return combine_statistics(statistics, [(side, side) for _, _, side in layers])


def _kept(layers: Sequence[Layer]) -> tuple[Tensor, Tensor]:
    """What hooks on a UNet collect, reduced once it has run."""
    maps = [
        torch.softmax(q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
        for q, k, _ in layers
    ]
    found = [_reduced(p, side) for p, (_, _, side) in zip(maps, layers, strict=True)]
    spatial = torch.stack([m for _, m in found]).mean(0)
    return torch.stack([s for s, _ in found]).mean(0), spatial / spatial.sum((-2, -1), keepdim=True)


def _reduced(attention: Tensor, side: int) -> tuple[Tensor, Tensor]:
    mean = attention.mean(1)
    entropy = -(mean * (mean + 1e-10).log()).sum(-1).mean(-1) / math.log(side**2)
    places = torch.cartesian_prod(*[torch.arange(side, device=mean.device, dtype=mean.dtype)] * 2)
    distance = torch.cdist(places, places)
    locality = 1 - (mean * distance).sum(-1).mean(-1) / distance.max()
    received = mean.sum(1).view(-1, 1, side, side)
    spatial = F.interpolate(received, (8, 8), mode="bilinear", align_corners=False)[:, 0]
    return torch.stack([locality, entropy, 1 - entropy], dim=-1), spatial


def comparison(name: str, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> Comparison:
    def provider(run: Callable[[Sequence[Layer]], tuple[Tensor, Tensor]]) -> Callable[[], Call]:
        def make() -> Call:
            layers = _layers(shapes, dtype)
            return lambda: run(layers)

        return make

    case = {"layers": name, "dtype": str(dtype).removeprefix("torch.")}
    providers = {OURS: provider(_ours), "matrices kept": provider(_kept)}
    return Comparison(SUITE, case, providers, memory=True, slow=len(shapes) > 1)


def comparisons() -> Iterator[Comparison]:
    for dtype in (torch.float32, torch.bfloat16):
        yield comparison("one of 32×32, head size 80", [(1, 32, 80)], dtype)
        yield comparison("one of 64×64, head size 40", [(1, 64, 40)], dtype)
    yield comparison("all 16 of Stable Diffusion 1.5", STABLE_DIFFUSION, torch.float32)
