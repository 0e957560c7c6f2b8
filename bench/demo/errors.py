"""Held-out x0 errors of experts by noise level, without guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from diffusers import ModelMixin
from torch import Tensor

from bench.demo.held_out import HeldOut, fitting_caption
from moe_sampler import HybridPipeline
from moe_sampler.demo.autoencoder import encode_all
from moe_sampler.sampling.paths import FlowPath, Level, VPPath
from moe_sampler.sampling.predictions import velocity_to_x0, x0_coefficients

FLOW, VP = FlowPath(), VPPath.linear()
_Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(noised latents, texts' states) -> x0."""


def _asked_at(s: float) -> tuple[int, Level]:
    """Sol's timestep nearest to a level, and the level that it is."""
    timestep = VP.nearest_timestep(s)
    return timestep, VP.level(timestep)


class HeldOutLatents:
    """Held-out scenes as experts meet them: latents, noised, with their captions' states.

    A level s is that of Sol's timestep which is nearest to it, for Lune too.

    Args:
        pipe: its VAE and text encoder are asked.
        count: of scenes.
    """

    def __init__(self, pipe: HybridPipeline, test: HeldOut, count: int = 500) -> None:
        scale = pipe.vae.config["scaling_factor"]
        latents = torch.from_numpy(encode_all(pipe.vae, test.scenes.pictures[:count])) * scale
        self.full, self.structure = latents[:, 0], latents[:, 1]
        rng = np.random.default_rng(6)
        texts = [fitting_caption(test.scenes.scene(i), rng)[0] for i in range(count)]
        self.states = torch.cat([pipe.encode_texts(texts[i : i + 100]) for i in range(0, count, 100)])

    def sol_error(self, unet: ModelMixin, s: float, structure: bool = False) -> float:
        """Mean squared x0 error of a model that predicts v on the VP path.

        structure: against the structure picture's latent, from that latent noised.
        """
        timestep, level = _asked_at(s)

        def x0(x: Tensor, states: Tensor) -> Tensor:
            v = unet(x, torch.tensor(timestep), states).sample
            return velocity_to_x0(v, x, level.alpha, level.sigma)

        return self._error(x0, timestep, level, self.structure if structure else self.full)

    def lune_error(self, unet: ModelMixin, s: float) -> float:
        """Mean squared x0 error of a model that predicts the flow velocity."""
        timestep, asked = _asked_at(s)
        level = FLOW.at(asked.noise)
        p, q = x0_coefficients("flow_prediction", level)

        def x0(x: Tensor, states: Tensor) -> Tensor:
            return p * x + q * unet(x, torch.tensor(FLOW.timestep(level)), states).sample

        return self._error(x0, timestep, level, self.full)

    @torch.no_grad()
    def _error(self, x0: _Denoiser, seed: int, level: Level, clean: Tensor, batch: int = 50) -> float:
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        noised = level.alpha * clean + level.sigma * noise
        parts = zip(*(whole.split(batch) for whole in (noised, self.states, clean)), strict=True)
        return sum(float((x0(x, states) - own).square().sum()) for x, states, own in parts) / clean.numel()


def x0_errors(pipe: HybridPipeline, held: HeldOutLatents, levels: Sequence[float]) -> list[dict[str, float]]:
    """Both experts' errors at each noise level, as `crossing` reads them, and Sol's on structure pictures."""
    rows = []
    for s in levels:
        timestep, level = _asked_at(s)
        rows.append(
            {
                "s": level.noise,
                "timestep": timestep,
                "sol": held.sol_error(pipe.unet_sol, s),
                "lune": held.lune_error(pipe.unet_lune, s),
                "sol_structure": held.sol_error(pipe.unet_sol, s, structure=True),
            }
        )
    return rows


def crossing(rows: Sequence[dict[str, float]]) -> float | None:
    """The highest noise level where Lune's error falls below Sol's, interpolated; None without a crossing."""
    ordered = sorted(rows, key=lambda row: -row["s"])
    for above, below in pairwise(ordered):
        a, b = above["sol"] / above["lune"] - 1, below["sol"] / below["lune"] - 1
        if a <= 0 < b:
            return above["s"] + (below["s"] - above["s"]) * a / (a - b)
    return None
