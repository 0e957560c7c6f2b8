"""The trained model on its way to the hub while the run goes on."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi

__all__ = ["Uploads"]


class Uploads:
    """One upload at a time, in the background; training waits for none but the last.

    Args:
        repository: on the hub.
        names: of the files that are the model.
    """

    def __init__(self, repository: str, names: list[str]) -> None:
        self.repository, self._names = repository, names
        self._running: Future | None = None

    @property
    def busy(self) -> bool:
        """Whether the last one isn't through. One that failed is told of here: the next may do better."""
        if self._running is None:
            return False
        if not self._running.done():
            return True
        error = self._running.exception()
        if error is not None:
            logging.getLogger(__name__).warning("not uploaded to %s: %s", self.repository, error)
        self._running = None
        return False

    def begin(self, folder: Path, step: int, shown: list[str]) -> None:
        """Upload a folder that stays as it is until `busy` is False again.

        shown: pictures that the card shows, beside the model.
        """
        self._running = HfApi().upload_folder(
            folder_path=folder,
            repo_id=self.repository,
            allow_patterns=[*self._names, *shown],
            commit_message=f"step {step}",
            run_as_future=True,
        )

    def finish(self, folder: Path, shown: list[str]) -> None:
        """Upload the trained model, after the one that is on its way."""
        if self._running is not None:
            self._running.exception()
            assert not self.busy
        names = [*self._names, *shown]
        HfApi().upload_folder(folder_path=folder, repo_id=self.repository, allow_patterns=names)
