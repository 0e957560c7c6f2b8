"""Where a model is: on this machine, or on the Hugging Face hub, of which only what is used is downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ..errors import CheckpointError, first_line

__all__ = ["SUFFIXES", "WEIGHTS", "Hub", "Place", "component_patterns", "component_variant", "is_hub_id"]

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
"""Of files that hold tensors."""

WEIGHTS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call a component's weights."""

_REPO = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class Hub:
    """How to ask the Hugging Face hub; arguments as `huggingface_hub` takes them."""

    cache_dir: str | os.PathLike | None = None
    local_files_only: bool = False
    token: str | bool | None = None
    force_download: bool = False

    def look(
        self,
        source: str | os.PathLike,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        kind: Literal["model", "dataset"] = "model",
    ) -> Place:
        """Where a source is; nothing is downloaded yet.

        Args:
            source: a folder, a file, a hub id `owner/name` or a hub file `owner/name:file`. What exists on
                this machine comes first.
            revision: of a hub repository.
            subfolder: of a folder or hub repository.
            kind: of a hub repository.

        Raises:
            CheckpointError: it can be none of these.
        """
        path = Path(source)
        if path.exists():
            return Place(self, os.fspath(source), path / subfolder if subfolder and path.is_dir() else path)
        repo, _, file = os.fspath(source).partition(":")
        if not is_hub_id(repo):
            raise CheckpointError(
                f"there is no {source}; give a folder, a file, a hub id owner/name or a hub file "
                "owner/name:file"
            )
        return Place(self, os.fspath(source), None, repo, file, revision, subfolder, kind)

    def _options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True)
class Place:
    """A folder or file on this machine, or a repository or one of its files on the hub; from `Hub.look`.

    Args:
        hub: how to ask.
        source: as it was given, for messages.
        path: on this machine; None on the hub.
        repo, file, revision, subfolder, kind: on the hub; without a file it is the repository.
    """

    hub: Hub
    source: str
    path: Path | None
    repo: str = ""
    file: str = ""
    revision: str | None = None
    subfolder: str | None = None
    kind: Literal["model", "dataset"] = "model"

    @property
    def is_file(self) -> bool:
        return bool(self.file) if self.path is None else self.path.is_file()

    @property
    def name(self) -> str:
        """Of the file or folder; without one, of the repository."""
        return (self.path or Path(self.file or self.repo)).name

    def local(self, patterns: Sequence[str] = ()) -> Path:
        """The file; or the folder, of which what fits the patterns is there if it comes from the hub.

        Raises:
            CheckpointError: the hub, or the cache that stands in for it, doesn't have it.
        """
        if self.path is not None:
            return self.path
        if self.file:
            return self._download(self.file)
        from huggingface_hub import snapshot_download

        inside = f"{self.subfolder}/" if self.subfolder else ""
        wanted = [inside + pattern for pattern in patterns]
        return self._ask(snapshot_download, allow_patterns=wanted) / inside

    def first(self, names: Sequence[str]) -> Path | None:
        """The first of some files that is there, in the folder or beside the file; else None.

        Raises:
            CheckpointError: there is no such repository.
        """
        found = self._look(names)
        return found if isinstance(found, Path) else None

    def need(self, names: Sequence[str]) -> Path:
        """As `first`, where one of them must be there.

        Raises:
            CheckpointError: none of them is.
        """
        found = self._look(names)
        if isinstance(found, Path):
            return found
        wanted = " or ".join(names)
        if found is not None:
            raise CheckpointError(
                f"{self.source}: {wanted} cannot be had from the hub: {first_line(found)}"
            ) from found
        where = f"{'beside' if self.is_file else 'in'} {self.source if self.path is None else self.path}"
        raise CheckpointError(f"there is no {wanted} {where}")

    def _look(self, names: Sequence[str]) -> Path | Exception | None:
        """A file; or why the hub couldn't be asked for the last of them; or None."""
        if self.path is not None:
            folder = self.path.parent if self.is_file else self.path
            return next((folder / name for name in names if (folder / name).is_file()), None)
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        unreachable = None
        beside = PurePosixPath(self.file).parent
        for name in names:
            try:
                return self._download(str(beside / name))
            except CheckpointError as error:
                if not isinstance(error.__cause__, EntryNotFoundError):
                    raise
                if isinstance(error.__cause__, LocalEntryNotFoundError):
                    unreachable = error.__cause__
        return unreachable

    def _download(self, file: str) -> Path:
        from huggingface_hub import hf_hub_download

        return self._ask(hf_hub_download, file, subfolder=self.subfolder)

    def _ask(self, download: Any, *what: str, **arguments: Any) -> Path:
        from huggingface_hub.errors import EntryNotFoundError

        arguments["revision"] = self.revision
        arguments["repo_type"] = None if self.kind == "model" else self.kind
        given = {name: value for name, value in arguments.items() if value is not None}
        try:
            return Path(download(self.repo, *what, **given, **self.hub._options()))
        except (OSError, ValueError, EntryNotFoundError) as error:  # its errors are kinds of these
            named = ":".join((self.repo, *what))
            raise CheckpointError(f"{named} cannot be had from the hub: {first_line(error)}") from error


def is_hub_id(text: str) -> bool:
    """Whether a text that names nothing on this machine may be owner/name on the hub."""
    return bool(_REPO.match(text)) and not text.startswith(".") and Path(text).suffix not in SUFFIXES


def component_patterns(component: str = "", variant: str | None = None) -> list[str]:
    """What a model, text encoder or tokenizer needs of a repository.

    Args:
        component: its folder; by default the repository itself.
        variant: of the weights, beside the plain ones.
    """
    inside = f"{component}/" if component else ""
    stems = [f"{stem}.{variant}" for stem in WEIGHTS] if variant else []
    weights = [f"{inside}{stem}{end}" for stem in (*stems, *WEIGHTS) for end in ("", "-?????-of-?????")]
    configs = [f"{inside}*{end}" for end in (".json", ".txt", ".model")]
    return [*configs, *(f"{pattern}.safetensors" for pattern in weights)]


def component_variant(folder: Path, variant: str | None) -> str | None:
    """The variant, where the component has it."""
    return variant if variant and any(folder.glob(f"*.{variant}[.-]*")) else None
