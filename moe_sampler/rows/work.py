"""What one process does of a file of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .batches import Picture, Unit, unfinished
from .folder import PictureFolder
from .making import make
from .shards import ShardFolder

__all__ = ["Output", "do_unit", "failure", "missing", "open_output"]

Output = PictureFolder | ShardFolder


def open_output(folder: Path, pictures: Sequence[Picture], shard_size: int | None) -> Output:
    """Where pictures go: files in a folder, or with `shard_size` rows a shard, tars."""
    return (
        PictureFolder(folder, pictures) if shard_size is None else ShardFolder(folder, pictures, shard_size)
    )


def do_unit(
    pipe: Any,
    unit: Unit,
    output: Output,
    batch_size: int,
    progress: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Make what is missing of a unit.

    Args:
        pipe: a `HybridPipeline`.
        unit: of `units_of`, with this `batch_size`.
        output: where to.
        batch_size: pictures sampled at once.
        progress: called for every picture that was made or failed.

    Returns:
        What errors.jsonl says of each picture that failed.
    """
    failures: list[dict[str, Any]] = []

    def take(picture: Picture, image: Any) -> None:
        if not output.is_finished(picture):
            output.write(picture, image)
            progress()

    def failed(picture: Picture, reason: str) -> None:
        if not output.is_finished(picture):
            failures.append(failure(picture.row, picture.place, reason))
            progress()

    for queue in unit.queues:
        todo = unfinished(queue, batch_size, output.is_finished)
        if todo:
            make(pipe, todo, batch_size, take, failed)
    output.end(unit)
    return failures


def failure(row: int, place: str, reason: str) -> dict[str, Any]:
    """A line of errors.jsonl."""
    return {"row": row, "place": place, "error": reason}


def missing(units: Iterable[Unit], output: Output) -> int:
    """Pictures that are to be made."""
    return sum(not output.is_finished(picture) for unit in units for picture in unit.pictures)
