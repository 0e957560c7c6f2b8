"""Whether two VAEs make the same latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_sampler.pipelines.latents import latent_scaling

__all__ = ["same_latents"]


def same_latents(a: Any, b: Any) -> bool:
    """Whether two VAEs encode alike; their decoders, and the precision they are held in, may differ."""
    if a is b:
        return True
    ours, theirs = (
        {name: x for name, x in vae.state_dict().items() if name.startswith(("encoder.", "quant_conv."))}
        for vae in (a, b)
    )
    if latent_scaling(a) != latent_scaling(b) or ours.keys() != theirs.keys():
        return False
    return all(_equal(x, theirs[name]) for name, x in ours.items())


def _equal(x: Tensor, y: Tensor) -> bool:
    coarse = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
    return x.shape == y.shape and torch.equal(x.to("cpu", coarse), y.to("cpu", coarse))
