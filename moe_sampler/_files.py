"""Files that outlast a power cut, and folders that are ours by proof: a mark in them, not their name.

A folder that this package writes to, and may later delete from, has a file `.moe-sampler` that says what kind
of folder it is. That file is also what a process locks while it works there. Links are never followed out of
such a folder: what is deleted or replaced is the link.
"""

from __future__ import annotations

import fcntl
import fnmatch
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from .errors import CheckpointError, first_line

__all__ = [
    "MARK",
    "check_ours",
    "claim",
    "is_ours",
    "local_place",
    "remove",
    "replace_folder",
    "sole_user",
    "sweep",
    "to_disk",
    "whole_folder",
    "write_text",
    "write_whole",
    "writing",
]

MARK = ".moe-sampler"
_REMOVED = ".removed"


def local_place(text: str) -> str:
    """A local path in full, so that it means the same from another folder; a hub id as it is."""
    return str(Path(text).resolve()) if Path(text).exists() else text


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Files


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write` beside `path`, bring that to the disk and give it its name; a kill leaves all or nothing.

    Where `path` is a link, the link is replaced, not what it points to.

    Raises:
        OSError: it can't be written, such as on a full disk: the error names `path`, and nothing is left.
    """
    temporary = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        to_disk(temporary)
        os.replace(temporary, path)
        temporary = None
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is each of these to some library
        raise _cannot_be_written(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    to_disk(path.parent)


_CANNOT = " cannot be written: "


def _cannot_be_written(path: Path, error: Exception) -> OSError:
    reason = getattr(error, "strerror", None) or first_line(error)
    if "inline_container" in reason:  # torch.save keeps the system's own reason to itself
        reason = "it ended in the middle. Is the disk full?"
    return OSError(f"{path}{_CANNOT}{reason.rpartition(_CANNOT)[2]}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Where several files are written to become `path`, whatever goes wrong names it.

    Raises:
        OSError: one line, in place of what a library says of a full disk.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _cannot_be_written(path, error) from error


def write_text(path: Path, text: str) -> None:
    """`write_whole` of UTF-8."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Folders


def is_ours(folder: Path, kind: str) -> bool:
    """Whether it is a folder, not a link to one, with a mark of that kind."""
    mark = folder / MARK
    try:
        if not stat.S_ISREG(mark.lstat().st_mode) or folder.is_symlink():
            return False
        with open(mark, encoding="utf-8") as file:
            # An empty one is of a process that was killed as it made the mark.
            return file.read(200).strip() in ("", kind)
    except (OSError, UnicodeDecodeError):
        return False


def check_ours(folder: Path, kind: str, names: Sequence[str]) -> None:
    """Raise CheckpointError where writing `names` (patterns) to `folder` would touch what isn't ours.

    A folder may be new, ours, or hold other things that have none of these names. Links by these names are
    refused even in a folder of ours.
    """
    place = folder.resolve()
    if not place.exists():
        return
    if not place.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    present = [path for path in sorted(place.iterdir()) if any(fnmatch.fnmatch(path.name, n) for n in names)]
    links = [path.name for path in present if path.is_symlink()]
    if links:
        raise CheckpointError(f"{folder / links[0]} is a link, which is not followed: remove it")
    if present and not is_ours(place, kind):
        raise CheckpointError(
            f"{folder} has a {present[0].name} and is not the folder of a {kind}: give another folder (if it "
            f"is one, copied without hidden files, put an empty file named {MARK} into it)"
        )


def claim(folder: Path, kind: str, names: Sequence[str] = ("*",)) -> None:
    """Make `folder`, or make it ours where `check_ours` allows it."""
    check_ours(folder, kind, names)
    folder.mkdir(parents=True, exist_ok=True)
    if not is_ours(folder.resolve(), kind):
        with writing(folder / MARK), _open_mark(folder) as file:
            file.write(f"{kind}\n".encode())


def _open_mark(folder: Path) -> BinaryIO:
    """Never through a link, and without truncating what is there."""
    mark = folder / MARK
    try:
        descriptor = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise CheckpointError(f"{mark} cannot be opened, or is a link: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{mark} is not a regular file: remove it")
    return os.fdopen(descriptor, "r+b")


@contextmanager
def sole_user(folder: Path, doing: str) -> Iterator[None]:
    """Within the context no other process, nor another such context of this one, works in a claimed folder.

    Raises:
        CheckpointError: another does: "<folder> is being <doing> by another process".
    """
    with _open_mark(folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{folder} is being {doing} by another process") from None
        yield


def remove(path: Path) -> None:
    """Delete a file, a link (not what it points to), or a folder, which is renamed first: so that a kill
    leaves none that is half deleted under its own name. `sweep` deletes what was left. Nothing there is fine.
    """
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.is_dir():
        if path.name.endswith(_REMOVED):
            shutil.rmtree(path)
            return
        # One dot: `.best.partial` becomes what `sweep` knows, too.
        prefix = f".{path.name.removeprefix('.')}."
        doomed = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix, suffix=_REMOVED))
        path.rename(doomed)
        shutil.rmtree(doomed)


def sweep(folder: Path, names: Sequence[str]) -> None:
    """In a folder of ours, delete what a killed process left of writing or deleting `names` (patterns)."""
    for path in folder.iterdir():
        own = any(fnmatch.fnmatch(path.name, f".{name}.*") for name in names)
        if own and path.name.endswith((".tmp", ".partial", _REMOVED)):
            remove(path)


def replace_folder(new: Path, path: Path) -> None:
    """Give a finished folder the name `path`; what had it before is deleted. Both are brought to the disk."""
    to_disk(new)
    if path.is_symlink() or path.is_file():
        path.unlink()
    if path.exists():
        doomed = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_REMOVED))
        path.rename(doomed)
        new.rename(path)
        to_disk(path.parent)
        shutil.rmtree(doomed)
    else:
        new.rename(path)
        to_disk(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to write to, whose files get their places in the folder `path` afterwards, over those that
    have their names there; if anything goes wrong, none does.

    Raises:
        OSError: it can't be written; the error names `path`.
    """
    path = path.resolve()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
        try:
            yield partial
            files = sorted(file for file in partial.rglob("*") if not file.is_dir())
            for file in files:
                to_disk(file)
            for file in files:
                own = path / file.relative_to(partial)
                own.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, own)
        finally:
            remove(partial)
