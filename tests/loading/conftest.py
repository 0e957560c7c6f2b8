"""What tests of loading share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


def fill_cache(cache: Path, repo: str, files: dict[str, Path], revision: str = "main") -> None:
    """Files as a download of the hub client leaves them."""
    commit = f"{len(files):040x}"
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    for name, source in files.items():
        target = root / "snapshots" / commit / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


@pytest.fixture(scope="session")
def in_hub_cache():
    return fill_cache
