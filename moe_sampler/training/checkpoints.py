"""Checkpoints on disk: whole or not there, checked by SHA-256 when read, never a pickle.

    checkpoint-500/
        model.safetensors       every parameter and buffer
        ema.safetensors         the averaged weights, float32
        optimizer.safetensors   moments as `<parameter>|<moment>`
        random-0.safetensors    generators of process 0, and one such file for each other
        state.json              step, settings, the files' checksums and its own

A checkpoint is written to a hidden folder beside its place, brought to the disk and renamed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._files import remove, replace_folder, sweep, write_text, write_whole
from .._readers import read_json
from ..data.reports import say
from ..errors import CheckpointError

__all__ = [
    "check_space",
    "checkpoint_folders",
    "find_checkpoint",
    "finish_checkpoint",
    "partial_folder",
    "read_state",
    "read_tensors",
    "rotate",
    "write_tensors",
]

STATE = "state.json"
_SUM = "sha256"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Folders by the name of checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def find_checkpoint(output_dir: Path, wanted: str | None) -> Path | None:
    """The checkpoint to continue from: "latest" (the newest whole one; None where there are none), "no",
    or a folder. A warning names the damaged one that was passed over.

    Raises:
        CheckpointError: a folder that isn't there; checkpoints of which none is whole.
    """
    if wanted in (None, "no"):
        return None
    if wanted == "latest":
        return _newest_whole(output_dir)
    for folder in (Path(wanted), output_dir / wanted):
        if (folder / STATE).is_file():
            return folder
    raise CheckpointError(f"{wanted} is no checkpoint: it has no {STATE}")


def _newest_whole(output_dir: Path) -> Path | None:
    problems: list[str] = []
    for folder in reversed(checkpoint_folders(output_dir)):
        try:
            for name in (state := read_state(folder))["files"]:
                _check_sum(folder, name, state)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if problems:
            say(f"{problems[0]}; continuing from {folder}, which is whole")
        return folder
    if problems:
        raise CheckpointError(f"{problems[0]}; no other checkpoint is whole: choose another output_dir")
    return None


def partial_folder(output_dir: Path, step: int) -> Path:
    """Where a checkpoint is written before it is whole."""
    return output_dir / f".checkpoint-{step}.partial"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not there, brought to the disk.

    Raises:
        OSError: it can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_whole(path, lambda temporary: save_file(own, temporary, metadata))


def read_tensors(
    folder: Path, name: str, state: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(The tensors of one of a checkpoint's files, its metadata), after its checksum was compared."""
    path = folder / name
    if name not in state["files"]:
        raise CheckpointError(f"{folder} has no {name}")
    _check_sum(folder, name, state)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _check_sum(folder: Path, name: str, state: Mapping[str, Any]) -> None:
    path = folder / name
    try:
        if _sha256(path) != state["files"][name]:
            raise CheckpointError(f"{path} is damaged: its checksum is not the one it was written with")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def finish_checkpoint(partial: Path, folder: Path, state: dict[str, Any]) -> None:
    """Write the state of a complete partial folder and give it its name."""
    files = {path.name: _sha256(path) for path in sorted(partial.iterdir()) if path.name != STATE}
    whole = state | {"files": files}
    write_text(partial / STATE, json.dumps(whole | {_SUM: _digest(whole)}, indent=1) + "\n")
    replace_folder(partial, folder)  # there is one of a run that was resumed from an earlier step


def _digest(state: Mapping[str, Any]) -> str:
    """SHA-256 of everything in a state.json but itself."""
    plain = json.dumps({name: state[name] for name in state if name != _SUM}, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state.json.

    Raises:
        CheckpointError: missing, not readable, or not as it was written; a file of the checkpoint that is
            missing.
    """
    path = folder / STATE
    state = read_json(path)
    if state.get(_SUM) != _digest(state) or not isinstance(state.get("files"), dict):
        raise CheckpointError(f"{path} is damaged: its checksum is not the one it was written with")
    missing = [name for name in state["files"] if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}")
    return state


def rotate(output_dir: Path, limit: int) -> None:
    """Remove all but the newest `limit` checkpoints, and what unfinished ones left."""
    whole = [folder for folder in checkpoint_folders(output_dir) if (folder / STATE).is_file()]
    for old in whole[:-limit]:
        remove(old)
    sweep(output_dir, ("checkpoint-*",))


def check_space(output_dir: Path, needed: int) -> None:
    """Raise an error if `output_dir` can't be written to, or its disk has less than `needed` bytes left."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
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
