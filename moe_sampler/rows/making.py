"""Making the pictures of a queue: what goes wrong with one of them stops none of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..data.pictures import read_picture
from ..errors import first_line
from ..pipelines.finished import as_finished
from .batches import Picture

__all__ = ["make"]

_OF_A_ROW = (ValueError, torch.OutOfMemoryError)
"""What a row's own settings bring about; anything else would happen to the next row, too."""


def make(
    pipe: Any,
    queue: Sequence[Picture],
    batch_size: int,
    take: Callable[[Picture, Any], None],
    failed: Callable[[Picture, str], None],
) -> None:
    """Call a `HybridPipeline` for pictures of one run.

    A batch that can't be made is made again picture by picture, so that only those fail that fail alone.

    Args:
        pipe: the pipeline.
        queue: they share a run.
        batch_size: pictures sampled at once, from the first one on.
        take: called with every picture and its image, as its batch ends.
        failed: called with a picture that can't be made, and why.
    """
    made: set[str] = set()

    def taken(index: int, image: Any) -> None:
        take(queue[index], image)
        made.add(queue[index].name)

    try:
        as_finished(pipe, queue[0].run.steps, taken, batch_size=batch_size, **_call(pipe, queue))
    except _OF_A_ROW as error:
        if len(queue) == 1:
            failed(queue[0], first_line(error))
            return
        each = batch_size if len(queue) > batch_size else 1
        for part in (queue[i : i + each] for i in range(0, len(queue), each)):
            if not all(picture.name in made for picture in part):
                make(pipe, part, batch_size, take, failed)


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
