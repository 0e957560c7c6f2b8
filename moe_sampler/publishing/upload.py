"""A folder on its way to the Hugging Face hub; what comes of it is the hub's client's."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from .._files import whole_folder
from ..errors import CheckpointError
from ..loading.folders import CARD
from .card import is_ours, loading, quoted

__all__ = ["Address", "Kind", "Target", "loading_by_diffusers", "pushed", "saved"]

Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class Address:
    """Where a saved folder can be loaded from, as arguments of a `from_pretrained`.

    Args:
        source: a folder as it was named, or a repository's id.
        revision, subfolder: of the repository.
    """

    source: str
    revision: str | None = None
    subfolder: str | None = None

    @property
    def arguments(self) -> str:
        """As Python has them."""
        named = {"revision": self.revision, "subfolder": self.subfolder}
        more = [f"{name}={quoted(value)}" for name, value in named.items() if value]
        return ", ".join([quoted(self.source), *more])


def loading_by_diffusers(address: Address) -> list[str]:
    """A card's section on diffusers' loader of pipelines; none in a subfolder, where it finds models."""
    if address.subfolder:
        return []
    line = f"pipe = DiffusionPipeline.from_pretrained({address.arguments}, trust_remote_code=True)"
    return [
        "Through diffusers' own loader, with moe-sampler installed, which `pipeline.py` imports:",
        loading("from diffusers import DiffusionPipeline", [line]),
    ]


@dataclass(frozen=True)
class Target:
    """A repository on the hub to upload to, as `push_to_hub` of diffusers and transformers describes it.

    Args:
        repo_id: `owner/name`, or a name, for the user who is logged in.
        private: whether a new repository is; by default its owner's setting.
        token: the login's by default.
        commit_message: "Upload <what>" by default.
        create_pr: propose the change instead of making it.
        revision: a branch, made if need be; the main one by default.
        subfolder: within the repository.
        kind: caches are data sets.
    """

    repo_id: str
    private: bool | None = None
    token: str | bool | None = None
    commit_message: str | None = None
    create_pr: bool = False
    revision: str | None = None
    subfolder: str | None = None
    kind: Kind = "model"

    def create(self) -> Address:
        """The repository, made if it isn't there, by its whole name.

        Raises:
            CheckpointError: the hub doesn't make it: no login, no right to, or no connection.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=self.token)

        def make() -> str:
            repo = api.create_repo(self.repo_id, private=self.private, repo_type=self.kind, exist_ok=True)
            if self.revision is not None and not self.create_pr:
                api.create_branch(repo.repo_id, branch=self.revision, repo_type=self.kind, exist_ok=True)
            return repo.repo_id

        return Address(self._ask(make), self.revision, self.subfolder)

    def send(
        self,
        folder: str | os.PathLike,
        address: Address,
        what: str,
        *,
        only: Sequence[str] | None = None,
    ) -> str:
        """Upload a folder to what `create` made, and return the commit's address.

        A card that somebody wrote there, or changed, stays as it is.

        Args:
            what: it is, for the commit's message.
            only: patterns of files; all by default.

        Raises:
            CheckpointError: the hub doesn't take it.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=self.token)
        theirs = (Path(folder) / CARD).is_file() and not self._card_may_go(address)
        given: dict[str, Any] = {"revision": self.revision, "path_in_repo": self.subfolder}
        commit = self._ask(
            lambda: api.upload_folder(
                folder_path=Path(folder),
                repo_id=address.source,
                repo_type=self.kind,
                commit_message=self.commit_message or f"Upload {what}",
                create_pr=self.create_pr,
                allow_patterns=None if only is None else list(only),
                ignore_patterns=[CARD] if theirs else None,
                **{name: value for name, value in given.items() if value is not None},
            )
        )
        return commit.pr_url or commit.commit_url

    def _card_may_go(self, address: Address) -> bool:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError

        def read() -> bool:
            try:
                place = hf_hub_download(
                    address.source,
                    f"{self.subfolder}/{CARD}" if self.subfolder else CARD,
                    repo_type=self.kind,
                    revision=self.revision,
                    token=self.token,
                )
            except LocalEntryNotFoundError:  # nobody could be asked, which is no answer
                raise
            except (EntryNotFoundError, RevisionNotFoundError):
                return True
            return is_ours(Path(place))

        return self._ask(read)

    def _ask(self, request: Any) -> Any:
        from huggingface_hub.errors import EntryNotFoundError, HTTPError

        try:
            return request()
        except (OSError, ValueError, RuntimeError, HTTPError, EntryNotFoundError) as error:
            # The hub's own reason is the last of it.
            told = re.sub(r"For more information check: \S+", "", " ".join(str(error).split()))
            raise CheckpointError(f"{self.repo_id} cannot be written on the hub: {told[:400]}") from error


Write = Callable[[Path, Address], object]
"""Writes files to an empty folder, which will be found at the address."""


def saved(write: Write, folder: str | os.PathLike, what: str, push_to_hub: bool, **target: Any) -> None:
    """A `save_pretrained`: all files in the folder or none, and then, if asked for, on the hub.

    Args:
        what: is saved.
        target: arguments of `Target`; the folder's name is the repository's by default.

    Raises:
        CheckpointError: the hub refuses the repository, and nothing is written; or the upload, and the folder
            is there.
        OSError: the folder can't be written; what was in it before is untouched.
        TypeError: arguments that aren't a `Target`'s, or without push_to_hub.
    """
    if target and not push_to_hub:
        raise TypeError(f"saving takes no {', '.join(sorted(target))} without push_to_hub=True")
    place = Path(folder)
    goal = Target(**{"repo_id": place.resolve().name, **target}) if push_to_hub else None
    address = Address(os.fspath(folder)) if goal is None else goal.create()
    with whole_folder(place) as partial:
        write(partial, address)
    if goal is not None:
        goal.send(place, address, what)


def pushed(write: Write, target: Target, what: str) -> str:
    """A `push_to_hub`: the commit's address."""
    address = target.create()
    with TemporaryDirectory() as folder:
        write(Path(folder), address)
        return target.send(folder, address, what)
