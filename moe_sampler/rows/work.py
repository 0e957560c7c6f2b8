"""What one process does of a file of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .batches import Picture, Queue, Unit, unfinished
from .folder import PictureFolder
from .making import make
from .shards import ShardFolder

__all__ = ["Done", "Output", "Worker", "failure", "joined", "missing", "open_output"]

Output = PictureFolder | ShardFolder
Done = tuple[int, list[dict[str, Any]]]
"""How many pictures were tried, and what errors.jsonl says of those that failed."""


def open_output(folder: Path, pictures: Sequence[Picture], shard_size: int | None) -> Output:
    """Where pictures go: files in a folder, or with `shard_size` rows a shard, tars."""
    return (
        PictureFolder(folder, pictures) if shard_size is None else ShardFolder(folder, pictures, shard_size)
    )


class Worker:
    """Makes units, one after the other.

    Args:
        load: gives a `HybridPipeline`.
        folder, shard_size: where pictures go.
        batch_size: pictures sampled at once; that of `units_of`.
    """

    def __init__(
        self, load: Callable[[], Any], folder: Path, shard_size: int | None, batch_size: int
    ) -> None:
        self._pipe, self._batch_size = load(), batch_size
        self._pipe.set_progress_bar_config(disable=True)
        self._output = open_output(folder, (), shard_size)

    def __call__(self, unit: Unit) -> Iterator[Done]:
        """Make what is missing of a unit, and say what came of each of its queues."""
        for queue in unit.queues:
            todo = unfinished(queue, self._batch_size, self._output.is_finished)
            if todo:
                yield self._made(todo)
        self._output.end(unit)

    def _made(self, queue: Queue) -> Done:
        missing = sum(not self._output.is_finished(picture) for picture in queue)
        failures: list[dict[str, Any]] = []

        def failed(picture: Picture, reason: str) -> None:
            if not self._output.is_finished(picture):
                failures.append(failure(picture.row, picture.place, reason))

        make(self._pipe, queue, self._batch_size, self._output.write, failed)
        return missing, failures


def joined(parts: Iterable[Done]) -> Done:
    """Of several queues as of one."""
    found = list(parts)
    return sum(count for count, _ in found), [failure for _, failures in found for failure in failures]


def failure(row: int, place: str, reason: str) -> dict[str, Any]:
    """A line of errors.jsonl."""
    return {"row": row, "place": place, "error": reason}


def missing(units: Iterable[Unit], output: Output) -> int:
    """Pictures that are to be made."""
    return sum(not output.is_finished(picture) for unit in units for picture in unit.pictures)
