"""Upstream TinyFlux's cache of four .pt files: written from ours for its trainer, and read into ours.

    encodings.pt   latents [N, C, h, w], t5_embeds [N, L, D], clip_pooled [N, P], prompts, dtype
    lune.pt        features [N, T, channels], t_buckets [T], dtype
    sol.pt         stats [N, T, 3], spatial [N, T, S, S], t_buckets [T], dtype
    meta.pt        name

These are pickles because upstream reads nothing else. Everything in them loads with `weights_only=True`; the
dtype is a torch.dtype, which upstream can hand to `.to` as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_sampler import __version__
from moe_sampler._files import write_whole
from moe_sampler.data.captions import check_text
from moe_sampler.errors import CheckpointError
from moe_sampler.loading.state_dicts import read_torch
from moe_sampler.tinyflux.features.cache_format import CacheError, Manifest, checksum
from moe_sampler.tinyflux.features.cache_read import FeatureCache
from moe_sampler.tinyflux.features.cache_shards import build_shards
from moe_sampler.tinyflux.features.extraction import CONVENTIONS, Convention, check_buckets

__all__ = ["export_upstream", "import_upstream"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FILES = ("encodings.pt", "lune.pt", "sol.pt", "meta.pt")


def export_upstream(cache: FeatureCache, folder: str | Path, *, name: str | None = None) -> list[Path]:
    """Write upstream's files, all of them or none.

    The text mask has no place in them. Without one of the experts its file is left out.

    Args:
        cache: what to export; its tensors are held in memory, a file's at a time.
        folder: made when missing; existing files are not written over.
        name: for meta.pt; the cache folder's by default.

    Returns:
        The files written.

    Raises:
        CacheError: one of the files is there already.
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


def _write_all(cache: FeatureCache, write: Callable[[str, dict[str, Any]], None], name: str) -> None:
    latents = cache.stacked("latents")
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
    convention: Convention = "tiny-flux-v4",
    shard_size: int = 256,
) -> Manifest:
    """Make a cache of upstream's files.

    Args:
        source: folder with encodings.pt, and lune.pt, sol.pt and meta.pt where they are.
        folder: new, empty, or of an import that was interrupted.
        convention: how the features were extracted; upstream's own files are "tiny-flux-v4", and what
            `export_upstream` wrote is of its cache's convention.
        shard_size: samples a shard.

    The text mask isn't known, so every token counts. Nor are encoders and experts.

    Raises:
        CacheError: a file that can't be read, lacks something, or has more or fewer samples than the others.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f'unknown convention "{convention}": use one of {", ".join(CONVENTIONS)}')
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    source = Path(source)
    encodings = _read(source / "encodings.pt", latents=4, t5_embeds=3, clip_pooled=2)
    prompts = encodings.get("prompts")
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(text, str) for text in prompts):
        raise CacheError(f"{source / 'encodings.pt'}: prompts is not a list of texts")
    try:
        for i, text in enumerate(prompts):
            check_text(text, f"{source / 'encodings.pt'}: prompts[{i}]")
    except ValueError as error:
        raise CacheError(str(error)) from None
    states = encodings["t5_embeds"]
    tensors = {
        "latents": encodings["latents"],
        "prompt_embeds": states,
        "prompt_mask": torch.ones(1, dtype=torch.bool).expand(states.shape[:2]),
        "pooled_prompt_embeds": encodings["clip_pooled"],
    }
    buckets: dict[str, tuple[float, ...]] = {}
    if (source / "lune.pt").exists():
        lune = _read(source / "lune.pt", features=3, t_buckets=1)
        tensors["lune"] = lune["features"]
        buckets["lune.pt"] = _buckets(source / "lune.pt", lune, "features")
    if (source / "sol.pt").exists():
        sol = _read(source / "sol.pt", stats=3, spatial=4, t_buckets=1)
        tensors |= {"sol_stats": sol["stats"].float(), "sol_maps": sol["spatial"].float()}
        buckets["sol.pt"] = _buckets(source / "sol.pt", sol, "stats", "spatial")
    lengths = {"prompts": len(prompts)} | {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(lengths.values())) != 1 or not prompts:
        raise CacheError(f"{source} has tensors of different lengths, or empty ones: {lengths}")
    if len(set(buckets.values())) > 1:
        raise CacheError(f"{source}: lune.pt and sol.pt have different t_buckets")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CacheError(f"{source}: {name} has values that are not finite")
    settings = {
        "source": {
            "kind": "tinyflux",
            "name": _name(source),
            "sha256": {file: checksum(source / file) for file in FILES if (source / file).exists()},
        },
        "t_buckets": list(next(iter(buckets.values()), ())),
        "convention": convention if buckets else None,
        "shard_size": shard_size,
    }
    wanted = Manifest(settings, None, None, len(prompts), (), __version__)

    def shard(first: int, length: int) -> dict[str, Any]:
        span = slice(first, first + length)
        found: dict[str, Any] = {name: tensor[span] for name, tensor in tensors.items()}
        return found | {"captions": list(prompts[span])}

    return build_shards(Path(folder), wanted, lambda first, length: iter([shard(first, length)]))


def _read(file: Path, **dimensions: int) -> dict[str, Any]:
    """The file's dict; the named tensors are there with so many dimensions, floats that the file holds."""
    try:
        values = read_torch(file)
    except CheckpointError as error:
        raise CacheError(str(error)) from None
    if not isinstance(values, Mapping):
        raise CacheError(f"{file} holds a {type(values).__name__} instead of a dict")
    values = dict(values)
    if "t_buckets" in dimensions and isinstance(values.get("t_buckets"), (list, tuple)):
        values["t_buckets"] = _listed_times(file, values["t_buckets"])
    for name, count in dimensions.items():
        value = values.get(name)
        if not isinstance(value, Tensor) or value.ndim != count:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise CacheError(f"{file}: {name} must be a tensor of {count} dimensions, got {shape}")
        plain = value.layout is torch.strided and value.device.type == "cpu" and value.dtype in _FLOATS
        if not plain:
            raise CacheError(
                f"{file}: {name} must be a plain tensor of floats, got {value.dtype}, {value.layout}, on "
                f"{value.device}"
            )
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            # A view that repeats a few numbers: however large it says to be, the file is not.
            raise CacheError(f"{file}: {name} says it has the shape {list(value.shape)}, but holds less")
    return values


def _listed_times(file: Path, times: Sequence[Any]) -> Tensor:
    numbers = [value.item() if isinstance(value, Tensor) and value.numel() == 1 else value for value in times]
    if not all(isinstance(value, int | float) and abs(value) < 1e300 for value in numbers):
        raise CacheError(f"{file}: t_buckets must be numbers")
    return torch.tensor(numbers, dtype=torch.float64)


def _buckets(file: Path, values: Mapping[str, Any], *names: str) -> tuple[float, ...]:
    buckets = values["t_buckets"]
    wrong = [name for name in names if values[name].shape[1] != len(buckets)]
    if wrong:
        raise CacheError(
            f"{file}: {wrong[0]} has {values[wrong[0]].shape[1]} times, t_buckets {len(buckets)}"
        )
    try:
        # Seven digits: 0.05 in float32 is meant to be 0.05.
        return check_buckets([float(f"{value:.7g}") for value in buckets.tolist()])
    except ValueError as error:
        raise CacheError(f"{file}: {error}") from None


def _name(source: Path) -> str:
    if not (source / "meta.pt").exists():
        return source.resolve().name
    name = _read(source / "meta.pt").get("name")
    if not isinstance(name, str):
        raise CacheError(f"{source / 'meta.pt'} has no name")
    try:
        return check_text(name, f"{source / 'meta.pt'}: name")
    except ValueError as error:
        raise CacheError(str(error)) from None
