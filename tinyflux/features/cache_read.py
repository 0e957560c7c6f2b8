"""Reading caches: datasets of one or several, and features at any time between the buckets."""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from moe_sampler.loading.fingerprint import same_weights
from moe_sampler.loading.hub import Hub
from moe_sampler.publishing.upload import Target
from moe_sampler.tinyflux.features.cache_format import (
    CacheError,
    open_shard,
    read_manifest,
    shard_name,
    unpack_caption,
)
from moe_sampler.tinyflux.features.cache_hub import fetch_cache, push_cache

__all__ = ["FeatureCache", "MultiSource", "at_time"]

LUNE, SOL, MAPS, OWN = ("lune",), ("sol_stats", "sol_maps"), ("block_maps",), ("expert_latents",)
_NOT_ITEMS = ("captions", "caption_ends", "previews")


def at_time(values: Tensor, t_buckets: Tensor, t: Tensor) -> Tensor:
    """Features at each sample's own time: linear between the buckets around it, exact at the buckets.

    Before the first bucket and after the last one their features hold. Nothing waits for the device.

    Args:
        values: [B, T, ...], floating.
        t_buckets: [T], increasing, float32 or float64, on the same device.
        t: [B], float32 or float64.

    Returns:
        [B, ...] in the dtype of `values`, interpolated in float32.
    """
    if values.ndim < 2 or t.shape != values.shape[:1] or t_buckets.shape != values.shape[1:2]:
        raise ValueError(
            f"values, t_buckets and t must be [B, T, ...], [T] and [B], got {list(values.shape)}, "
            f"{list(t_buckets.shape)} and {list(t.shape)}"
        )
    before, after, weight = buckets_around(t_buckets, t)
    rows = torch.arange(len(t), device=t.device)
    return between(values[rows, before], values[rows, after], weight)


def buckets_around(t_buckets: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(index of the bucket before each time, of the one after it, the latter's weight), [B] each.

    t_buckets: [T], increasing. t: [B]. float32 or float64 each; the weight is float32.
    """
    if t.dtype not in (torch.float32, torch.float64) or t_buckets.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"t and t_buckets must be float32 or float64, got {t.dtype} and {t_buckets.dtype}")
    # In float32 a time that was a bucket's decimal fraction still is that bucket.
    t, t_buckets = t.float(), t_buckets.float()
    after = torch.searchsorted(t_buckets, t, right=True).clamp_(max=len(t_buckets) - 1)
    before = (after - 1).clamp_(min=0)
    start, end = t_buckets[before], t_buckets[after]
    weight = ((t - start) / (end - start).clamp(min=torch.finfo(torch.float32).tiny)).clamp(0, 1)
    return before, after, weight


def between(before: Tensor, after: Tensor, weight: Tensor) -> Tensor:
    """before + weight·(after - before): [B, ...] each in one dtype, computed in float32. weight: [B]."""
    weight = weight.view(-1, *(1,) * (before.ndim - 1))
    return torch.lerp(before.float(), after.float(), weight).to(before.dtype)


class FeatureCache(Dataset):
    """A finished cache as a dataset; shards are mapped from disk, and what is used is read.

    An item holds `latents`, `prompt_embeds`, `prompt_mask`, `pooled_prompt_embeds`, `caption`, its `index` in
    this cache, and where their experts taught `lune`, `sol_stats` and `sol_maps` at every time of `t_buckets`
    (shapes: `TENSORS`, without N). `at_time` interpolates them. Where the experts have a VAE of their own
    `expert_latents` are there, too. Where the cache has them, and `maps` says so, `block_maps` are at
    `map_times`.

    Args:
        folder: of the cache.
        maps: read a cache's block maps, which are large.
        verify: compare every shard's checksum now, which reads them once. Missing, cut off or exchanged
            shards are found without it.

    Raises:
        CacheError: not a cache, not finished, or a shard that isn't as it was written, by name.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True, maps: bool = True) -> None:
        self.folder = Path(folder)
        self._unread = _NOT_ITEMS if maps else (*_NOT_ITEMS, *MAPS)
        self.manifest = read_manifest(self.folder)
        if not self.manifest.complete:
            raise CacheError(
                f"{self.folder} is not finished: build it again with the same settings to continue"
            )
        first = 0
        for index, record in enumerate(self.manifest.shards):
            if (record.file, record.first) != (shard_name(index), first):
                raise CacheError(f"{self.folder}: the manifest's shards are out of order at {record.file}")
            if record.shapes != self.manifest.shards[0].shapes:
                raise CacheError(f"{self.folder / record.file} holds other tensors than the first shard")
            first += record.length
        if first != self.manifest.length:
            raise CacheError(f"{self.folder} has shards of {first} samples instead of {self.manifest.length}")
        self.shapes = self.manifest.shards[0].shapes
        self._ends = [record.first + record.length for record in self.manifest.shards]
        with ThreadPoolExecutor(4 if verify else 1) as pool:
            opened = pool.map(
                lambda record: open_shard(self.folder, record, whole=verify), self.manifest.shards
            )
            self._shards: list[dict[str, Tensor] | None] = list(opened)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        maps: bool = True,
        verify: bool = True,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        force_download: bool = False,
    ) -> Self:
        """A cache from a folder, or from a data set `owner/name` on the hub.

        Args:
            source: it.
            revision, subfolder: of the hub repository; a folder may have a subfolder, too.
            maps, verify: as the constructor takes them.
            cache_dir, local_files_only, token, force_download: for the hub.

        Raises:
            CheckpointError: the hub doesn't have it.
            CacheError: as the constructor.
        """
        hub = Hub(cache_dir, local_files_only, token, force_download)
        folder = fetch_cache(source, hub, revision=revision, subfolder=subfolder)
        return cls(folder, verify=verify, maps=maps)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        license: str | None = None,
    ) -> str:
        """Upload it as a data set, with a card that shows some of its pictures; returns the commit's address.

        Args:
            repo_id, commit_message, private, token, create_pr, subfolder, revision: as
                `publishing.upload.Target` takes them.
            license: the data's, as the hub calls it.

        Raises:
            CheckpointError: the hub doesn't take it.
        """
        place = (repo_id, private, token, commit_message, create_pr, revision, subfolder)
        return push_cache(self, Target(*place, kind="dataset"), license)

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps: a worker process opens its own."""
        return self.__dict__ | {"_shards": [None] * len(self._ends)}

    @property
    def t_buckets(self) -> Tensor:
        """float32 [T]."""
        return torch.tensor(self.manifest.t_buckets, dtype=torch.float32)

    @property
    def has_lune(self) -> bool:
        return LUNE[0] in self.shapes

    @property
    def has_sol(self) -> bool:
        return SOL[0] in self.shapes

    @property
    def has_maps(self) -> bool:
        """Whether items have `block_maps`."""
        return MAPS[0] in self.shapes and MAPS[0] not in self._unread

    @property
    def maps_made(self) -> dict[str, Any] | None:
        """Of block maps: the `expert`, its `block`, and the times `t`."""
        return self.manifest.settings.get("maps")

    def __len__(self) -> int:
        return self.manifest.length

    def _find(self, index: int) -> tuple[dict[str, Tensor], int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of a cache of {len(self)}")
        index %= len(self)
        shard = bisect.bisect_right(self._ends, index)
        record = self.manifest.shards[shard]
        tensors = self._shards[shard]
        if tensors is None:
            tensors = self._shards[shard] = open_shard(self.folder, record, whole=False)
        return tensors, index - record.first

    def __getitem__(self, index: int) -> dict[str, Any]:
        tensors, place = self._find(index)
        # Copies: who changes an item in place doesn't change what the next epoch reads.
        item: dict[str, Any] = {
            name: tensor[place].clone() for name, tensor in tensors.items() if name not in self._unread
        }
        item["caption"] = self.caption(index)
        item["index"] = torch.tensor(index % len(self))
        return item

    def caption(self, index: int) -> str:
        tensors, place = self._find(index)
        return unpack_caption(tensors["captions"], tensors["caption_ends"], place)

    def preview(self, index: int) -> Tensor | None:
        """uint8 [h, w, 3], the picture 64 pixels large; None in caches that were made without images."""
        tensors, place = self._find(index)
        return tensors["previews"][place].clone() if "previews" in tensors else None

    def stacked(self, name: str) -> Tensor:
        """[N, ...]: one tensor of all samples, in memory."""
        return torch.cat([self._find(record.first)[0][name] for record in self.manifest.shards])


class MultiSource(Dataset):
    """Several caches as one dataset, one after the other.

    Items are those of `FeatureCache`, plus `has_lune`, `has_sol` and `has_maps`, bool tensors: where they are
    False the sample's cache has no such features, and those there are placeholders that must not be learned
    from. `source` says which cache an item is from. `expert_latents` are there where all caches have them.

    Args:
        caches: made with the same encoders and experts, where they are known, of one shape and dtype, at the
            same buckets.

    Raises:
        ValueError: caches that don't go together; it says in what.
    """

    def __init__(self, caches: Sequence[FeatureCache]) -> None:
        if not caches:
            raise ValueError("give at least one cache")
        self.caches = list(caches)
        self._ends = list(itertools.accumulate(len(cache) for cache in self.caches))
        seen: dict[str, tuple[Any, FeatureCache]] = {}
        for cache in self.caches:
            for name, fact in _facts(cache).items():
                other, first = seen.setdefault(name, (fact, cache))
                if not _agree(other, fact):
                    raise ValueError(
                        f"{first.folder} and {cache.folder} don't go together: they differ in {name}"
                    )
        shapes = {name: shape for cache in self.caches for name, shape in cache.shapes.items()}
        self._absent = {
            name: torch.zeros(shapes[name][1:], dtype=getattr(torch, shapes[name][0]))
            for name in (*LUNE, *SOL, *(MAPS if self.has_maps else ()))
            if name in shapes
        }
        if "loss_mask" in shapes:  # without a mask all of an image counts
            self._absent["loss_mask"] = torch.full(shapes["loss_mask"][1:], 255, dtype=torch.uint8)

    @property
    def t_buckets(self) -> Tensor:
        """float32 [T]; empty where no cache has an expert."""
        taught = [cache for cache in self.caches if cache.has_lune or cache.has_sol]
        return taught[0].t_buckets if taught else torch.empty(0)

    @property
    def has_lune(self) -> bool:
        """Whether any cache has Lune's features."""
        return any(cache.has_lune for cache in self.caches)

    @property
    def has_expert_latents(self) -> bool:
        """Whether all caches have latents of the experts' own VAE."""
        return all(OWN[0] in cache.shapes for cache in self.caches)

    @property
    def has_sol(self) -> bool:
        """Whether any cache has Sol's."""
        return any(cache.has_sol for cache in self.caches)

    @property
    def has_maps(self) -> bool:
        """Whether any cache has block maps."""
        return any(cache.has_maps for cache in self.caches)

    @property
    def has_masks(self) -> bool:
        """Whether any cache has masks."""
        return any("loss_mask" in cache.shapes for cache in self.caches)

    @property
    def maps_made(self) -> dict[str, Any] | None:
        """As `FeatureCache.maps_made`, of all."""
        return next((cache.maps_made for cache in self.caches if cache.has_maps), None)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        which = bisect.bisect_right(self._ends, index)
        cache = self.caches[which]
        item = cache[index - self._ends[which] + len(cache)]
        for name, absent in self._absent.items():
            item.setdefault(name, absent.clone())
        if not self.has_expert_latents:
            item.pop(OWN[0], None)
        return item | {
            "has_lune": torch.tensor(cache.has_lune),
            "has_sol": torch.tensor(cache.has_sol),
            "has_maps": torch.tensor(cache.has_maps),
            "source": which,
        }


def _agree(one: Any, other: Any) -> bool:
    """Whether two facts are the same, whatever precision a model was loaded in."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(
            same_weights(part, other[name])
            if name == "fingerprint" and isinstance(part, str) and isinstance(other[name], str)
            else _agree(part, other[name])
            for name, part in one.items()
        )
    return one == other


def _facts(cache: FeatureCache) -> dict[str, Any]:
    """What must be the same in all caches of a training run, where a cache has it at all."""
    manifest = cache.manifest
    facts: dict[str, Any] = {
        f"the shape of {name}": shape for name, shape in cache.shapes.items() if name != "previews"
    }
    if cache.has_lune or cache.has_sol:
        facts |= {"t_buckets": manifest.t_buckets, "convention": manifest.settings["convention"]}
    if cache.has_maps:
        facts |= {"block maps": cache.maps_made}
    for kind, parts in (("encoders", manifest.encoders), ("experts", manifest.experts)):
        facts |= {f"{kind}.{name}": part for name, part in (parts or {}).items()}
    latents = manifest.latents
    facts |= {"the text's mask": latents.text_mask, "the latents' shift": latents.latent_shift}
    return facts
