"""What a cache holds of images and captions: the student's inputs, and what its teachers say of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from moe_sampler.data.captions import check_text, report_cut
from moe_sampler.data.masks import fit_mask
from moe_sampler.data.pictures import fit_image, to_rgb
from moe_sampler.data.samples import CaptionedImage
from moe_sampler.kernels import philox_normal
from moe_sampler.kernels.noise import seeds_tensor
from moe_sampler.pipelines import choices
from moe_sampler.pipelines.latents import encode_images, latent_scaling
from moe_sampler.pipelines.prompts import cut_silently
from moe_sampler.tinyflux.features.block_maps import BlockMaps
from moe_sampler.tinyflux.features.cache_format import LatentFacts
from moe_sampler.tinyflux.features.encoders import StudentEncoders, TextEncoder
from moe_sampler.tinyflux.features.extraction import UPSTREAMS, check_buckets
from moe_sampler.tinyflux.features.latent_space import same_latents
from moe_sampler.tinyflux.features.teachers import Teachers

__all__ = ["SampleFeatures", "sample_settings"]

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in choices.DTYPES}
_PREVIEW = 64
_FULL = (
    "prompt_mask",
    "sol_stats",
    "sol_maps",
    "previews",
    "loss_mask",
)  # small or not floats: kept as they are


def sample_settings(
    encoders: StudentEncoders,
    teachers: Teachers | None,
    height: int,
    width: int,
    t_buckets: Sequence[float],
    dtype: str,
) -> dict[str, Any]:
    """What a manifest says of how samples are made, checked.

    Raises:
        ValueError: a size that one of the VAEs can't take, or times or a dtype that make no sense.
    """
    buckets = check_buckets(t_buckets)
    choices.check_choice("dtype", dtype, DTYPES)
    scales = {"the student's": encoders.scale}
    if teachers is not None:
        scales["the experts'"] = 2 ** (len(teachers.vae.config["block_out_channels"]) - 1)
    for whose, scale in scales.items():
        if height < scale or width < scale or height % scale or width % scale:
            raise ValueError(
                f"height and width must be multiples of {scale} for {whose} VAE, got {height} × {width}"
            )
    settings = {
        "height": height,
        "width": width,
        "t_buckets": [] if teachers is None else list(buckets),
        "convention": None if teachers is None else teachers.features.convention,
        "map_size": None if teachers is None else teachers.features.map_size,
        "latents": asdict(_latent_facts(encoders, teachers)),
        "dtype": dtype,
    }
    if teachers is not None and teachers.maps is not None:
        maps = teachers.maps
        settings["maps"] = {"expert": maps.expert, "block": maps.block, "t": list(teachers.map_times)}
    return settings


def _latent_facts(encoders: StudentEncoders, teachers: Teachers | None) -> LatentFacts:
    """The VAE's own scale and shift; upstream's students know neither its shift nor a mask of the text."""
    scale, shift = latent_scaling(encoders.vae)
    if teachers is not None and teachers.features.convention == UPSTREAMS:
        return LatentFacts(False, scale, 0.0, "data")
    return LatentFacts(True, scale, shift, "noise")


class SampleFeatures:
    """Computes what a cache holds of samples, some at a time.

    Args:
        encoders, teachers: the models.
        settings: of `sample_settings`, for these.

    Attributes:
        done: samples so far.
        cut: names of those whose captions an encoder cut.
    """

    def __init__(
        self, encoders: StudentEncoders, teachers: Teachers | None, settings: dict[str, Any]
    ) -> None:
        self.encoders, self.teachers, self.settings = encoders, teachers, settings
        self._dtype, self._facts = DTYPES[settings["dtype"]], LatentFacts(**settings["latents"])
        self._shared = teachers is not None and same_latents(encoders.vae, teachers.vae)
        self.done = 0
        self.cut: dict[TextEncoder, list[str]] = {encoders.clip: []}
        if encoders.t5 is not None:
            self.cut[encoders.t5] = []

    def fitted(self, sample: CaptionedImage) -> CaptionedImage:
        """Checked, and of the size that is wanted."""
        check_text(sample.caption, f"the caption of {sample.key}")
        image = fit_image(to_rgb(sample.image, sample.key), self.settings["height"], self.settings["width"])
        return sample._replace(image=image)

    def __call__(
        self,
        samples: Sequence[CaptionedImage],
        seeds: Sequence[int],
        masks: Sequence[Image.Image | None] | None = None,
    ) -> dict[str, Any]:
        """Tensors on the CPU by name, as `TENSORS` has them, and the `captions`.

        Args:
            samples: `fitted`.
            seeds: of their noise.
            masks: None where no sample may have one.
        """
        captions = [sample.caption for sample in samples]
        self.done += len(samples)
        for encoder, names in self.cut.items():
            long = encoder.too_long(captions)
            names += [sample.key for sample, cut in zip(samples, long, strict=True) if cut]
        with cut_silently():
            found = self._encode(samples, captions, list(seeds))
        if masks is not None:
            size, latents = (self.settings["height"], self.settings["width"]), found["latents"].shape[2:]
            fitted = [torch.from_numpy(fit_mask(mask, size, tuple(latents)).copy()) for mask in masks]
            found["loss_mask"] = torch.stack(fitted)
        return found

    def report(self, gather: Callable[[list], list] = list) -> None:
        """Of captions that were cut, so far; gather: every process's rows to those of all."""
        done = sum(gather([self.done]))
        for encoder, names in self.cut.items():
            report_cut(gather(names), done, encoder.max_length, type(encoder.model).__name__)

    def _encode(
        self, samples: Sequence[CaptionedImage], captions: list[str], seeds: list[int]
    ) -> dict[str, Any]:
        images = [sample.image for sample in samples]
        text = self.encoders.text(captions)
        latents = self._latents(images, seeds)
        found = {
            "latents": latents,
            "prompt_embeds": text.states,
            "prompt_mask": text.mask if self._facts.text_mask else torch.ones_like(text.mask),
            "pooled_prompt_embeds": text.pooled,
            "previews": _previews(images),
        }
        if self.teachers is not None:
            seen = latents
            if not self._shared:
                found["expert_latents"] = seen = encode_images(self.teachers.vae, images)
            features = self.teachers.features(seen, captions, seeds=seeds, t=self.settings["t_buckets"])
            found |= {name: value for name, value in features._asdict().items() if value is not None}
            if self.teachers.maps is not None:
                found["block_maps"] = self._block_maps(self.teachers.maps, seen, captions, seeds)
        for name, value in found.items():
            value = value.to("cpu", value.dtype if name in _FULL else self._dtype)
            if value.is_floating_point() and not value.isfinite().all():
                bad = value.flatten(1).isfinite().all(1).logical_not().nonzero()[0].item()
                raise ValueError(
                    f"{name} of {samples[bad].key} are not finite in {self.settings['dtype']}: use float32, "
                    "or remove the sample"
                )
            found[name] = value
        return found | {"captions": captions}

    def _block_maps(self, maps: BlockMaps, latents: Tensor, captions: list[str], seeds: list[int]) -> Tensor:
        """[B, M, channels, h, w]."""
        own = seeds_tensor(seeds, latents.device)
        levels = [
            torch.full((len(latents),), 1 - t, device=latents.device) for t in self.settings["maps"]["t"]
        ]
        return torch.stack([maps(latents, captions, seeds=own, noise=level) for level in levels], 1)

    def _latents(self, images: list[Image.Image], seeds: list[int]) -> Tensor:
        """The student's; upstream draws them from what the VAE says, ours are the most likely ones."""
        scale, shift = self._facts.latent_scale, self._facts.latent_shift
        assert scale is not None  # only an import doesn't know it
        noise = None
        if self.settings["convention"] == UPSTREAMS:
            own = seeds_tensor(seeds, self.encoders.vae.device)
            noise = partial(philox_normal, seeds=own, stream=1)  # features take stream 0
        return encode_images(self.encoders.vae, images, (scale, shift), noise)


def _previews(images: list[Any]) -> Tensor:
    """uint8 [B, h, w, 3], the longer side 64."""
    scale = _PREVIEW / max(images[0].size)
    width, height = (max(1, round(side * scale)) for side in images[0].size)
    small = [
        torch.frombuffer(bytearray(fit_image(i, height, width).tobytes()), dtype=torch.uint8) for i in images
    ]
    return torch.stack(small).view(len(images), height, width, 3)
