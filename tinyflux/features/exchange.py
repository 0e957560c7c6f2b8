"""Upstream TinyFlux's caches (`upstream_files`): written from ours for its trainer, and read into ours.

They are pickles because upstream reads nothing else. Everything in them loads with `weights_only=True`; the
dtype is a torch.dtype, which upstream can hand to `.to` as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_sampler import __version__
from moe_sampler._files import write_whole
from moe_sampler.data.reports import say
from moe_sampler.tinyflux.features.cache_format import CacheError, LatentFacts, Manifest, checksum
from moe_sampler.tinyflux.features.cache_read import FeatureCache
from moe_sampler.tinyflux.features.cache_shards import build_shards
from moe_sampler.tinyflux.features.extraction import CONVENTIONS, UPSTREAMS, Convention
from moe_sampler.tinyflux.features.upstream_files import FILES, read_upstream

__all__ = ["export_upstream", "import_upstream"]


def export_upstream(cache: FeatureCache, folder: str | Path, *, name: str | None = None) -> list[Path]:
    """Write upstream's files, all of them or none.

    The text mask has no place in them, nor has a shift of the latents, which is added back: upstream's are
    encoded * scale. Without one of the experts its file is left out.

    Args:
        cache: what to export; its tensors are held in memory, a file's at a time.
        folder: made when missing; existing files are not written over.
        name: for meta.pt; the cache folder's by default.

    Returns:
        The files written.

    Raises:
        CacheError: one of the files is there already; or the latents have a shift, and nothing says their
            scale.
        OSError: one can't be written.
    """
    folder = Path(folder)
    there = [str(folder / file) for file in FILES if (folder / file).exists()]
    if there:
        raise CacheError(f"{', '.join(there)} exist already: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def write(file: str, values: dict[str, Any]) -> None:
        write_whole(folder / file, lambda path: torch.save(values, path))
        written.append(folder / file)

    try:
        _write_all(cache, write, cache.folder.resolve().name if name is None else name)
    except BaseException:
        # A part of the set would be in the way of the next try, and upstream would take it for all.
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return written


def _upstreams_latents(cache: FeatureCache) -> Tensor:
    """encoded * scale, of latents that are (encoded - shift) * scale."""
    facts, latents = cache.manifest.latents, cache.stacked("latents")
    if not facts.latent_shift:
        return latents
    if facts.latent_scale is None:
        raise CacheError(f"{cache.folder} has shifted latents and doesn't say their scale")
    return (latents.float() + facts.latent_shift * facts.latent_scale).to(latents.dtype)


def _write_all(cache: FeatureCache, write: Callable[[str, dict[str, Any]], None], name: str) -> None:
    latents = _upstreams_latents(cache)
    write(
        "encodings.pt",
        {
            "latents": latents,
            "t5_embeds": cache.stacked("prompt_embeds"),
            "clip_pooled": cache.stacked("pooled_prompt_embeds"),
            "prompts": [cache.caption(i) for i in range(len(cache))],
            "dtype": latents.dtype,
        },
    )
    buckets = cache.t_buckets
    if cache.has_lune:
        features = cache.stacked("lune")
        write("lune.pt", {"features": features, "t_buckets": buckets, "dtype": features.dtype})
    if cache.has_sol:
        stats, spatial = cache.stacked("sol_stats"), cache.stacked("sol_maps")
        write("sol.pt", {"stats": stats, "spatial": spatial, "t_buckets": buckets, "dtype": stats.dtype})
    write("meta.pt", {"name": name})


def import_upstream(
    source: str | Path,
    folder: str | Path,
    *,
    convention: Convention = UPSTREAMS,
    shard_size: int = 256,
) -> Manifest:
    """Make a cache of upstream's files.

    Args:
        source: folder with encodings.pt, and lune.pt, sol.pt and meta.pt where they are, or with the shards
            of upstream's incremental builders and their state.json.
        folder: new, empty, or of an import that was interrupted.
        convention: how the features were extracted; upstream's own files are "tiny-flux-v4", and what
            `export_upstream` wrote is of its cache's convention.
        shard_size: samples a shard.

    The text mask isn't known, so every token counts, and the latents have no shift. Nor are encoders and
    experts known. Captions that upstream's builders left out are empty.

    Raises:
        CacheError: a file that can't be read, lacks something, or has more or fewer samples than the others;
            a build that wasn't finished.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f'unknown convention "{convention}": use one of {", ".join(CONVENTIONS)}')
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    found = read_upstream(Path(source))
    facts = LatentFacts(False, None, 0.0, "data" if convention == UPSTREAMS else "noise")
    settings = {
        "source": {
            "kind": "tinyflux",
            "name": found.name,
            "sha256": {file.relative_to(source).as_posix(): checksum(file) for file in found.files},
        },
        "latents": asdict(facts),
        "t_buckets": list(found.buckets),
        "convention": convention if found.buckets else None,
        "shard_size": shard_size,
    }
    wanted = Manifest(settings, None, None, len(found), (), __version__)
    if not all(part.prompts for part in found.parts):
        say(f"{source} holds no captions: they are empty, so live experts and sheets of samples see none")
    return build_shards(Path(folder), wanted, lambda first, length: iter([found.span(first, length)]))
