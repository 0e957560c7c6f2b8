"""Building a cache: images and captions in, the student's inputs and what its teachers say out.

A shard's samples are computed in micro-batches that begin with the shard, by one process. So its bytes depend
on the settings alone: not on how many processes build, nor on when a build was killed and continued.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from torch import Tensor, nn

from moe_sampler import __version__
from moe_sampler.data.captions import check_text, report_cut
from moe_sampler.data.masks import fit_mask, has_masks, mask_of
from moe_sampler.data.pictures import fit_image, to_rgb
from moe_sampler.data.samples import CaptionedImage, Source
from moe_sampler.kernels import philox_normal
from moe_sampler.kernels.noise import seeds_tensor
from moe_sampler.loading.fingerprint import portable_fingerprint
from moe_sampler.pipelines import choices
from moe_sampler.pipelines.latents import encode_images, latent_scaling
from moe_sampler.pipelines.prompts import cut_silently
from moe_sampler.tinyflux.features.block_maps import BlockMaps
from moe_sampler.tinyflux.features.cache_format import LatentFacts, Manifest
from moe_sampler.tinyflux.features.cache_shards import Span, build_shard, build_shards
from moe_sampler.tinyflux.features.encoders import StudentEncoders, TextEncoder
from moe_sampler.tinyflux.features.extraction import T_BUCKETS, UPSTREAMS, ExpertFeatures, check_buckets
from moe_sampler.tinyflux.features.latent_space import same_latents

__all__ = ["Cluster", "Teachers", "build_cache"]

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in choices.DTYPES}
MAP_TIMES = (0.75,)
"""At little noise a diffusion model's features say most of an image (DIFT, arXiv:2306.03881)."""
_PREVIEW = 64
_FULL = (
    "prompt_mask",
    "sol_stats",
    "sol_maps",
    "previews",
    "loss_mask",
)  # small or not floats: kept as they are


@dataclass(frozen=True)
class Teachers:
    """The experts with the VAE whose latents they know.

    Args:
        features: of Sol, Lune or both, with their text encoder.
        vae: the experts' own.
        text_encoder: the model behind `features.encode_prompt`, for the manifest's fingerprint.
        maps: of one of these experts, to align a student's tokens with; None for none.
        map_times: increasing times they are taken at.

    Raises:
        ValueError: maps of another expert, or without times.
    """

    features: ExpertFeatures
    vae: AutoencoderKL | AutoencoderTiny
    text_encoder: nn.Module
    maps: BlockMaps | None = None
    map_times: tuple[float, ...] = MAP_TIMES

    def __post_init__(self) -> None:
        if self.maps is not None:
            object.__setattr__(self, "map_times", check_buckets(self.map_times))
            if self.maps.expert not in self.features.teachers:
                teachers = ", ".join(self.features.teachers)
                raise ValueError(f"the maps are {self.maps.expert}'s, but the teachers are {teachers}")

    @classmethod
    def from_pipeline(
        cls,
        pipe: Any,
        teachers: Sequence[str] | None = None,
        *,
        maps: BlockMaps | None = None,
        map_times: Sequence[float] = MAP_TIMES,
        **settings: Any,
    ) -> Teachers:
        """The experts of a HybridPipeline; `teachers` and `settings` as `ExpertFeatures.from_pipeline`."""
        features = ExpertFeatures.from_pipeline(pipe, teachers, **settings)
        return cls(features, pipe.vae, pipe.text_encoder, maps, tuple(map_times))

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {
            "vae": {"class": type(self.vae).__name__, "fingerprint": portable_fingerprint(self.vae)},
            "text_encoder": {
                "class": type(self.text_encoder).__name__,
                "fingerprint": portable_fingerprint(self.text_encoder),
            },
        }
        for name in self.features.teachers:
            path = getattr(self.features, f"{name}_path")
            described[name] = {
                "fingerprint": portable_fingerprint(getattr(self.features, name)),
                "path": type(path).__name__,
                "timesteps": [path.timestep(path.at(s)) for s in (0.25, 0.5, 0.75)],
            }
        return described


@dataclass(frozen=True)
class Cluster:
    """Workers that build shards.

    Args:
        over: from what each worker makes once, a function, and items, to the function's results, in any
            order; `moe_sampler.ray.over_workers` with an address.
        load: gives source, encoders and teachers in a worker, as `build_cache` is given them. Both are
            pickled.
    """

    over: Callable[[Callable[[], Callable[[Span], _Built]], Sequence[Span]], Iterable[_Built]]
    load: Callable[[], tuple[Source, StudentEncoders, Teachers | None]]


_Built = tuple[int, list[list[str]]]
"""Samples of a shard, and names of captions that each text encoder cut."""


class _ShardBuilder:
    """In a worker: builds shards, one after the other."""

    def __init__(
        self,
        load: Callable[[], tuple[Source, StudentEncoders, Teachers | None]],
        folder: Path,
        settings: dict[str, Any],
    ) -> None:
        self._load, self._folder, self._settings = load, folder, settings

    def __call__(self) -> Callable[[Span], _Built]:
        work = _Work(*self._load(), self._settings)

        def build(span: Span) -> _Built:
            for names in work.cut.values():
                names.clear()
            return sum(build_shard(self._folder, span, work.parts)), [list(n) for n in work.cut.values()]

        return build


def build_cache(
    folder: str | Path,
    source: Source,
    encoders: StudentEncoders,
    teachers: Teachers | None = None,
    *,
    height: int,
    width: int,
    t_buckets: Sequence[float] = T_BUCKETS,
    seed: int = 0,
    dtype: str = "float16",
    shard_size: int = 256,
    micro_batch: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
    cluster: Cluster | None = None,
) -> Manifest:
    """Build the cache in `folder`, or continue one that was interrupted.

    Under `accelerate launch` every process takes its share of the shards; the first one writes the manifest.
    The same settings give the same bytes, whatever the number of processes and interruptions, on the same
    machine, software and number of threads. Another `micro_batch` is another setting, since a model may
    round differently in another batch.

    Args:
        folder: new, empty or begun before with the same settings.
        source: images and captions.
        encoders: the student's.
        teachers: None for a cache without expert features.
        height, width: pixels images are resized and cut to, keeping their proportions.
        t_buckets: increasing times at which features are taken; 0 is noise, 1 is data.
        seed: sample i's noise has seed + i.
        dtype: "float16", "bfloat16" or "float32", of latents, text states and Lune's features.
        shard_size: samples a shard.
        micro_batch: samples computed together.
        progress: called with (samples done, samples in all) of this process's share.
        cluster: other processes that do the work, which see the same folder; this one does none.

    Returns:
        The finished manifest.

    Raises:
        CacheError: the folder holds something else, was begun with other settings (it says which), or one of
            its shards is damaged (it says which).
        ValueError: settings that make no sense; an image that can't be read; features that aren't finite.
    """
    wanted = _manifest(
        source, encoders, teachers, height, width, t_buckets, seed, dtype, shard_size, micro_batch
    )
    work = _Work(source, encoders, teachers, wanted.settings)
    try:
        elsewhere = None if cluster is None else partial(work.elsewhere, Path(folder).resolve(), cluster)
        manifest = build_shards(Path(folder), wanted, work.parts, progress, elsewhere)
    except BaseException:
        work.report()
        raise
    work.report(gather_object)
    return manifest


def _manifest(
    source: Source,
    encoders: StudentEncoders,
    teachers: Teachers | None,
    height: int,
    width: int,
    t_buckets: Sequence[float],
    seed: int,
    dtype: str,
    shard_size: int,
    micro_batch: int,
) -> Manifest:
    """What is asked for, checked."""
    buckets = check_buckets(t_buckets)
    choices.check_choice("dtype", dtype, DTYPES)
    for name, value in (("shard_size", shard_size), ("micro_batch", micro_batch), ("length", len(source))):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= seed < 2**62:
        raise ValueError(f"seed must lie in [0, 2**62), got {seed}")
    scales = {"the student's": encoders.scale}
    if teachers is not None:
        scales["the experts'"] = 2 ** (len(teachers.vae.config["block_out_channels"]) - 1)
    for whose, scale in scales.items():
        if height < scale or width < scale or height % scale or width % scale:
            raise ValueError(
                f"height and width must be multiples of {scale} for {whose} VAE, got {height} × {width}"
            )
    settings = {
        "source": source.describe(),
        "height": height,
        "width": width,
        "t_buckets": [] if teachers is None else list(buckets),
        "convention": None if teachers is None else teachers.features.convention,
        "map_size": None if teachers is None else teachers.features.map_size,
        "latents": asdict(_latent_facts(encoders, teachers)),
        "seed": seed,
        "dtype": dtype,
        "shard_size": shard_size,
        "micro_batch": micro_batch,
    }
    if teachers is not None and teachers.maps is not None:
        maps = teachers.maps
        settings["maps"] = {"expert": maps.expert, "block": maps.block, "t": list(teachers.map_times)}
    experts = None if teachers is None else teachers.describe()
    return Manifest(settings, encoders.describe(), experts, len(source), (), __version__)


def _latent_facts(encoders: StudentEncoders, teachers: Teachers | None) -> LatentFacts:
    """The VAE's own scale and shift; upstream's students know neither its shift nor a mask of the text."""
    scale, shift = latent_scaling(encoders.vae)
    if teachers is not None and teachers.features.convention == UPSTREAMS:
        return LatentFacts(False, scale, 0.0, "data")
    return LatentFacts(True, scale, shift, "noise")


class _Work:
    """Computes samples, a micro-batch at a time."""

    def __init__(
        self,
        source: Source,
        encoders: StudentEncoders,
        teachers: Teachers | None,
        settings: dict[str, Any],
    ) -> None:
        self.source, self.encoders, self.teachers, self.settings = source, encoders, teachers, settings
        self.dtype = DTYPES[settings["dtype"]]
        self._facts = LatentFacts(**settings["latents"])
        self._shared = teachers is not None and same_latents(encoders.vae, teachers.vae)
        self._done = 0
        self.cut: dict[TextEncoder, list[str]] = {encoders.clip: []}
        if encoders.t5 is not None:
            self.cut[encoders.t5] = []

    def parts(self, first: int, length: int) -> Iterator[dict[str, Any]]:
        """Tensors by name, and the captions, of each micro-batch of a shard; images are read ahead."""
        size = self.settings["micro_batch"]
        indices = range(first, first + length)
        batches = [indices[i : i + size] for i in range(0, length, size)]
        with ThreadPoolExecutor(min(8, size)) as pool:
            ahead = [pool.submit(self._load, i) for i in batches[0]]
            for batch, following in zip(batches, [*batches[1:], range(0)], strict=True):
                images = [future.result() for future in ahead]
                ahead = [pool.submit(self._load, i) for i in following]
                yield self._compute(batch, *zip(*images, strict=True))

    def _load(self, index: int) -> tuple[CaptionedImage, Image.Image | None]:
        sample = self.source[index]
        check_text(sample.caption, f"the caption of {sample.key}")
        image = fit_image(to_rgb(sample.image, sample.key), self.settings["height"], self.settings["width"])
        return sample._replace(image=image), mask_of(self.source, index)

    def _compute(
        self, indices: range, samples: Sequence[CaptionedImage], masks: Sequence[Image.Image | None]
    ) -> dict[str, Any]:
        images, captions = [sample.image for sample in samples], [sample.caption for sample in samples]
        self._done += len(samples)
        for encoder, names in self.cut.items():
            long = encoder.too_long(captions)
            names += [sample.key for sample, cut in zip(samples, long, strict=True) if cut]
        with cut_silently():
            found = self._encode(indices, samples, images, captions)
        if has_masks(self.source):
            size, latents = (self.settings["height"], self.settings["width"]), found["latents"].shape[2:]
            fitted = [torch.from_numpy(fit_mask(mask, size, tuple(latents)).copy()) for mask in masks]
            found["loss_mask"] = torch.stack(fitted)
        return found

    def elsewhere(self, folder: Path, cluster: Cluster, spans: Sequence[Span]) -> Iterator[int]:
        """As `build_shards` takes it."""
        builder = _ShardBuilder(cluster.load, folder, self.settings)
        for count, cut in cluster.over(builder, spans):
            self._done += count
            for names, more in zip(self.cut.values(), cut, strict=True):
                names += more
            yield count

    def report(self, gather: Callable[[list], list] = list) -> None:
        """Of captions that were cut, so far; gather: every process's rows to those of all."""
        done = sum(gather([self._done]))
        for encoder, names in self.cut.items():
            report_cut(gather(names), done, encoder.max_length, type(encoder.model).__name__)

    def _encode(
        self,
        indices: range,
        samples: Sequence[CaptionedImage],
        images: list[Image.Image],
        captions: list[str],
    ) -> dict[str, Any]:
        text = self.encoders.text(captions)
        seeds = [self.settings["seed"] + i for i in indices]
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
            value = value.to("cpu", value.dtype if name in _FULL else self.dtype)
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
