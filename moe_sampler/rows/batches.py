"""What a file of rows asks for: pictures, in batches that depend on the file alone.

A model may round differently in another batch, so a picture's batch is the same in every run, whoever makes
it and however much of it is finished.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..sampling.plan import SamplingPlan

__all__ = ["QUEUE", "Picture", "Queue", "Run", "Unit", "queues_of", "settings_text", "unfinished", "units_of"]

QUEUE = 256
"""Pictures that go through a plan together where experts take turns in memory: few enough that their texts'
features fit beside a model, enough that an expert's way there doesn't count."""


@dataclass(frozen=True, eq=False)
class Run:
    """What pictures of one plan share.

    Args:
        call: what the pipeline is given, but for what is a picture's own.
        settings: what is written into each, but for its own.
        plan: that makes them.
    """

    call: Mapping[str, Any]
    settings: Mapping[str, Any]
    plan: SamplingPlan


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that a row asks for.

    Args:
        row, place: the row's number, and what errors call it.
        name: its file's.
        run: what it shares with others.
        own: prompt and seed; negative_prompt, and image and image_sha256, where it has one.
        kept: columns that are passed on.
    """

    row: int
    place: str
    name: str
    run: Run
    own: Mapping[str, Any]
    kept: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """As a picture remembers them."""
        return {**self.run.settings, **self.own}

    @property
    def line(self) -> dict[str, Any]:
        """Of metadata.jsonl. The settings are JSON in a text: tables want one type a column, and a setting is
        one number in a row, and one an expert in the next."""
        own = {"file_name": self.name, "text": self.own["prompt"], "row": self.row, "seed": self.own["seed"]}
        return own | dict(self.kept) | {"settings": settings_text(self.settings)}


Queue = tuple[Picture, ...]
"""Pictures of one run, that one call of the pipeline makes, batch by batch."""


@dataclass(frozen=True)
class Unit:
    """What one process does without asking: queues, and the number of the shard they fill, if any."""

    queues: tuple[Queue, ...]
    shard: int | None = None

    @property
    def pictures(self) -> list[Picture]:
        return [picture for queue in self.queues for picture in queue]


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings as one text, which is another where they are others; the same for every version."""
    own = {name: value for name, value in settings.items() if name != "version"}
    return json.dumps(own, ensure_ascii=False, sort_keys=True)


def queues_of(pictures: Sequence[Picture], batch_size: int, together: int = 1) -> list[Queue]:
    """Pictures by run, in the order in which runs begin.

    Args:
        pictures: in order.
        batch_size: of a batch.
        together: pictures a queue at most, rounded down to whole batches, of which it has at least one.
    """
    most = max(1, together // batch_size) * batch_size
    runs: dict[int, list[Picture]] = {}
    for picture in pictures:
        runs.setdefault(id(picture.run), []).append(picture)
    parts = [tuple(own[i : i + most]) for own in runs.values() for i in range(0, len(own), most)]
    return sorted(parts, key=lambda queue: queue[0].row)


def units_of(
    pictures: Sequence[Picture], batch_size: int, together: int = 1, shard_size: int | None = None
) -> list[Unit]:
    """All there is to do: a queue a unit; or with `shard_size` rows a shard, a shard a unit."""
    if shard_size is None:
        return [Unit((queue,)) for queue in queues_of(pictures, batch_size, together)]
    shards: dict[int, list[Picture]] = {}
    for picture in pictures:
        shards.setdefault((picture.row - 1) // shard_size, []).append(picture)
    return [
        Unit(tuple(queues_of(own, batch_size, together)), number) for number, own in sorted(shards.items())
    ]


def unfinished(queue: Queue, batch_size: int, finished: Callable[[Picture], bool]) -> Queue:
    """The batches of a queue, whole, of which a picture is missing."""
    batches = [queue[i : i + batch_size] for i in range(0, len(queue), batch_size)]
    return tuple(picture for batch in batches if not all(map(finished, batch)) for picture in batch)
