"""Digests of files' contents, each file read once: they are kept with the file's size and times.

They lie in the user's cache folder (XDG_CACHE_HOME, else ~/.cache), below moe-sampler/digests. An entry
counts only while size, inode and both times are what they were; the time of the last change can't be set back
by `touch` or `cp -p`, so a file that was painted over is read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .._readers import read_json
from ..errors import CheckpointError

__all__ = ["cache_home", "content", "fingerprint", "remembered"]

_UNSETTLED = 2_000_000_000
"""ns: a file changed so recently might change again within one tick of its file system's clock."""
_MOST_BYTES = 2**31
_SHA256 = re.compile("[0-9a-f]{64}")
_Stamp = list[int]


def content(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(rows: Sequence[object]) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def remembered(owner: str, files: Mapping[str, Path], digest: Callable[[str], str]) -> dict[str, str]:
    """The digest of each file, by its name.

    Args:
        owner: which data set; one index each.
        files: by name.
        digest: of a name, where the index doesn't have it; called by several threads.

    Raises:
        OSError: a file that can't be read.
    """
    index = cache_home() / "moe-sampler" / "digests" / f"{fingerprint([owner])[:32]}.json"
    known = _read(index)
    stamps = {name: _stamp(path) for name, path in files.items()}
    found = {name: known[name][1] for name in files if name in known and known[name][0] == stamps[name]}
    missing = [name for name in files if name not in found]
    if missing:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found |= zip(missing, pool.map(digest, missing), strict=True)
        now = time.time_ns()
        settled = {name for name in files if max(stamps[name][2:]) < now - _UNSETTLED}
        _write(index, {name: (stamps[name], found[name]) for name in files if name in settled})
    return {name: found[name] for name in files}


def cache_home() -> Path:
    """The user's, for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _stamp(path: Path) -> _Stamp:
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _read(index: Path) -> dict[str, tuple[_Stamp, str]]:
    """Nothing where there is no index, and no entry that isn't one of ours: it only saves time."""
    try:
        entries = read_json(index, most=_MOST_BYTES)
    except CheckpointError:
        return {}
    return {name: (entry[0], entry[1]) for name, entry in entries.items() if _is_entry(entry)}


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], list):
        return False
    return isinstance(entry[1], str) and _SHA256.fullmatch(entry[1]) is not None


def _write(index: Path, entries: Mapping[str, tuple[_Stamp, str]]) -> None:
    """Whole or not at all; a folder that can't be written to costs the time of reading again."""
    temporary = None
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=index.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(entries, file)
        os.replace(temporary, index)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
