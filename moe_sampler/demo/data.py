"""Rendered scenes on disk: shards of (full, structure) pairs, made by several processes, resumable.

Scene i of the set is `draw_scene(first + i)`. A shard exists whole or not at all (written beside its name,
then moved), so an interrupted run continues.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .._files import write_whole
from .._readers import check_regular
from ..errors import CheckpointError, first_line
from .drawing import SIZE
from .scenes import Scene, draw_scene, render
from .words import Words, draw_words, read_words, write_words

SHARD = 200
HELD_OUT_FIRST = 10_000_000
"""Scenes from this seed on are never trained on."""


class _Shard(NamedTuple):
    """Files of pictures and of words (None where none are wanted), and which scenes."""

    pictures: Path
    words: Path | None
    first: int
    number: int

    def complete(self) -> bool:
        return self.pictures.exists() and (self.words is None or self.words.exists())


class SceneSet:
    """`count` consecutive scenes from seed `first`, with their pictures in `folder`.

    Args:
        folder: where shards live; made when missing.
        count: number of scenes, a multiple of nothing in particular.
        first: seed of the first scene.
        tokenizer: its folder, where the scenes' words are wanted too.
    """

    def __init__(self, folder: Path, count: int, first: int = 0, tokenizer: Path | None = None) -> None:
        self.folder = Path(folder)
        self.count = count
        self.first = first
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        return draw_scene(self.first + int(index))

    @cached_property
    def pictures(self) -> np.ndarray:
        """uint8 [count, 2, 64, 64, 3]: full picture, structure. All shards must have been rendered.

        Raises:
            CheckpointError: a file that is missing or damaged.
        """
        return np.concatenate([_read_pictures(shard) for shard in self._shards()])

    @cached_property
    def words(self) -> Words:
        """Captions and classes. All shards must have been rendered, with a tokenizer."""
        return read_words([shard.words for shard in self._shards() if shard.words is not None])

    def complete(self) -> bool:
        """Whether every shard is on disk."""
        return all(shard.complete() for shard in self._shards())

    def render(
        self, workers: int | None = None, progress=lambda done, total: None, until: float | None = None
    ) -> int:
        """Render the missing shards.

        Args:
            workers: processes; default: one a core.
            progress: called with (shards done, shards in all).
            until: begin no shard after this time, as `time.time` counts, but for one a worker.

        Returns:
            How many scenes there are now, from the first one on without a gap.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        shards = self._shards()
        missing = [shard for shard in shards if not shard.complete()]
        progress(len(shards) - len(missing), len(shards))
        if missing:
            workers = min(workers or os.cpu_count() or 1, len(missing))
            with ProcessPoolExecutor(workers) as pool:
                running: set[Future] = set()
                for count, shard in enumerate(missing):
                    if count >= workers and until is not None and time.time() > until:
                        break
                    running.add(pool.submit(_render_shard, shard, self.tokenizer))
                    if len(running) >= workers:
                        running = _some_done(running)
                        progress(sum(shard.complete() for shard in shards), len(shards))
                while running:
                    running = _some_done(running)
                    progress(sum(shard.complete() for shard in shards), len(shards))
        whole = [shard.complete() for shard in shards]
        return sum(shard.number for shard in shards[: [*whole, False].index(False)])

    def _shards(self) -> list[_Shard]:
        shards = []
        for start in range(0, self.count, SHARD):
            first, number = self.first + start, min(SHARD, self.count - start)
            name = f"{first:08d}-{number}"
            words = None if self.tokenizer is None else self.folder / f"words-{name}.npz"
            shards.append(_Shard(self.folder / f"scenes-{name}.npy", words, first, number))
        return shards


def _read_pictures(shard: _Shard) -> np.ndarray:
    check_regular(shard.pictures)
    try:
        pictures = np.load(shard.pictures, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy's reader of headers raises a dozen kinds
        raise CheckpointError(
            f"{shard.pictures} is damaged: {first_line(error)}; delete it, and it is drawn again"
        ) from None
    if pictures.shape != (shard.number, 2, SIZE, SIZE, 3) or pictures.dtype != np.uint8:
        raise CheckpointError(
            f"{shard.pictures} is damaged: it holds {pictures.dtype} {list(pictures.shape)}; delete it, and "
            "it is drawn again"
        )
    return pictures


def _some_done(running: set[Future]) -> set[Future]:
    """Those that still run, after at least one has ended."""
    done, rest = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return set(rest)


def _render_shard(shard: _Shard, tokenizer: Path | None) -> None:
    scenes = [draw_scene(shard.first + i) for i in range(shard.number)]
    if shard.words is not None and tokenizer is not None and not shard.words.exists():
        write_words(shard.words, draw_words(scenes, tokenizer))
    if not shard.pictures.exists():
        pictures = np.empty((shard.number, 2, SIZE, SIZE, 3), np.uint8)
        for i, scene in enumerate(scenes):
            pictures[i] = render(scene), render(scene, structure=True)
        write_array(shard.pictures, pictures)


def write_array(path: Path, array: np.ndarray) -> None:
    """Save as .npy so that `path` is either absent or complete."""

    def save(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.save(file, array)

    write_whole(path, save)
