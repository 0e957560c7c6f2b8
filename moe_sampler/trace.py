"""Watch a run: what the experts believe the image is after every step."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from .images import contact_sheet
from .planning import SamplingPlan

__all__ = ["Trace"]


class Trace:
    """Collects each step's x0 prediction; pass it as `callback_on_step_end` and name `tensor_inputs`.

    trace = Trace()
    pipe(prompt, callback_on_step_end=trace, callback_on_step_end_tensor_inputs=trace.tensor_inputs)
    trace.sheet(pipe, output.plan).save("trace.png")
    """

    tensor_inputs = ("pred_original_sample",)

    def __init__(self) -> None:
        self.predictions: list[torch.Tensor] = []

    def __call__(
        self, pipe: Any, step: int, timestep: float, tensors: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        self.predictions.append(tensors["pred_original_sample"].clone())
        return {}

    def images(self, pipe: Any, index: int = 0) -> list[Image.Image]:
        """One PIL image a step, of the batch's sample `index`."""
        with torch.no_grad():
            return [pipe.decode_latents(x0[index : index + 1])[0] for x0 in self.predictions]

    def sheet(
        self, pipe: Any, plan: SamplingPlan, index: int = 0, columns: int = 6, title: str | None = None
    ) -> Image.Image:
        """A labelled contact sheet: expert, noise level and guidance of every step."""
        labels = [
            "\n".join(
                [
                    f"{i + 1}. " + " + ".join(call.name.title() for call in step.calls),
                    f"noise {step.level.noise:.2f}, guidance "
                    + " + ".join(f"{c.guidance_scale:g}" for c in step.calls),
                ]
            )
            for i, step in enumerate(plan.steps)
        ]
        return contact_sheet(self.images(pipe, index), labels, columns, title=title)
