"""Rendered scenes on disk: shards of (full, structure) pairs, made by several processes, resumable.

Scene i of the set is `draw_scene(first + i)`, so captions need no file: they are drawn again from the scene.
A shard exists whole or not at all (written beside its name, then moved), so an interrupted run continues.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from .drawing import SIZE
from .scenes import Scene, draw_scene, render

SHARD = 500
HELD_OUT_FIRST = 10_000_000
"""Scenes from this seed on are never trained on."""


class SceneSet:
    """`count` consecutive scenes from seed `first`, with their pictures in `folder`.

    Args:
        folder: where shards live; made when missing.
        count: number of scenes, a multiple of nothing in particular.
        first: seed of the first scene.
    """

    def __init__(self, folder: Path, count: int, first: int = 0) -> None:
        self.folder = Path(folder)
        self.count = count
        self.first = first
        self._pictures: np.ndarray | None = None

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        return draw_scene(self.first + int(index))

    @property
    def pictures(self) -> np.ndarray:
        """uint8 [count, 2, 64, 64, 3]: full picture, structure. All shards must have been rendered."""
        if self._pictures is None:
            shards = [np.load(path, mmap_mode="r") for path, _, _ in self._shards()]
            self._pictures = np.concatenate(shards)
        return self._pictures

    def complete(self) -> bool:
        """Whether every shard is on disk."""
        return all(path.exists() for path, _, _ in self._shards())

    def render(self, workers: int | None = None, progress=lambda done, total: None) -> None:
        """Render the missing shards with `workers` processes (default: one a core)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [job for job in self._shards() if not job[0].exists()]
        total = len(self._shards())
        done = total - len(missing)
        progress(done, total)
        if not missing:
            return
        with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
            for _ in pool.map(_render_shard, *zip(*missing, strict=True)):
                done += 1
                progress(done, total)

    def _shards(self) -> list[tuple[Path, int, int]]:
        """(file, first seed, number of scenes) of every shard."""
        jobs = []
        for start in range(0, self.count, SHARD):
            first, number = self.first + start, min(SHARD, self.count - start)
            jobs.append((self.folder / f"scenes-{first:08d}-{number}.npy", first, number))
        return jobs


def _render_shard(path: Path, first: int, number: int) -> None:
    shard = np.empty((number, 2, SIZE, SIZE, 3), np.uint8)
    for i in range(number):
        scene = draw_scene(first + i)
        shard[i] = render(scene), render(scene, structure=True)
    write_array(path, shard)


def write_array(path: Path, array: np.ndarray) -> None:
    """Save as .npy so that `path` is either absent or complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
