"""What the experts believe the picture is, while they paint it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..viewing.trace import step_label

if TYPE_CHECKING:
    from PIL import Image

    from ..sampling.plan import SamplingPlan
    from .telling import Stop

__all__ = ["Preview", "Watch"]

_SHARE = 0.25
"""Of the time so far, what previews may take: a large VAE on a CPU takes as long as a step."""


@dataclass(frozen=True)
class Preview:
    """After a step.

    Args:
        image: what the experts believe by now.
        step: that was taken, from 0.
        plan: the run's.
    """

    image: Image.Image
    step: int
    plan: SamplingPlan

    @property
    def label(self) -> str:
        """Who took the step, and how."""
        return f"{self.step + 1}. {step_label(self.plan.steps[self.step])}"


class Watch:
    """Told of every step of a run: decodes what is believed, as often as that is cheap, and ends the run when
    it is to stop. The last step is not decoded: the picture itself follows.

    Attributes:
        seen: the previews so far.
    """

    tensor_inputs = ("pred_original_sample",)

    def __init__(self, plan: SamplingPlan, tell: Callable[[Preview], None], stop: Stop) -> None:
        self._plan, self._tell, self._stop = plan, tell, stop
        self._began, self._spent = perf_counter(), 0.0
        self.seen: list[Preview] = []

    def __call__(self, pipe: Any, step: int, timestep: float, tensors: dict[str, Any]) -> None:
        if self._stop.is_set():
            pipe._interrupt = True
        elif step < len(self._plan) - 1 and self._spent <= _SHARE * (perf_counter() - self._began):
            before = perf_counter()
            (image,) = pipe.decode_latents(tensors["pred_original_sample"][:1], "pil")
            self._spent += perf_counter() - before
            self.seen.append(Preview(image, step, self._plan))
            self._tell(self.seen[-1])
