"""A plan, run for a pipeline: stage by stage, batch by batch within a stage, then decoded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from ..errors import NonFiniteError
from ..sampling.experts import Expert
from ..sampling.initial import noised
from ..sampling.loop import SamplingRun
from ..sampling.plan import SamplingPlan
from .callbacks import StepEnd, StepWatch
from .checks import Request, Start
from .offload import Stage, stages

__all__ = ["Host", "PlanRun", "Residency", "run_plan"]

Features = Mapping[str, torch.Tensor]


class Host(Protocol):
    """What a pipeline is to a run: it may stop it, shows how far it is, and decodes what it made."""

    _guidance_scale: float | None
    _num_timesteps: int | None

    @property
    def interrupt(self) -> bool:
        """Whether no more models are to be called."""
        ...

    @property
    def progress_bar(self) -> Callable[..., Any]:
        """Called with `total`, gives a bar as tqdm's, a context manager."""
        ...

    def decode_latents(self, latents: torch.Tensor, output_type: str) -> Any:
        """Images from float32 latents [B, C, h, w]."""
        ...


class Residency(Protocol):
    """Who holds the experts' weights, if not all of them are in memory all the time."""

    def use(self, names: Iterable[str]) -> None:
        """Make exactly these experts resident."""
        ...

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to bring these, beside what is at work."""
        ...


@dataclass(frozen=True)
class PlanRun:
    """What a plan is run with.

    Args:
        plan, experts: what is run; the experts with their models.
        shape: [images, C, h, w] of all latents.
        device: where.
        cond: text features, one a prompt; of all experts, or by expert.
        uncond: those of guidance, by expert.
        image_latents: [images, C, h, w] float32, what the first state is made from by adding noise.
        residency: told which experts work, before they do.
    """

    plan: SamplingPlan
    experts: Sequence[Expert]
    shape: Sequence[int]
    device: torch.device
    cond: Features | Mapping[str, Features]
    uncond: Mapping[str, Features]
    image_latents: torch.Tensor | None = None
    residency: Residency | None = None


def run_plan(host: Host, run: PlanRun, request: Request, start: Start, step_end: StepEnd) -> Any:
    """The images of a call, as `request.output_type` wants them; where it was interrupted, what they were by
    then. Threads that share a pipeline take turns.

    Args:
        host: the pipeline.
        run: the plan and what it is run with.
        request, start, step_end: the rest of the call.

    Raises:
        NonFiniteError: NaN or an infinity, with where it is from.
    """
    # Experts that take turns in memory, like the pipeline's bar and interrupt, serve one call at a time.
    with _turn_of(host if run.residency is None else run.residency):
        parts = []
        for batch in _Queue(host, run, request, start, step_end).advance():
            batch.check()
            parts.append(host.decode_latents(batch.x, request.output_type))
    if request.output_type == "pil":
        return [image for part in parts for image in part]
    return np.concatenate(parts) if request.output_type == "np" else torch.cat(parts)


_TURNS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_TURNS_THEMSELVES = threading.Lock()


def _turn_of(owner: Any) -> threading.RLock:
    """The lock of whatever serves one thread's call at a time; kept beside it, so that it can be pickled."""
    with _TURNS_THEMSELVES:
        return _TURNS.setdefault(owner, threading.RLock())


class _Queue:
    """The images of one call, in batches; all of them are at the same stage of the plan."""

    def __init__(self, host: Host, run: PlanRun, request: Request, start: Start, step_end: StepEnd) -> None:
        self._host, self._run, self._step_end = host, run, step_end
        host._num_timesteps, host._guidance_scale = len(run.plan), run.plan.steps[0].calls[0].guidance_scale
        self._batches = [
            self._batch(slice(first, min(first + request.batch_size, request.images)), request, start)
            for first in range(0, request.images, request.batch_size)
        ]

    def _batch(self, own: slice, request: Request, start: Start) -> SamplingRun:
        run, device = self._run, self._run.device
        local = (own.stop - own.start, *run.shape[1:])
        of_prompts = torch.arange(own.start, own.stop, device=device) // request.images_per_prompt
        noise = None if start.generator is None else _Noise(start.generator, own, local, device)
        cond, uncond = _rows(run.cond, of_prompts), _rows(run.uncond, of_prompts)
        watch = StepWatch(self._step_end, self._host, run.experts, cond, uncond)
        return SamplingRun(
            run.plan,
            run.experts,
            _first_state(run, local, own, start, noise),
            shape=local,
            seeds=None if start.seeds is None else start.seeds[own],
            noise=noise,
            cond=cond,
            uncond=uncond,
            device=device,
            callback=partial(self._on_step_end, watch),
            keep_x0=self._step_end.wants("pred_original_sample"),
        )

    def advance(self) -> list[SamplingRun]:
        """Every batch at the end of the plan, or where the run was interrupted."""
        plan, residency = self._run.plan, self._run.residency
        with self._host.progress_bar(total=len(plan) * len(self._batches)) as bar:
            self._bar, every = bar, stages(plan)
            ahead: list[Stage | None] = [*every[1:], None]
            try:
                for stage, following in zip(every, ahead, strict=True):
                    if self._host.interrupt:
                        break
                    if residency is not None:
                        residency.use(stage.experts)
                    self._through(stage, following)
            finally:
                if residency is not None:
                    residency.use(())
        return self._batches

    def _through(self, stage: Stage, following: Stage | None) -> None:
        self._bar.set_description(_names(self._run.plan, stage))
        residency = self._run.residency
        for batch in self._batches:
            if self._host.interrupt:
                return
            if residency is not None and following is not None and batch is self._batches[-1]:
                # Beside the last step of the stage, so that two experts share the device no longer than that.
                batch.advance(stage.until - 1)
                residency.prefetch(following.experts)
            batch.advance(stage.until)

    def _on_step_end(self, watch: StepWatch, info: dict[str, Any]) -> torch.Tensor | None:
        self._bar.update()
        try:
            replaced = watch(info)
        except NonFiniteError:
            info["run"].check()  # who looks at the latents finds less than the run knows of them
            raise
        info["run"].interrupted = self._host.interrupt
        return replaced


class _Noise:
    """Noise of a batch from diffusers' generators: drawn in the order it is asked for."""

    def __init__(self, generator: Any, own: slice, shape: tuple[int, ...], device: torch.device) -> None:
        self._generator = generator[own] if isinstance(generator, list) and len(generator) > 1 else generator
        self._shape, self._device = shape, device

    def __call__(self, _step: int) -> torch.Tensor:
        return randn_tensor(self._shape, generator=self._generator, device=self._device)


def _first_state(
    run: PlanRun,
    shape: tuple[int, ...],
    own: slice,
    start: Start,
    noise: Callable[[int], torch.Tensor] | None,
) -> torch.Tensor | None:
    """A batch's first state; None leaves it to the run and its seeds."""
    if start.latents is not None:
        return start.latents[own].to(run.device, torch.float32)
    if run.image_latents is not None:
        x0 = run.image_latents[own].to(run.device)
        seeds = None if start.seeds is None else start.seeds[own]
        return noised(run.plan, x0, seeds=seeds, noise=None if noise is None else noise(0))
    return None if noise is None else noise(0) * run.plan.initial_scale


def _rows(features: Features | Mapping[str, Features], prompts: torch.Tensor) -> dict[str, Any]:
    """The rows of these prompts, of tensors or of mappings of them."""
    return {
        name: _rows(value, prompts) if isinstance(value, Mapping) else value[prompts.to(value.device)]
        for name, value in features.items()
    }


def _names(plan: SamplingPlan, stage: Stage) -> str:
    return " + ".join(call.name for call in plan.steps[stage.until - 1].calls).title()
