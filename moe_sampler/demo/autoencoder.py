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

from moe_sampler.kernels import philox_normal

from .._transfers import OnDevice, to_device
from ..training.draws import Draws
from .attributes import ImageEncoder, windows
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


def to_model(pictures: np.ndarray | Tensor) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in -1..1."""
    if isinstance(pictures, np.ndarray):
        pictures = torch.from_numpy(np.ascontiguousarray(pictures))
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Pixels (squared and absolute) and gradients: edges count on their own. [N, 3, H, W] each, -1..1."""
    error = output - target
    dx, dy = error.diff(dim=-1), error.diff(dim=-2)
    return error.square().mean() + 0.25 * error.abs().mean() + 0.25 * (dx.abs().mean() + dy.abs().mean())


def psnr(mean_squared_error: Tensor) -> Tensor:
    """Decibels for images in -1..1."""
    return 10 * torch.log10(4 / mean_squared_error.clamp_min(1e-12))


def _error(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output.detach().float(), target)


def joint_loss(model: AutoencoderTiny, scenes: SceneSet) -> SceneLoss:
    """The first stage's loss: crops of both kinds of picture, latents near zero mean and unit variance."""
    pictures = OnDevice(torch.from_numpy(scenes.pictures))

    def loss(which: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        target = _crops(pictures.on(which.device), which, draws)
        latents = model.encode(target, return_dict=False)[0]
        output = model.decode(latents, return_dict=False)[0]
        mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        spread = mean.square().mean() + (deviation - 1).square().mean()
        return reconstruction_loss(output, target) + 0.02 * spread, {"psnr": psnr(_error(output, target))}

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
    pictures, known = OnDevice(torch.from_numpy(scenes.pictures)), OnDevice(torch.from_numpy(latents))
    eye = eye.eval().requires_grad_(False)
    scale = model.config["scaling_factor"]

    def loss(which: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        kind = (draws.uniform("kind") < 0.15).long()
        target = to_model(pictures.on(which.device)[which, kind])
        z = known.on(which.device)[which, kind]
        z = z + noise * philox_normal(z.shape, draws.seeds("latents"))
        output = model.decode(z / scale, return_dict=False)[0]
        features = feature_distance(eye.to(which.device), output, target)
        total = reconstruction_loss(output, target) + feature_weight * features
        return total, {"psnr": psnr(_error(output, target)), "features": features.detach()}

    return loss


def feature_distance(eye: ImageEncoder, output: Tensor, target: Tensor, depth: int = 4) -> Tensor:
    """Mean squared distance of the first `depth` activations, each position scaled to unit length."""
    total, seen = output.new_zeros(()), 0
    for layer in eye.layers():
        output, target = layer(output), layer(target)
        if isinstance(layer, nn.SiLU):
            difference = F.normalize(output, dim=1) - F.normalize(target, dim=1)
            total, seen = total + difference.square().sum(1).mean(), seen + 1
            if seen == depth:
                break
    return total / seen


def _crops(pictures: Tensor, which: Tensor, draws: Draws) -> Tensor:
    """[B, 3, CROP, CROP] out of pictures: uint8 [N, 2, 64, 64, 3]."""
    kind = (draws.uniform("kind") < 0.3).long()
    y, x = (draws.integers(f"crop {axis}", 64 - CROP + 1) for axis in "yx")
    return to_model(pictures[which[:, None, None], kind[:, None, None], *windows(y, x, CROP, CROP)])


@torch.no_grad()
def encode_all(
    model: AutoencoderTiny, pictures: np.ndarray, batch: int = 16, device: torch.device | str = "cpu"
) -> np.ndarray:
    """uint8 [N, 2, 64, 64, 3] -> float32 [N, 2, 4, 16, 16], not yet scaled."""
    model.to(device)  # pyright: ignore[reportArgumentType]
    flat = torch.from_numpy(np.ascontiguousarray(pictures)).flatten(0, 1)
    parts = [
        model.encode(to_model(to_device(flat[i : i + batch], device)), return_dict=False)[0].cpu()
        for i in range(0, len(flat), batch)
    ]
    latents = torch.cat(parts)
    return latents.reshape(len(pictures), 2, *latents.shape[1:]).numpy()
