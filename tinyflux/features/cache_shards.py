"""Shards built by any number of processes, continued after a kill: what `build_cache` and imports share."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from moe_sampler._files import claim, is_ours, remove, sole_user, sweep, write_text, writing
from moe_sampler._readers import read_json, typed
from moe_sampler.errors import CheckpointError
from moe_sampler.tinyflux.features.cache_format import (
    BUILDING,
    MANIFEST,
    CacheError,
    Manifest,
    ShardRecord,
    open_shard,
    pack_captions,
    read_manifest,
    shard_name,
    write_manifest,
    write_shard,
)

__all__ = ["Span", "build_shard", "build_shards"]

KIND = "cache being built"
OWN_NAMES = (MANIFEST, "shard-*", BUILDING)
Span = tuple[int, int, int]  # a shard's index, its first sample, its length


def build_shards(
    folder: Path,
    wanted: Manifest,
    parts: Callable[[int, int], Iterator[dict[str, Any]]],
    progress: Callable[[int, int], None] = lambda done, total: None,
    elsewhere: Callable[[Sequence[Span]], Iterator[int]] | None = None,
) -> Manifest:
    """Build what `wanted` describes, or continue it; `build_cache` says how.

    Args:
        folder, wanted, progress: as `build_cache` has them.
        parts: as `build_shard` takes them.
        elsewhere: does `build_shard` for each of these shards, in any order and wherever, and gives numbers
            of samples as they are done; by default they are built here.
    """
    processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # it doesn't look there itself
    if (folder / MANIFEST).is_file():
        _check_same(folder, read_manifest(folder), wanted)
    elif folder.exists() and (not folder.is_dir() or any(_not_ours(folder))):
        raise CacheError(f"{folder} is not empty and not a cache: give a new folder")
    _check_building(folder)
    processes.wait_for_everyone()
    with ExitStack() as held:
        if processes.is_main_process:
            _begin_building(folder)
            held.enter_context(_lock(folder))
            sweep(folder, OWN_NAMES)
            sweep(folder / BUILDING, OWN_NAMES)
            if not (folder / MANIFEST).is_file():
                write_manifest(folder, wanted)
        processes.wait_for_everyone()
        begun = read_manifest(folder)
        if not begun.complete:
            _build_missing(folder, begun, elsewhere or partial(_here, folder, parts), progress, processes)
        else:
            for record in begun.shards:
                open_shard(folder, record, whole=True)
            processes.wait_for_everyone()
        if processes.is_main_process:
            remove(folder / BUILDING)
    return read_manifest(folder)


def build_shard(
    folder: Path, span: Span, parts: Callable[[int, int], Iterator[dict[str, Any]]]
) -> Iterator[int]:
    """Compute a shard, write it and then its record; gives numbers of samples as they are computed.

    parts: (first sample, length) of a shard to its tensors by name and list of `captions`, in one or several
    parts.
    """
    index, first, length = span
    found = []
    for part in parts(first, length):
        found.append(part)
        yield len(part["captions"])
    _write_record(folder, write_shard(folder, index, first, _joined(found)))


def _here(
    folder: Path, parts: Callable[[int, int], Iterator[dict[str, Any]]], spans: Sequence[Span]
) -> Iterator[int]:
    for span in spans:
        yield from build_shard(folder, span, parts)


def _build_missing(
    folder: Path,
    begun: Manifest,
    build: Callable[[Sequence[Span]], Iterator[int]],
    progress: Callable[[int, int], None],
    processes: PartialState,
) -> None:
    shards = _spans(begun.length, begun.settings["shard_size"])
    records = [_read_record(folder, span) for span in shards]
    processes.wait_for_everyone()  # so that all see the same shards missing
    share = slice(processes.process_index, None, processes.num_processes)
    for record in [record for record in records if record is not None][share]:
        open_shard(folder, record, whole=True)
    mine = [span for span, record in zip(shards, records, strict=True) if record is None][share]
    total, done = sum(length for _, _, length in mine), 0
    progress(0, total)
    for count in build(mine) if mine else ():
        done += count
        progress(done, total)
    processes.wait_for_everyone()
    if processes.is_main_process:
        records = [_read_record(folder, span) for span in shards]
        for span, record in zip(shards, records, strict=True):
            if record is None:
                raise CacheError(f"{folder / shard_name(span[0])} was not built: did a process fail?")
            open_shard(folder, record, whole=False)
        write_manifest(folder, replace(begun, shards=tuple(records)))
    processes.wait_for_everyone()


def _spans(count: int, size: int) -> list[Span]:
    return [(i, first, min(size, count - first)) for i, first in enumerate(range(0, count, size))]


def _check_same(folder: Path, begun: Manifest, wanted: Manifest) -> None:
    changed = begun.differences(wanted)
    if changed:
        raise CacheError(
            f"{folder} was begun with other settings ({'; '.join(changed)}): use those, or another folder"
        )


def _not_ours(folder: Path) -> Iterator[Path]:
    """What a killed build that had not yet written its manifest would not have left."""
    for path in folder.iterdir():
        begun = path.name == BUILDING and is_ours(path, KIND)
        unfinished = path.suffix == ".tmp" and path.name.startswith((f".{MANIFEST}.", f".{BUILDING}."))
        if not begun and not unfinished:
            yield path


def _check_building(folder: Path) -> None:
    """What stands where records are going to be must be ours."""
    building = folder / BUILDING
    if (building.exists() or building.is_symlink()) and not is_ours(building, KIND):
        raise CacheError(
            f"{building} was not made by a build of a cache: move it away, or give another folder"
        )


def _begin_building(folder: Path) -> None:
    """The folder of records, which has its mark before it has its name."""
    building = folder / BUILDING
    if not building.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with writing(building):
            made = Path(tempfile.mkdtemp(dir=folder, prefix=f".{BUILDING}.", suffix=".tmp"))
            try:
                made.chmod(0o755)
                claim(made, KIND)
                made.rename(building)
            except BaseException:
                remove(made)
                raise


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    try:
        with sole_user(folder / BUILDING, "built"):
            yield
    except CheckpointError as error:
        raise CacheError(str(error)) from None


def _record_file(folder: Path, index: int) -> Path:
    return (folder / BUILDING / shard_name(index)).with_suffix(".json")


def _write_record(folder: Path, record: ShardRecord) -> None:
    file = folder / BUILDING / Path(record.file).with_suffix(".json").name
    write_text(file, json.dumps(asdict(record)))


def _read_record(folder: Path, span: Span) -> ShardRecord | None:
    file = _record_file(folder, span[0])
    if not file.is_file():
        return None
    try:
        record = typed(ShardRecord, read_json(file), "record")
    except (ValueError, TypeError) as error:
        raise CacheError(f"{file} is damaged ({error}): delete it, and its shard is built again") from None
    if (record.file, record.first, record.length) != (shard_name(span[0]), *span[1:]):
        raise CacheError(f"{file} describes another shard: delete it, and its shard is built again")
    return record


def _joined(parts: list[dict[str, Any]]) -> dict[str, Tensor]:
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "captions"}
    return tensors | pack_captions([caption for part in parts for caption in part["captions"]])
