"""What upstream TinyFlux's builders write, read and checked.

    encodings.pt   latents [N, C, h, w], t5_embeds [N, L, D], clip_pooled [N, P], prompts, dtype
    lune.pt        features [N, T, channels], t_buckets [T], dtype
    sol.pt         stats [N, T, 3], spatial [N, T, S, S], t_buckets [T], dtype
    meta.pt        name

or, from its incremental and streaming builders, the same in parts (saving the whole drops the prompts):

    state.json     name, n_samples, build_lune, build_sol and what is done
    encodings/shard_0000.pt ..., lune/shard_0000.pt ..., sol/shard_0000.pt ...
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_sampler._readers import read_json
from moe_sampler.data.captions import check_text
from moe_sampler.data.reports import say
from moe_sampler.errors import CheckpointError
from moe_sampler.loading.state_dicts import read_torch
from moe_sampler.tinyflux.features.cache_format import CacheError
from moe_sampler.tinyflux.features.extraction import check_buckets

__all__ = ["FILES", "Part", "UpstreamCache", "read_upstream"]

FILES = ("encodings.pt", "lune.pt", "sol.pt", "meta.pt")
_STATE = "state.json"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Part:
    """Some of a cache's samples: our tensors by name, mapped from their files, and the prompts, if they are
    there."""

    tensors: dict[str, Tensor]
    prompts: list[str] | None
    buckets: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.tensors["latents"])


@dataclass(frozen=True)
class UpstreamCache:
    """All of it. files: that were read."""

    name: str
    parts: tuple[Part, ...]
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def buckets(self) -> tuple[float, ...]:
        return self.parts[0].buckets

    def span(self, first: int, length: int) -> dict[str, Any]:
        """Tensors and captions of samples in a row."""
        pieces: dict[str, list[Tensor]] = {name: [] for name in self.parts[0].tensors}
        captions: list[str] = []
        start = 0
        for part in self.parts:
            rows = slice(max(first - start, 0), max(min(first + length - start, len(part)), 0))
            for name, tensor in part.tensors.items():
                pieces[name].append(tensor[rows])
            captions += (part.prompts or [""] * len(part))[rows]
            start += len(part)
        return {name: torch.cat(found) for name, found in pieces.items()} | {"captions": captions}


def read_upstream(source: Path) -> UpstreamCache:
    """What lies in a folder of upstream's.

    Raises:
        CacheError: a file that can't be read, lacks something, or has more or fewer samples than the others;
            a build that wasn't finished.
    """
    if (source / "encodings.pt").exists() or not (source / _STATE).is_file():
        files = {name: source / f"{name}.pt" for name in ("encodings", "lune", "sol")}
        found = {name: file for name, file in files.items() if name == "encodings" or file.exists()}
        meta = [source / "meta.pt"] if (source / "meta.pt").exists() else []
        return UpstreamCache(_name(source), (_part(found),), (*found.values(), *meta))
    return _read_shards(source)


def _read_shards(source: Path) -> UpstreamCache:
    state = read_json(source / _STATE, CacheError)
    wanted, name = state.get("n_samples"), state.get("name", source.resolve().name)
    if not isinstance(wanted, int) or not isinstance(name, str):
        raise CacheError(f"{source / _STATE} is none of upstream's: it must have name and n_samples")
    kinds = ["encodings", *(kind for kind in ("lune", "sol") if state.get(f"build_{kind}"))]
    shards = {kind: _numbered(source / kind) for kind in kinds}
    count = len(shards["encodings"])
    for kind, files in shards.items():
        absent = [i for i in range(max(count, 1)) if i not in files]
        if absent or len(files) != count:
            raise CacheError(
                f"{source / kind} lacks shard_{(absent or [count])[0]:04d}.pt: the build wasn't finished; "
                "let upstream's builder end it"
            )
    parts = tuple(_part({kind: shards[kind][i] for kind in kinds}) for i in range(count))
    for one, other in itertools.pairwise(parts):
        shapes = [{name: tensor.shape[1:] for name, tensor in part.tensors.items()} for part in (one, other)]
        if shapes[0] != shapes[1] or one.buckets != other.buckets:
            raise CacheError(f"{source}: its shards have different shapes or t_buckets")
    found = UpstreamCache(
        _checked(name, source / _STATE),
        parts,
        (source / _STATE, *(f for k in kinds for f in shards[k].values())),
    )
    # A stream may have ended before as many samples came as were asked for.
    if len(found) != wanted and not ("completed_chunks" in state and len(found) < wanted):
        raise CacheError(
            f"{source} has {len(found)} samples, {_STATE} says {wanted}: the build wasn't finished; let "
            "upstream's builder end it"
        )
    if len(found) != wanted:
        say(f"{source} has {len(found)} samples of the {wanted} that its builder was asked for")
    return found


def _numbered(folder: Path) -> dict[int, Path]:
    """Shards by number, in order."""
    names = {path: re.fullmatch(r"shard_(\d{4,})\.pt", path.name) for path in folder.glob("*.pt")}
    return dict(sorted((int(match[1]), path) for path, match in names.items() if match))


def _part(files: Mapping[str, Path]) -> Part:
    """Of an encodings file, and of lune's and sol's of the same samples."""
    source = files["encodings"].parent
    encodings = _read(files["encodings"], latents=4, t5_embeds=3, clip_pooled=2)
    states = encodings["t5_embeds"]
    tensors = {
        "latents": encodings["latents"],
        "prompt_embeds": states,
        "prompt_mask": torch.ones(1, dtype=torch.bool).expand(states.shape[:2]),
        "pooled_prompt_embeds": encodings["clip_pooled"],
    }
    buckets: dict[str, tuple[float, ...]] = {}
    if "lune" in files:
        lune = _read(files["lune"], features=3, t_buckets=1)
        tensors["lune"] = lune["features"]
        buckets["lune"] = _buckets(files["lune"], lune, "features")
    if "sol" in files:
        sol = _read(files["sol"], stats=3, spatial=4, t_buckets=1)
        tensors |= {"sol_stats": sol["stats"].float(), "sol_maps": sol["spatial"].float()}
        buckets["sol"] = _buckets(files["sol"], sol, "stats", "spatial")
    prompts = _prompts(files["encodings"], encodings)
    lengths = {name: len(tensor) for name, tensor in tensors.items()}
    if prompts is not None:
        lengths["prompts"] = len(prompts)
    if len(set(lengths.values())) != 1 or not len(states):
        raise CacheError(f"{source} has tensors of different lengths, or empty ones: {lengths}")
    if len(set(buckets.values())) > 1:
        raise CacheError(f"{source}: Lune's and Sol's files have different t_buckets")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CacheError(f"{source}: {name} has values that are not finite")
    return Part(tensors, prompts, next(iter(buckets.values()), ()))


def _prompts(file: Path, encodings: Mapping[str, Any]) -> list[str] | None:
    prompts = encodings.get("prompts")
    if prompts is None and "prompts" in encodings:
        return None
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(text, str) for text in prompts):
        raise CacheError(f"{file}: prompts is not a list of texts")
    return [_checked(text, f"{file}: prompts[{i}]") for i, text in enumerate(prompts)]


def _checked(text: str, what: str | Path) -> str:
    try:
        return check_text(text, str(what))
    except ValueError as error:
        raise CacheError(str(error)) from None


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
    return _checked(name, f"{source / 'meta.pt'}: name")
