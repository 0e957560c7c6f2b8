"""docs/GPU.md's tables."""

from pathlib import Path


def write(folder: Path) -> None: ...
