"""Caches on the hub, as data sets with a card."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from PIL import Image

from moe_sampler.loading.hub import Hub, is_hub_id
from moe_sampler.publishing.card import Example, card_text, loading, table, write_card
from moe_sampler.publishing.upload import Address, Target
from moe_sampler.tinyflux.features.cache_format import MANIFEST

if TYPE_CHECKING:
    from moe_sampler.tinyflux.features.cache_read import FeatureCache

__all__ = ["fetch_cache", "push_cache"]

_SHOWN = 6
_SIZES = ((1000, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))


def fetch_cache(
    source: str | os.PathLike,
    hub: Hub,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
) -> Path:
    """A cache's folder on this machine, downloaded if `source` names a data set on the hub.

    Raises:
        CheckpointError: the hub doesn't have it.
    """
    path = Path(source)
    if path.exists() or not is_hub_id(os.fspath(source)):
        return path / subfolder if subfolder else path
    place = hub.look(source, revision=revision, subfolder=subfolder, kind="dataset")
    place.need([MANIFEST])
    return place.local([MANIFEST, "shard-?????.safetensors"])


def push_cache(cache: FeatureCache, target: Target, license: str | None) -> str:
    """Upload a cache; returns the commit's address."""
    address = target.create()
    with TemporaryDirectory() as name:
        folder = Path(name)
        for file in (MANIFEST, *(record.file for record in cache.manifest.shards)):
            (folder / file).symlink_to((cache.folder / file).resolve())
        write_card(folder, _card(cache, address, _pictures(cache, folder), license))
        return target.send(folder, address, "cache")


def _pictures(cache: FeatureCache, folder: Path) -> list[Example]:
    """A few of the samples' own, where the cache has them."""
    found = []
    for index in range(0, len(cache), max(1, len(cache) // _SHOWN))[:_SHOWN]:
        preview = cache.preview(index)
        if preview is None:
            break
        (folder / "examples").mkdir(exist_ok=True)
        file = f"examples/{index}.png"
        Image.fromarray(preview.numpy()).save(folder / file)
        found.append(Example(cache.caption(index), file))
    return found


def _card(cache: FeatureCache, address: Address, examples: Sequence[Example], license: str | None) -> str:
    manifest = cache.manifest
    tensors = {
        f"`{name}`": f"{dtype} {' × '.join(map(str, shape)) or '1'}"
        for name, (dtype, *shape) in cache.shapes.items()
    }
    facts: dict[str, Any] = {
        "samples": len(cache),
        "shards": len(manifest.shards),
        "version": manifest.version,
    }
    if manifest.t_buckets:
        facts["features at t"] = ", ".join(f"{t:g}" for t in manifest.t_buckets)
    for kind, parts in (("encoder", manifest.encoders), ("expert", manifest.experts)):
        for name, part in (parts or {}).items():
            if isinstance(part, dict) and "class" in part:
                facts[f"{kind} {name}"] = part["class"]
    size = next((label for most, label in _SIZES if len(cache) < most), "n>1M")
    sections = [
        "A cache of moe-sampler: latents and texts of a data set, with what the experts Sol and Lune make of "
        "them, to train a TinyFlux student on.",
        "## Loading",
        loading(
            "from moe_sampler.tinyflux import FeatureCache",
            [f"cache = FeatureCache.from_pretrained({address.arguments})", "print(cache[0].keys())"],
        ),
        "## What it holds",
        table(facts),
        "Of each sample:",
        table(tensors),
    ]
    return card_text(
        Path(address.source).name,
        sections,
        license=license,
        tags=["tinyflux"],
        examples=examples,
        task_categories=["text-to-image"],
        size_categories=[size],
    )
