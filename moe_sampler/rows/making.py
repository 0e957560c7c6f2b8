"""Making pictures together: what goes wrong with one of them stops none of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ..data.pictures import read_picture
from ..errors import first_line
from ..pipelines.finished import as_finished
from .batches import Picture

__all__ = ["each_that_can", "make"]

T = TypeVar("T")

_OF_A_ROW = (ValueError, torch.OutOfMemoryError)
"""What a row's own settings bring about; anything else would happen to the next row, too."""


def each_that_can(
    items: Sequence[T],
    batch_size: int,
    attempt: Callable[[Sequence[T]], object],
    failed: Callable[[T, str], None],
) -> None:
    """Attempt all together; where that fails, batch by batch, and where that fails, one by one, so that only
    those fail that fail alone.

    Args:
        items: at least one.
        batch_size: of a batch.
        attempt: does some of them.
        failed: told which can't be done, and why.
    """
    try:
        attempt(items)
    except _OF_A_ROW as error:
        if len(items) == 1:
            failed(items[0], first_line(error))
            return
        each = batch_size if len(items) > batch_size else 1
        for first in range(0, len(items), each):
            each_that_can(items[first : first + each], batch_size, attempt, failed)


def make(
    pipe: Any,
    queue: Sequence[Picture],
    batch_size: int,
    take: Callable[[Picture, Any], None],
    failed: Callable[[Picture, str], None],
) -> None:
    """Call a `HybridPipeline` for pictures of one run.

    Args:
        pipe: the pipeline.
        queue: they share a run.
        batch_size: pictures sampled at once, from the first one on.
        take: called once with every picture and its image, as its batch ends.
        failed: called with a picture that can't be made, and why.
    """
    made: set[str] = set()

    def attempt(some: Sequence[Picture]) -> None:
        def taken(index: int, image: Any) -> None:
            if some[index].name not in made:
                take(some[index], image)
                made.add(some[index].name)

        if not all(picture.name in made for picture in some):
            as_finished(pipe, len(some[0].run.plan), taken, batch_size=batch_size, **_call(pipe, some))

    each_that_can(queue, batch_size, attempt, failed)


def _call(pipe: Any, queue: Sequence[Picture]) -> dict[str, Any]:
    own = [picture.own for picture in queue]
    call = dict(queue[0].run.call) | {"prompt": [o["prompt"] for o in own], "seed": [o["seed"] for o in own]}
    if "negative_prompt" in own[0]:
        call["negative_prompt"] = {
            name: [_of_expert(o["negative_prompt"], name) for o in own] for name in pipe.expert_names
        }
    if "image" in own[0]:
        call["image"] = [read_picture(o["image"]) for o in own]
    return call


def _of_expert(negative: Any, name: str) -> str:
    return (negative if isinstance(negative, str) else negative.get(name)) or ""
