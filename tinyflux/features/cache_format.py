"""How a cache lies on disk: safetensors shards, and a manifest that says what they hold and how it was made.

    manifest.json               settings, encoders, experts, and every shard's length, size and SHA-256
    shard-00000.safetensors     samples 0 ... shard_size - 1, then the next ones

A file is written beside its name, brought to the disk and renamed, so it exists whole or not at all. While a
cache is being built its manifest lists no shards; every finished shard has a record in `building/` instead.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_sampler._files import write_text, write_whole
from moe_sampler._readers import parse_json, read_json, read_regular, typed

__all__ = ["SCHEMA", "TENSORS", "CacheError", "LatentFacts", "Manifest", "ShardRecord", "read_manifest"]

SCHEMA = 1
MANIFEST = "manifest.json"
BUILDING = "building"
_KEY = "moe-sampler"
TENSORS = {
    "latents": "[N, C, h, w], the student's",
    "expert_latents": "[N, C, h, w], the experts', where they have a VAE of their own",
    "prompt_embeds": "[N, L, D]",
    "prompt_mask": "bool [N, L], True where a token counts",
    "pooled_prompt_embeds": "[N, P]",
    "lune": "[N, T, channels], where Lune taught",
    "sol_stats": "float32 [N, T, 3], where Sol taught",
    "sol_maps": "float32 [N, T, S, S], where Sol taught",
    "block_maps": "[N, M, channels, h, w], a block's output at M times of its own, where that was asked for",
    "loss_mask": "uint8 [N, h, w], how much each latent pixel counts, where there were masks",
    "previews": "uint8 [N, h, w, 3], small pictures, where there were images",
    "captions": "uint8, the captions' UTF-8, one after the other",
    "caption_ends": "int64 [N], where each ends",
}
"""What a shard of N samples holds."""


class CacheError(ValueError):
    """A cache that cannot be read or continued, with the reason and the file's name."""


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard. first: index of its first sample. shapes: of one sample's tensors, with dtype."""

    file: str
    first: int
    length: int
    bytes: int
    sha256: str
    shapes: dict[str, list[Any]]


@dataclass(frozen=True)
class LatentFacts:
    """What a student's config remembers for sampling, where these are explained; None is the VAE's own."""

    text_mask: bool
    latent_scale: float | None
    latent_shift: float
    schedule: Literal["noise", "data"]


@dataclass(frozen=True)
class Manifest:
    """The whole of manifest.json.

    Args:
        settings: what the cache was asked for; a cache is only continued with the same ones.
        encoders, experts: what made it, with fingerprints; None for what isn't known of an imported cache.
        length: samples in all.
        shards: finished shards in order; empty until all are.
        version: of this package, when the cache was begun.
    """

    settings: dict[str, Any]
    encoders: dict[str, Any] | None
    experts: dict[str, Any] | None
    length: int
    shards: tuple[ShardRecord, ...]
    version: str
    schema: int = SCHEMA

    @property
    def complete(self) -> bool:
        return bool(self.shards)

    @property
    def t_buckets(self) -> tuple[float, ...]:
        return tuple(self.settings["t_buckets"])

    @property
    def latents(self) -> LatentFacts:
        """What its latents and texts are like; of caches before these were said, what they were then."""
        vae = (self.encoders or {}).get("vae")
        vae = vae if isinstance(vae, Mapping) else {}
        before = {
            "text_mask": self.encoders is not None,
            "latent_scale": vae.get("scaling_factor"),
            "latent_shift": vae.get("shift_factor", 0.0),
            "schedule": "noise" if self.settings.get("convention") != "tiny-flux-v4" else "data",
        }
        return typed(LatentFacts, before | self.settings.get("latents", {}), "manifest.settings.latents")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises TypeError or ValueError: no manifest; it says what of it."""
        manifest = typed(cls, parse_json(text, "the manifest", ValueError), "manifest")
        for name, kinds in (("t_buckets", (int, float)), ("shard_size", int)):
            values = manifest.settings.get(name, [])
            for value in values if isinstance(values, list) else [values]:
                if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value):
                    raise TypeError(f"manifest.settings.{name} is {value!r}")
        manifest.latents  # noqa: B018 - or it raises
        if not isinstance(manifest.settings.get("t_buckets"), list):
            raise TypeError("manifest.settings.t_buckets must be a list")
        if not 1 <= manifest.settings.get("shard_size", 0) < 2**31 or not 1 <= manifest.length < 2**40:
            raise ValueError("manifest.length and settings.shard_size must be positive, and not absurd")
        return manifest

    def differences(self, other: Manifest) -> list[str]:
        """Where `other` asks for something else, as 'settings.seed: 0, now 1'."""
        mine, theirs = asdict(self), asdict(other)
        names = ("schema", "settings", "encoders", "experts", "length")
        return [line for name in names for line in _differences(name, mine[name], theirs[name])]


def _differences(name: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in _differences(f"{name}.{key}", old.get(key), new.get(key))]
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
        old, new = list(old), list(new)
    return [] if old == new else [f"{name}: {_short(old)}, now {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def read_manifest(folder: str | Path) -> Manifest:
    """Raises CacheError: not a cache, or one of another schema version."""
    file = Path(folder) / MANIFEST
    if not file.exists():
        raise CacheError(f"{folder} is not a cache: {file} cannot be read (no such file)")
    text = read_regular(file, CacheError)
    schema = read_json(file, CacheError).get("schema")
    if schema != SCHEMA:
        raise CacheError(f"{file} has schema version {schema!r}, this package reads {SCHEMA}")
    try:
        return Manifest.from_json(text)
    except (ValueError, TypeError) as error:
        raise CacheError(f"{file} is damaged: {error}") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_text(folder / MANIFEST, manifest.to_json())


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def pack_captions(captions: list[str]) -> dict[str, Tensor]:
    """The shard's tensors `captions` and `caption_ends`."""
    encoded = [caption.encode("utf-8") for caption in captions]
    ends = torch.tensor([len(text) for text in encoded], dtype=torch.int64).cumsum(0)
    joined = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8) if any(encoded) else None
    return {"captions": torch.empty(0, dtype=torch.uint8) if joined is None else joined, "caption_ends": ends}


def unpack_caption(captions: Tensor, ends: Tensor, index: int) -> str:
    start = int(ends[index - 1]) if index else 0
    return bytes(captions[start : int(ends[index])].tolist()).decode("utf-8")


def write_shard(folder: Path, index: int, first: int, tensors: Mapping[str, Tensor]) -> ShardRecord:
    """Write a shard whole; tensors as `TENSORS` says."""
    length = len(tensors["caption_ends"])
    file = folder / shard_name(index)
    # One key: the order of several is not the same from run to run.
    metadata = {_KEY: json.dumps({"schema": SCHEMA, "first": first, "length": length})}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_whole(file, lambda path: save_file(contiguous, path, metadata))
    return ShardRecord(
        file.name, first, length, file.stat().st_size, checksum(file), sample_shapes(contiguous)
    )


def sample_shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    return {
        name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape[1:]]
        for name, tensor in sorted(tensors.items())
        if name not in ("captions", "caption_ends")
    }


def checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def open_shard(folder: Path, record: ShardRecord, *, whole: bool) -> dict[str, Tensor]:
    """The shard's tensors, mapped from the file and not read until they are used.

    whole: also compare the checksum, which reads everything once.

    Raises:
        CacheError: missing, cut off, changed, or not the shard that the record describes.
    """
    file = folder / record.file
    advice = "build the cache again, or copy this file from where it is whole"
    try:
        size = file.stat().st_size
    except OSError:
        raise CacheError(f"{file} is missing: {advice}") from None
    if size != record.bytes:
        raise CacheError(f"{file} has {size} bytes instead of {record.bytes}: {advice}")
    if whole and checksum(file) != record.sha256:
        raise CacheError(f"{file} has changed since it was written (its SHA-256 differs): {advice}")
    try:
        with safe_open(file, framework="pt") as opened:
            about = parse_json((opened.metadata() or {}).get(_KEY, "{}"), file, CacheError)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{file} cannot be read ({error}): {advice}") from None
    expected = {"schema": SCHEMA, "first": record.first, "length": record.length}
    if about != expected:
        raise CacheError(f"{file} holds {about} instead of {expected}, so files were exchanged: {advice}")
    lengths = {name: len(tensor) for name, tensor in tensors.items() if name != "captions"}
    if set(lengths.values()) != {record.length} or sample_shapes(tensors) != record.shapes:
        raise CacheError(f"{file} holds other tensors than the manifest says: {advice}")
    return tensors
