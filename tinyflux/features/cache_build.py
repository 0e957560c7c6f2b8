"""Building a cache: images and captions in, the student's inputs and what its teachers say out.

A shard's samples are computed in micro-batches that begin with the shard, by one process. So its bytes depend
on the settings alone: not on how many processes build, nor on when a build was killed and continued.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from PIL import Image

from moe_sampler import __version__
from moe_sampler.data.masks import has_masks, mask_of
from moe_sampler.data.samples import CaptionedImage, Source
from moe_sampler.tinyflux.features.cache_format import Manifest
from moe_sampler.tinyflux.features.cache_shards import Span, build_shard, build_shards
from moe_sampler.tinyflux.features.encoders import StudentEncoders
from moe_sampler.tinyflux.features.extraction import T_BUCKETS
from moe_sampler.tinyflux.features.sample_features import SampleFeatures, sample_settings
from moe_sampler.tinyflux.features.teachers import Teachers

__all__ = ["Cluster", "build_cache"]


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
            for names in work.make.cut.values():
                names.clear()
            count = sum(build_shard(self._folder, span, work.parts))
            return count, [list(names) for names in work.make.cut.values()]

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
        work.make.report()
        raise
    work.make.report(gather_object)
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
    for name, value in (("shard_size", shard_size), ("micro_batch", micro_batch), ("length", len(source))):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= seed < 2**62:
        raise ValueError(f"seed must lie in [0, 2**62), got {seed}")
    settings = {
        "source": source.describe(),
        **sample_settings(encoders, teachers, height, width, t_buckets, dtype),
        "seed": seed,
        "shard_size": shard_size,
        "micro_batch": micro_batch,
    }
    experts = None if teachers is None else teachers.describe()
    return Manifest(settings, encoders.describe(), experts, len(source), (), __version__)


class _Work:
    """Computes a source's samples, a micro-batch at a time."""

    def __init__(
        self,
        source: Source,
        encoders: StudentEncoders,
        teachers: Teachers | None,
        settings: dict[str, Any],
    ) -> None:
        self._source, self._settings = source, settings
        self.make = SampleFeatures(encoders, teachers, settings)

    def parts(self, first: int, length: int) -> Iterator[dict[str, Any]]:
        """Tensors by name, and the captions, of each micro-batch of a shard; images are read ahead."""
        size = self._settings["micro_batch"]
        indices = range(first, first + length)
        batches = [indices[i : i + size] for i in range(0, length, size)]
        with ThreadPoolExecutor(min(8, size)) as pool:
            ahead = [pool.submit(self._load, i) for i in batches[0]]
            for batch, following in zip(batches, [*batches[1:], range(0)], strict=True):
                samples, masks = zip(*(future.result() for future in ahead), strict=True)
                ahead = [pool.submit(self._load, i) for i in following]
                seeds = [self._settings["seed"] + i for i in batch]
                yield self.make(samples, seeds, masks if has_masks(self._source) else None)

    def _load(self, index: int) -> tuple[CaptionedImage, Image.Image | None]:
        return self.make.fitted(self._source[index]), mask_of(self._source, index)

    def elsewhere(self, folder: Path, cluster: Cluster, spans: Sequence[Span]) -> Iterator[int]:
        """As `build_shards` takes it."""
        builder = _ShardBuilder(cluster.load, folder, self._settings)
        for count, cut in cluster.over(builder, spans):
            self.make.done += count
            for names, more in zip(self.make.cut.values(), cut, strict=True):
                names += more
            yield count
