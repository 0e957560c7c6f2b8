"""What a work folder remembers of its run, so that the same command continues it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from .._files import write_text
from .._readers import read_json, typed
from ..errors import CheckpointError

__all__ = ["RunRecord"]


@dataclass(frozen=True)
class RunRecord:
    """seed: of the run. timed: whether it was given minutes. large: whether it began on a GPU, in larger
    batches. scenes: how many there are, once that is settled. spent: seconds that all its commands took
    together."""

    seed: int
    timed: bool = False
    large: bool = False
    scenes: int | None = None
    spent: float = 0.0

    @classmethod
    def read(cls, folder: Path) -> RunRecord | None:
        """Of a work folder; None where no run began."""
        path = folder / "run.json"
        if not path.exists():
            return None
        try:
            return typed(cls, read_json(path), "run")
        except TypeError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None

    def write(self, folder: Path) -> None:
        """Whole or not at all."""
        write_text(folder / "run.json", json.dumps(dataclasses.asdict(self)) + "\n")
