"""Pixels to latents and back, with the scale and the shift of the VAE's own config."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from moe_sampler.pipelines.latents import decode_latents, encode_images, encode_pixels

PROCESSOR = VaeImageProcessor(vae_scale_factor=2)


def small_vae(**config) -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            latent_channels=4,
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            **config,
        ).eval()


SHIFTS = [{}, {"scaling_factor": 0.5}, {"scaling_factor": 0.3611, "shift_factor": 0.1159}]


@pytest.mark.parametrize("config", SHIFTS)
def test_decoding_undoes_the_scale_and_then_the_shift(config):
    """As diffusers' own pipelines do: z = latents / scaling_factor + shift_factor."""
    vae = small_vae(**config)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor", 0.0)
    with torch.no_grad():
        expected = (vae.decode(latents / scale + shift).sample / 2 + 0.5).clamp(0, 1)
        found = decode_latents(latents, vae, PROCESSOR, "pt")
        assert expected.std() > 0.01
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert decode_latents(latents, vae, PROCESSOR, "latent") is latents


@pytest.mark.parametrize("config", SHIFTS)
def test_encoding_is_the_way_back(config):
    """With a VAE that changes nothing, what was encoded is decoded to the same pixels."""
    vae = small_vae(**config)
    pixels = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1

    class Same:
        config, dtype = vae.config, torch.float32

        def encode(self, pixels):
            return type("Encoded", (), {"latents": pixels})

        def decode(self, latents, return_dict):
            return (latents,)

    latents = encode_pixels(pixels, Same())
    expected = (pixels - config.get("shift_factor", 0.0)) * config.get("scaling_factor", 0.18215)
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(decode_latents(latents, Same(), PROCESSOR, "pt"), pixels / 2 + 0.5)


def test_an_image_has_one_latent():
    """The mode of the VAE's distribution: no noise of a sample, whatever the generators are at."""
    vae, image = small_vae(), Image.effect_noise((16, 16), 60).convert("RGB")
    found = [encode_images(vae, [image, image]) for _ in range(2)]
    assert torch.equal(found[0], found[1]) and found[0].dtype == torch.float32
    torch.testing.assert_close(found[0][0], found[0][1])


def test_a_vae_computes_in_its_own_precision_or_what_it_is_told():
    vae, seen = small_vae(), []
    latents = torch.zeros(1, 4, 4, 4)

    def decode(given, return_dict):
        seen.append(given.dtype)
        return (given,)

    vae.decode = decode
    for dtype in (None, torch.bfloat16):
        decode_latents(latents, vae, PROCESSOR, "pt", dtype)
    assert seen == [torch.float32, torch.bfloat16]
