"""Images in the order they are finished: whoever stops a call keeps those of the batches that ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["as_finished"]

Watch = Callable[[Any, int, float, dict[str, Any]], None]


def as_finished(
    pipe: Any,
    steps: int,
    take: Callable[[int, Any], None],
    /,
    *,
    output_type: str = "pil",
    watch: Watch | None = None,
    watched: Sequence[str] = (),
    **call: Any,
) -> None:
    """Call a pipeline, and give every image to `take` with its index as soon as its batch ends.

    Args:
        pipe: a `HybridPipeline` or a `StudentPipeline`.
        steps: of the plan that it runs for this call.
        take: called in the order of the images.
        output_type: "pil", or another of `decode_latents`.
        watch: told of every step, before an image of it is taken, as `callback_on_step_end` is.
        watched: the tensors that `watch` is to be given.
        call: the pipeline's other arguments.
    """
    finished = 0

    def on_step_end(pipe: Any, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal finished
        if watch is not None:
            watch(pipe, step, timestep, tensors)
        if step == steps - 1:
            for image in pipe.decode_latents(tensors["latents"], output_type):
                take(finished, image)
                finished += 1
        return {}

    wanted = list(dict.fromkeys(["latents", *watched]))
    told = {"callback_on_step_end": on_step_end, "callback_on_step_end_tensor_inputs": wanted}
    pipe(output_type="latent", **call, **told)
