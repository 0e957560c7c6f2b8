"""What a work folder remembers of its run, so that the same command continues it."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RunRecord"]


@dataclass(frozen=True)
class RunRecord:
    """seed: of the run. timed: whether it was given minutes. large: whether batches are the large ones.
    scenes: how many there are, once that is settled. spent: seconds that all its commands took together."""

    seed: int
    timed: bool = False
    large: bool = False
    scenes: int | None = None
    spent: float = 0.0

    @classmethod
    def read(cls, folder: Path) -> RunRecord | None:
        """Of a work folder; None where no run began."""
        path = folder / "run.json"
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def write(self, folder: Path) -> None:
        """Whole or not at all."""
        temporary = folder / f".run.json.{os.getpid()}"
        temporary.write_text(json.dumps(dataclasses.asdict(self)) + "\n", encoding="utf-8")
        os.replace(temporary, folder / "run.json")
