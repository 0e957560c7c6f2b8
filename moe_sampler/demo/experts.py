"""The two experts: architecture, noise levels and losses of the shared trunk, Sol and Lune.

Trunk and Lune learn the flow velocity u = eps - x0 at x = (1 - s) x0 + s eps; Sol learns v = alpha eps -
sigma x0 on the VP path with linear betas. Sol's flat masses come from its targets: below the noise share
`STRUCTURE_BELOW` it only ever saw structure pictures. Above it, where a hybrid run uses it, it saw the full
ones, so it hands Lune the right distribution.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..kernels.conversions import shift_sigma
from ..paths import FlowPath, VPPath
from .captions import caption
from .data import SceneSet
from .text import WIDTH, tokenize

STRUCTURE_BELOW = 0.65
CAPTION_DROP = 0.1
SOL_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "timestep_spacing": "trailing",
}
LUNE_SCHEDULER = {"num_train_timesteps": 1000, "shift": 2.0}


def new_unet(channels: tuple[int, int, int] = (32, 64, 128), text_width: int = WIDTH) -> UNet2DConditionModel:
    """An untrained expert for 16x16 latents, cross-attending to the text in its two lower levels."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


def sol_scheduler() -> DDPMScheduler:
    return DDPMScheduler(**SOL_SCHEDULER)


def lune_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**LUNE_SCHEDULER)


class Batches:
    """Draws latents and text states.

    Args:
        scenes: for the captions; may be None where only `text_states` is used.
        latents: float32 [N, 2, 4, 16, 16], scaled to unit variance: full, structure.
        tokenizer, text: frozen.
    """

    def __init__(
        self,
        scenes: SceneSet,
        latents: np.ndarray,
        tokenizer: CLIPTokenizer,
        text: CLIPTextModel,
        batch: int = 24,
    ) -> None:
        self.scenes, self.latents, self.batch = scenes, latents, batch
        self.tokenizer, self.text = tokenizer, text.eval().requires_grad_(False)

    def draw(self, rng: np.random.Generator, structure: np.ndarray) -> tuple[Tensor, Tensor]:
        """Latents float32 [B, 4, 16, 16] and text states [B, length, width].

        Args:
            structure: bool [B], which samples take the structure picture.
        """
        which = rng.integers(0, len(self.latents), self.batch)
        latents = torch.from_numpy(self.latents[which, structure.astype(int)].astype(np.float32))
        texts = [caption(self.scenes.scene(i), rng) if rng.uniform() >= CAPTION_DROP else "" for i in which]
        return latents, self.text_states(texts)

    @torch.no_grad()
    def text_states(self, texts: list[str]) -> Tensor:
        return self.text(tokenize(self.tokenizer, texts)).last_hidden_state


def _column(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))[:, None, None, None]


def _noise_shares(rng: np.random.Generator, count: int) -> np.ndarray:
    """Stratified uniform numbers in 0..1: an even spread within every batch."""
    return rng.permutation((np.arange(count) + rng.uniform(size=count)) / count)


def _flow_loss(unet: UNet2DConditionModel, batches: Batches, s: np.ndarray, rng, generator):
    path = FlowPath()
    levels = [path.at(float(value)) for value in s]
    x0, states = batches.draw(rng, np.zeros(len(s), bool))
    noise = torch.randn(x0.shape, generator=generator)
    x = _column([level.alpha for level in levels]) * x0 + _column([level.sigma for level in levels]) * noise
    timesteps = torch.tensor([path.timestep(level) for level in levels], dtype=torch.float32)
    return F.mse_loss(unet(x, timesteps, states).sample, noise - x0), {}


def trunk_loss(unet: UNet2DConditionModel, batches: Batches):
    """Flow velocity over all noise levels: what both experts start from."""

    def loss(rng: np.random.Generator, generator: torch.Generator, step: int):
        return _flow_loss(unet, batches, _noise_shares(rng, batches.batch), rng, generator)

    return loss


def lune_loss(unet: UNet2DConditionModel, batches: Batches, focus: float = 0.8, share: float = 0.85):
    """Flow velocity, `share` of the samples with s below `focus`, the rest over all s."""

    def loss(rng: np.random.Generator, generator: torch.Generator, step: int):
        u = _noise_shares(rng, batches.batch)
        s = np.where(rng.uniform(size=len(u)) < share, focus * u, u)
        return _flow_loss(unet, batches, s, rng, generator)

    return loss


def sol_loss(unet: UNet2DConditionModel, batches: Batches, shift: float = 2.0):
    """v on the VP path; integer timesteps spread as a shifted flow density would be.

    Uniform timesteps would spend a third of the steps above s = 0.96, where there is nothing to see.
    """
    path = VPPath.linear()
    shares = path.sigmas / (path.alphas + path.sigmas)

    def loss(rng: np.random.Generator, generator: torch.Generator, step: int):
        s = np.array([shift_sigma(value, shift) for value in _noise_shares(rng, batches.batch)])
        timesteps = np.abs(shares[None, :] - s[:, None]).argmin(axis=1)
        x0, states = batches.draw(rng, shares[timesteps] < STRUCTURE_BELOW)
        noise = torch.randn(x0.shape, generator=generator)
        alpha, sigma = _column(path.alphas[timesteps]), _column(path.sigmas[timesteps])
        output = unet(alpha * x0 + sigma * noise, torch.from_numpy(timesteps), states).sample
        return F.mse_loss(output, alpha * noise - sigma * x0), {}

    return loss
