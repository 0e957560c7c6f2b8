"""Checkpoints on disk: whole or not there, checked by SHA-256 when read, never a pickle.

    checkpoint-500/
        model.safetensors       every parameter and buffer
        ema.safetensors         the averaged weights, float32
        optimizer.safetensors   moments as `<parameter>|<moment>`
        random-0.safetensors    generators of process 0, and one such file for each other
        state.json              step, settings, and the files' checksums

A checkpoint is written to a hidden folder beside its place, brought to the disk and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .._files import to_disk
from ..errors import CheckpointError

__all__ = [
    "check_space",
    "checkpoint_folders",
    "find_checkpoint",
    "finish_checkpoint",
    "partial_folder",
    "read_metadata",
    "read_state",
    "read_tensors",
    "rotate",
    "write_tensors",
]

STATE = "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def find_checkpoint(output_dir: Path, wanted: str | None) -> Path | None:
    """The checkpoint to continue from: "latest" (None if there is none), "no", or a folder.

    Raises:
        CheckpointError: a folder that isn't there.
    """
    if wanted in (None, "no"):
        return None
    if wanted == "latest":
        return next(iter(reversed(checkpoint_folders(output_dir))), None)
    for folder in (Path(wanted), output_dir / wanted):
        if (folder / STATE).is_file():
            return folder
    raise CheckpointError(f"{wanted} is no checkpoint: it has no {STATE}")


def partial_folder(output_dir: Path, step: int) -> Path:
    """Where a checkpoint is written before it is whole."""
    return output_dir / f".checkpoint-{step}.partial"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, brought to the disk. An error removes nothing but itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata)
    except SafetensorError as error:  # what a full disk is to safetensors
        raise OSError(str(error)) from None
    to_disk(path)


def read_tensors(folder: Path, name: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of one of a checkpoint's files, compared with its checksum."""
    path = folder / name
    if name not in state["files"]:
        raise CheckpointError(f"{folder} has no {name}")
    try:
        if _sha256(path) != state["files"][name]:
            raise CheckpointError(f"{path} is damaged: its checksum is not the one it was written with")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def read_metadata(path: Path) -> str:
    """What `write_tensors` was given to write beside random states: its "rest"."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()["rest"]


def finish_checkpoint(partial: Path, folder: Path, state: dict[str, Any]) -> None:
    """Write the state of a complete partial folder and give it its name."""
    files = {path.name: _sha256(path) for path in sorted(partial.iterdir()) if path.name != STATE}
    path = partial / STATE
    path.write_text(json.dumps(state | {"files": files}, indent=1) + "\n", encoding="utf-8")
    to_disk(path)
    to_disk(partial)
    if folder.exists():  # of a run that was resumed from an earlier step
        shutil.rmtree(folder)
    partial.rename(folder)
    to_disk(folder.parent)


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state.json.

    Raises:
        CheckpointError: missing or not readable; a file of the checkpoint that is missing.
    """
    path = folder / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in state["files"] if not (folder / name).is_file()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}")
    return state


def rotate(output_dir: Path, limit: int) -> None:
    """Remove all but the newest `limit` checkpoints, and what unfinished ones left."""
    for old in checkpoint_folders(output_dir)[:-limit]:
        shutil.rmtree(old)
    for partial in output_dir.glob(".checkpoint-*.partial"):
        shutil.rmtree(partial)


def check_space(output_dir: Path, needed: int) -> None:
    """Raise an error if `output_dir` can't be written to, or its disk has less than `needed` bytes left."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"{output_dir} cannot be written to: {error.strerror or error}") from None
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise CheckpointError(
            f"{output_dir} has {free / 1e9:.2f} GB left, the run's checkpoints need {needed / 1e9:.2f} GB: "
            "free some space, or lower checkpoints_total_limit"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
