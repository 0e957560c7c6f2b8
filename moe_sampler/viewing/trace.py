"""Watch a run: what the experts believe the image is after every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from ..sampling.plan import PlanStep, SamplingPlan
from .images import check_writable, save_webp, zoom, zoom_factor
from .plan_figure import expert_colors, mixed_color, pale
from .sheets import BACKGROUND, FAINT, INK, contact_sheet, fitted, scalable_font

__all__ = ["Animation", "Trace", "step_label"]

_RUN_MS, _HOLD_MS = 4500, 2500
_SHORTEST_MS, _LONGEST_MS = 60, 400


@dataclass(frozen=True)
class Animation:
    """Frames of one size and how long each is shown, in milliseconds."""

    frames: tuple[Image.Image, ...]
    durations: tuple[int, ...]

    def save(self, path: str | Path) -> None:
        """Write an animated WebP that repeats for ever, the whole file or nothing."""
        check_writable(Path(path), ".webp")
        save_webp(self.frames, self.durations, Path(path))


class Trace:
    """Collects each step's x0 prediction; pass it as `callback_on_step_end` and name `tensor_inputs`.

    trace = Trace()
    output = pipe(prompt, callback_on_step_end=trace, callback_on_step_end_tensor_inputs=trace.tensor_inputs)
    trace.sheet(pipe, output.plan).save("trace.png")
    trace.animation(pipe, output.plan).save("trace.webp")
    """

    tensor_inputs = ("pred_original_sample",)

    def __init__(self) -> None:
        self.predictions: list[torch.Tensor] = []

    def __call__(
        self, pipe: Any, step: int, timestep: float, tensors: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        x0 = tensors["pred_original_sample"].clone()
        if step < len(self.predictions):  # another batch of the same queue
            self.predictions[step] = torch.cat([self.predictions[step], x0])
        else:
            self.predictions.append(x0)
        return {}

    def images(self, pipe: Any, index: int = 0, batch_size: int = 8) -> list[Image.Image]:
        """One PIL image a step, of the batch's sample `index`; decoded `batch_size` at a time.

        Raises:
            ValueError: nothing was collected, or there is no such sample.
        """
        if not self.predictions:
            raise ValueError("the trace is empty: pass it to the pipeline as callback_on_step_end first")
        count = len(self.predictions[0])
        if not -count <= index < count:
            raise ValueError(f"the trace has {count} samples, so there is none with index {index}")
        with torch.no_grad():
            own = torch.stack([x0[index] for x0 in self.predictions])
            return [image for part in own.split(batch_size) for image in pipe.decode_latents(part)]

    def _check_plan(self, plan: SamplingPlan) -> None:
        if len(plan) != len(self.predictions):
            raise ValueError(
                f"the trace holds {len(self.predictions)} steps and the plan has {len(plan)}: give the plan "
                "of the traced run, and one trace to each run"
            )

    def sheet(
        self, pipe: Any, plan: SamplingPlan, index: int = 0, columns: int = 6, title: str | None = None
    ) -> Image.Image:
        """A labelled contact sheet: expert, noise level and guidance of every step."""
        self._check_plan(plan)
        labels = [f"{i}. {step_label(step)}" for i, step in enumerate(plan.steps, start=1)]
        return contact_sheet(self.images(pipe, index), labels, columns, title=title)

    def animation(
        self, pipe: Any, plan: SamplingPlan, index: int = 0, size: int = 448, title: str | None = None
    ) -> Animation:
        """The silhouette becoming texture: a labelled frame for every step, the last one held longer.

        Args:
            pipe: decodes the predictions.
            plan: of the traced run.
            index: which sample of the batch.
            size: smaller images are enlarged by a whole factor to about this many pixels.
            title: a line above the image.
        """
        self._check_plan(plan)
        images = self.images(pipe, index)
        factor = zoom_factor(images[0].size, size)
        frames = tuple(
            _frame(zoom(image.convert("RGB"), factor), plan, i, title) for i, image in enumerate(images)
        )
        each = round(min(max(_RUN_MS / len(frames), _SHORTEST_MS), _LONGEST_MS))
        return Animation(frames, (*[each] * (len(frames) - 1), _HOLD_MS))


def step_label(step: PlanStep) -> str:
    """Who takes a step, and in the next line how."""
    return f"{_who(step)}\n{_how(step)}"


def _who(step: PlanStep) -> str:
    return " + ".join(call.name.title() for call in step.calls)


def _how(step: PlanStep) -> str:
    guidance = " + ".join(f"{call.guidance_scale:g}" for call in step.calls)
    return f"noise {step.level.noise:.2f}, guidance {guidance}"


def _frame(image: Image.Image, plan: SamplingPlan, index: int, title: str | None) -> Image.Image:
    """The image, below it who is at work and how, and a bar of the run in the experts' colours."""
    step, colors = plan.steps[index], expert_colors(plan)
    width, height = image.size
    large = scalable_font(max(12, width // 26))
    small = scalable_font(max(10, width // 34))
    pad = max(6, width // 48)
    top = pad + (round(small.size * 1.6) if title else 0)
    caption = top + height + pad
    bar = caption + round(large.size * 1.2 + small.size * 1.7)
    thick = max(5, width // 64)
    frame = Image.new("RGB", (width + 2 * pad, bar + thick + pad), BACKGROUND)
    draw = ImageDraw.Draw(frame)
    if title:
        draw.text((pad, pad), fitted(title, small, width), fill=INK, font=small)
    frame.paste(image, (pad, top))
    draw.text((pad, caption), _who(step), fill=mixed_color(step, colors), font=large)
    place = f"{index + 1} / {len(plan)}"
    draw.text((pad + width, caption), place, fill=FAINT, font=large, anchor="ra")
    draw.text((pad, caption + round(large.size * 1.3)), _how(step), fill=FAINT, font=small)
    _draw_bar(draw, plan, index, (pad, bar, pad + width, bar + thick))
    return frame


def _draw_bar(draw: ImageDraw.ImageDraw, plan: SamplingPlan, index: int, box: Sequence[int]) -> None:
    """The steps done in their experts' colours, those to come paler."""
    colors = expert_colors(plan)
    left, top, right, bottom = box
    edges = [left + (right - left) * i / len(plan) for i in range(len(plan) + 1)]
    for i, step in enumerate(plan.steps):
        color = mixed_color(step, colors)
        if i > index:
            color = pale(color, 0.25)
        draw.rectangle(
            (round(edges[i]), top, max(round(edges[i + 1]) - 1, round(edges[i])), bottom - 1), color
        )
