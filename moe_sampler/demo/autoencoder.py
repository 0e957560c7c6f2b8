"""The demo's autoencoder: AutoencoderTiny, 64x64 pixels to 16x16 latents of four channels.

Two stages. First encoder and decoder together on crops; then, with the encoder frozen (so that latents stay
valid), the decoder alone for sharpness.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from .attributes import ImageEncoder
from .data import SceneSet
from .scene_task import SceneLoss

CROP = 32


def new_autoencoder(width: int = 32, decoder_width: int = 48) -> AutoencoderTiny:
    """An untrained autoencoder; three stages, so that 2 ** (stages - 1) = 4 is the scale factor."""
    return AutoencoderTiny(
        encoder_block_out_channels=(width,) * 3,
        decoder_block_out_channels=(decoder_width,) * 3,
        num_encoder_blocks=(0, 1, 2),
        num_decoder_blocks=(3, 2, 0),
    )


def to_model(pictures: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Pixels (squared and absolute) and gradients: edges count on their own. [N, 3, H, W] each, -1..1."""
    error = output - target
    dx, dy = error.diff(dim=-1), error.diff(dim=-2)
    return error.square().mean() + 0.25 * error.abs().mean() + 0.25 * (dx.abs().mean() + dy.abs().mean())


def psnr(mean_squared_error: float) -> float:
    """Decibels for images in -1..1."""
    return float(10 * np.log10(4 / max(mean_squared_error, 1e-12)))


def joint_loss(model: AutoencoderTiny, scenes: SceneSet) -> SceneLoss:
    """The first stage's loss: crops of both kinds of picture, latents near zero mean and unit variance."""
    pictures = scenes.pictures

    def loss(which: np.ndarray, rng: np.random.Generator, generator: torch.Generator):
        target = _crops(pictures, which, rng)
        latents = model.encode(target).latents
        output = model.decode(latents).sample
        mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        spread = mean.square().mean() + (deviation - 1).square().mean()
        error = float(F.mse_loss(output.detach(), target))
        return reconstruction_loss(output, target) + 0.02 * spread, {"psnr": psnr(error)}

    return loss


def decoder_loss(
    model: AutoencoderTiny,
    eye: ImageEncoder,
    latents: np.ndarray,
    scenes: SceneSet,
    noise: float = 0.05,
    feature_weight: float = 0.2,
) -> SceneLoss:
    """The second stage's loss: whole pictures from cached latents, compared as pixels and as features.

    Args:
        eye: a trained image encoder whose early features judge sharpness; frozen here.
        latents: float32 [N, 2, 4, 16, 16], scaled to unit variance: full, structure.
        noise: standard deviation of noise on the latents, which makes the decoder forgiving.
    """
    pictures = scenes.pictures
    eye = eye.eval().requires_grad_(False)

    def loss(which: np.ndarray, rng: np.random.Generator, generator: torch.Generator):
        kind = (rng.uniform(size=len(which)) < 0.15).astype(int)
        target = to_model(pictures[which, kind])
        z = torch.from_numpy(latents[which, kind])
        z = z + noise * torch.randn(z.shape, generator=generator)
        output = model.decode(z / model.config.scaling_factor).sample
        features = feature_distance(eye, output, target)
        error = float(F.mse_loss(output.detach(), target))
        total = reconstruction_loss(output, target) + feature_weight * features
        return total, {"psnr": psnr(error), "features": float(features.detach())}

    return loss


def feature_distance(eye: ImageEncoder, output: Tensor, target: Tensor, depth: int = 4) -> Tensor:
    """Mean squared distance of the first `depth` activations, each position scaled to unit length."""
    total, seen = torch.zeros(()), 0
    for layer in eye.layers:
        output, target = layer(output), layer(target)
        if isinstance(layer, nn.SiLU):
            difference = F.normalize(output, dim=1) - F.normalize(target, dim=1)
            total, seen = total + difference.square().sum(1).mean(), seen + 1
            if seen == depth:
                break
    return total / seen


def _crops(pictures: np.ndarray, which: np.ndarray, rng: np.random.Generator) -> Tensor:
    kind = (rng.uniform(size=len(which)) < 0.3).astype(int)
    y, x = rng.integers(0, 64 - CROP + 1, (2, len(which)))
    crops = [pictures[i, k, b : b + CROP, a : a + CROP] for i, k, b, a in zip(which, kind, y, x, strict=True)]
    return to_model(np.stack(crops))


@torch.no_grad()
def encode_all(model: AutoencoderTiny, pictures: np.ndarray, batch: int = 16) -> np.ndarray:
    """uint8 [N, 2, 64, 64, 3] -> float32 [N, 2, 4, 16, 16], not yet scaled."""
    flat = pictures.reshape(-1, *pictures.shape[2:])
    parts = [model.encode(to_model(flat[i : i + batch])).latents.numpy() for i in range(0, len(flat), batch)]
    return np.concatenate(parts).reshape(len(pictures), 2, *parts[0].shape[1:])
