"""All images of a call through a plan: stage by stage, and batch by batch within a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from ..sampling.experts import Expert
from ..sampling.loop import SamplingRun, noised
from ..sampling.plan import SamplingPlan
from .offload import Stage, stages

if TYPE_CHECKING:
    from .hybrid import HybridPipeline

__all__ = ["Batches"]

Features = Mapping[str, torch.Tensor]


class Batches:
    """The images of one call, in batches; all of them are at the same stage of the plan.

    Args:
        pipe: whose experts work; told which of them do.
        plan, experts: what is run.
        device: where.
        shape: of all images' latents.
        cond: text features, one a prompt; of all experts, or by expert.
        uncond: those of guidance, by expert.
        images_per_prompt: image i belongs to prompt i // images_per_prompt.
        batch_size: images that are sampled at once.
        seeds: one an image, or
        generator: one for all or one an image, as in diffusers.
        latents: the state to start from, or
        image_latents: what the run's first state is made from by adding noise.
        callback, callback_inputs: `callback_on_step_end` and what it wants.
    """

    def __init__(
        self,
        pipe: HybridPipeline,
        plan: SamplingPlan,
        experts: Sequence[Expert],
        shape: Sequence[int],
        *,
        device: torch.device,
        cond: Features | Mapping[str, Features],
        uncond: Mapping[str, Features],
        images_per_prompt: int,
        batch_size: int,
        seeds: Sequence[int] | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        image_latents: torch.Tensor | None,
        callback: Callable[..., dict[str, Any]] | None,
        callback_inputs: Sequence[str],
    ) -> None:
        self._pipe, self._plan, self._batch_size = pipe, plan, batch_size
        self._callback, self._callback_inputs = callback, tuple(callback_inputs)
        starts = range(0, shape[0], batch_size)
        self._runs = []
        for first in starts:
            own = slice(first, min(first + batch_size, shape[0]))
            of_prompts = torch.arange(own.start, own.stop, device=device) // images_per_prompt
            local = (own.stop - own.start, *shape[1:])
            noise = None if generator is None else _Noise(generator, own, local, device)
            self._runs.append(
                SamplingRun(
                    plan,
                    experts,
                    _start(plan, local, own, latents, image_latents, seeds, noise, device),
                    shape=local,
                    seeds=None if seeds is None else seeds[own],
                    noise=noise,
                    cond=_rows(cond, of_prompts),
                    uncond=_rows(uncond, of_prompts),
                    device=device,
                    callback=self._on_step_end,
                    keep_x0=callback is not None and "pred_original_sample" in self._callback_inputs,
                )
            )

    def run(self) -> list[torch.Tensor]:
        """Every batch's latents at the end of the plan, or where the run was interrupted."""
        offload = self._pipe._offload
        with self._pipe.progress_bar(total=len(self._plan) * len(self._runs)) as bar:
            self._bar, every = bar, stages(self._plan)
            ahead: list[Stage | None] = [*every[1:], None]
            try:
                for stage, following in zip(every, ahead, strict=True):
                    if self._pipe.interrupt:
                        break
                    if offload is not None:
                        offload.use(stage.experts)
                    self._advance(stage, following)
            finally:
                if offload is not None:
                    offload.use(())
        return [run.x for run in self._runs]

    def _advance(self, stage: Stage, following: Stage | None) -> None:
        self._bar.set_description(_names(self._plan, stage))
        for run in self._runs:
            if self._pipe.interrupt:
                return
            offload = self._pipe._offload
            if offload is not None and following is not None and run is self._runs[-1]:
                # Beside the last step of the stage, so that two experts share the device no longer than that.
                run.advance(stage.until - 1)
                offload.prefetch(following.experts)
            run.advance(stage.until)

    def _on_step_end(self, info: dict[str, Any]) -> torch.Tensor | None:
        self._bar.update()
        replaced = None
        if self._callback is not None:
            tensors = {"latents": info["x"], "pred_original_sample": info["x0"]}
            wanted = {name: tensors[name] for name in self._callback_inputs}
            timestep = info["plan_step"].calls[0].timestep
            replaced = (self._callback(self._pipe, info["step"], timestep, wanted) or {}).get("latents")
        info["run"].interrupted = self._pipe.interrupt
        return replaced

    def decode(self, latents: Sequence[torch.Tensor], decode: Callable[..., Any], output_type: str) -> Any:
        """Images of all batches together, decoded batch by batch."""
        parts = [decode(batch) for batch in latents]
        if output_type == "pil":
            return [image for part in parts for image in part]
        return np.concatenate(parts) if output_type == "np" else torch.cat(parts)


class _Noise:
    """Noise of a batch from diffusers' generators: drawn in the order it is asked for."""

    def __init__(self, generator: Any, own: slice, shape: tuple[int, ...], device: torch.device) -> None:
        self._generator = generator[own] if isinstance(generator, list) and len(generator) > 1 else generator
        self._shape, self._device = shape, device

    def __call__(self, _step: int) -> torch.Tensor:
        return randn_tensor(self._shape, generator=self._generator, device=self._device)


def _start(
    plan: SamplingPlan,
    shape: tuple[int, ...],
    own: slice,
    latents: torch.Tensor | None,
    image_latents: torch.Tensor | None,
    seeds: Sequence[int] | None,
    noise: _Noise | None,
    device: torch.device,
) -> torch.Tensor | None:
    """A batch's first state; None leaves it to the run and its seeds."""
    if latents is not None:
        return latents[own].to(device, torch.float32)
    if image_latents is not None:
        x0 = image_latents[own].to(device)
        return noised(plan, x0, seeds=seeds[own]) if noise is None else noised(plan, x0, noise=noise(0))
    return None if noise is None else noise(0) * plan.initial_scale


def _rows(features: Features | Mapping[str, Features], prompts: torch.Tensor) -> dict[str, Any]:
    """The rows of these prompts, of tensors or of mappings of them."""
    return {
        name: _rows(value, prompts) if isinstance(value, Mapping) else value[prompts.to(value.device)]
        for name, value in features.items()
    }


def _names(plan: SamplingPlan, stage: Stage) -> str:
    return " + ".join(call.name for call in plan.steps[stage.until - 1].calls).title()
