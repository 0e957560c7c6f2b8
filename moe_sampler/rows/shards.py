"""Rows as pictures in WebDataset's tars. A shard is so many rows; it is written when they are done."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import claim, remove, sweep, write_whole
from .._readers import parse_json
from ..data.listing import METADATA
from ..data.reports import printable, some
from ..pipelines.choices import PICTURE_FORMATS
from .batches import Picture, Unit
from .folder import ERRORS, KIND, PictureFolder, check_same

__all__ = ["ShardFolder"]

_UNFINISHED = ".unfinished"


class ShardFolder:
    """Tars in one folder: KEY.png, KEY.txt with the prompt and KEY.json with the line that metadata.jsonl
    would have. Until its shard is done a picture lies in a hidden folder.

    Args:
        folder: claimed.
        pictures: all that it is to have.
        shard_size: rows a shard.
    """

    def __init__(self, folder: Path, pictures: Sequence[Picture], shard_size: int) -> None:
        self.folder, self._size = folder, shard_size
        self._by_name = {picture.name: picture for picture in pictures}
        self._known: tuple[int, frozenset[str]] = (-1, frozenset())
        self._loose = PictureFolder(folder / _UNFINISHED, pictures)

    def begin(self) -> None:
        """Delete what a killed process left half written, and what was packed. Nobody else may be writing."""
        claim(self._loose.folder, KIND)
        sweep(self.folder, ["*.tar", ERRORS])
        self._loose.begin()
        for name in self._packed():
            remove(self._loose.folder / name)

    def check(self) -> None:
        """As `PictureFolder.check`."""
        loose = [path.name for path in self.folder.iterdir() if path.suffix[1:] in PICTURE_FORMATS]
        if loose or (self.folder / METADATA[0]).exists():
            found = some(sorted(loose) or [METADATA[0]])
            raise ValueError(f"{printable(self.folder)} has {found}, not in shards: give another folder")
        packed = self._packed()
        strange = sorted(packed.keys() - self._by_name.keys())
        if strange:
            raise ValueError(
                f"{printable(self.folder)} has {some(strange)} in its shards, which no row asks for: give "
                "another --output-dir"
            )
        for name, (shard, line) in packed.items():
            picture = self._by_name[name]
            if shard != self._shard(picture):
                raise ValueError(f"{self.folder} has shards of another size: give another --output-dir")
            check_same(f"{self.folder}: {name}", parse_json(line["settings"], name, ValueError), picture)
        self._loose.check()

    def _shard(self, picture: Picture) -> int:
        return (picture.row - 1) // self._size

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.tar"

    def _packed(self) -> dict[str, tuple[int, dict[str, Any]]]:
        """(Shard, its line) of every picture that is in one."""
        found: dict[str, tuple[int, dict[str, Any]]] = {}
        for path in sorted(self.folder.glob("[0-9]*.tar")):
            for data in _members(path, ".json").values():
                line = parse_json(data.decode(), path, ValueError)
                found[line["file_name"]] = int(path.stem), line
        return found

    def is_done(self, unit: Unit) -> bool:
        """Whether nothing of it is left to do."""
        return all(picture.name in self._in_shard(picture) for picture in unit.pictures)

    def is_finished(self, picture: Picture) -> bool:
        """By now."""
        return self._loose.is_finished(picture) or picture.name in self._in_shard(picture)

    def _in_shard(self, picture: Picture) -> frozenset[str]:
        """Names in the shard that a picture belongs to; one shard after the other is asked for."""
        shard = self._shard(picture)
        if self._known[0] != shard:
            path = self._path(shard)
            self._known = shard, frozenset(_members(path, wanted=False) if path.exists() else ())
        return self._known[1]

    def write(self, picture: Picture, image: Any) -> None:
        if not self.is_finished(picture):
            self._loose.write(picture, image)

    def end(self, unit: Unit) -> None:
        """Write a unit's shard of those of its pictures that are finished, and of what it had before."""
        assert unit.shard is not None
        path, pictures = self._path(unit.shard), unit.pictures
        before = _members(path) if path.exists() else {}
        files: dict[str, bytes] = {}
        for picture in sorted(pictures, key=lambda p: (p.row, p.name)):
            key = Path(picture.name).stem
            own = {n: data for n, data in before.items() if n.partition(".")[0] == key}
            loose = self._loose.folder / picture.name
            if not own and loose.exists():
                line = json.dumps(picture.line, ensure_ascii=False)
                own = {
                    picture.name: loose.read_bytes(),
                    f"{key}.txt": picture.own["prompt"].encode(),
                    f"{key}.json": line.encode(),
                }
            files |= own
        if files.keys() - before.keys():
            write_whole(path, lambda temporary: _write_tar(temporary, files))
        for picture in pictures:
            remove(self._loose.folder / picture.name)
        self._known = (-1, frozenset())

    def close(self) -> int:
        """How many pictures are there."""
        return len(self._packed().keys() | self._loose_names())

    def tidy(self) -> None:
        """Nobody writes any more."""
        if not self._loose_names():
            remove(self._loose.folder)

    def _loose_names(self) -> set[str]:
        folder = self._loose.folder
        names = os.listdir(folder) if folder.is_dir() else ()
        return {name for name in names if name.rpartition(".")[2] in PICTURE_FORMATS}


def _members(path: Path, suffix: str = "", *, wanted: bool = True) -> dict[str, bytes]:
    """Files by name, in order. wanted: whether what they hold is."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name.endswith(suffix) else None
                if file is not None:
                    found[member.name] = file.read() if wanted else b""
    except tarfile.TarError as error:
        raise ValueError(f"{printable(path)} cannot be read as a tar: {error}") from None
    return found


def _write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    """The same bytes whoever writes it, and when."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            archive.addfile(member, io.BytesIO(data))
