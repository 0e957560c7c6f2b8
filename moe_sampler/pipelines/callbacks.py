"""`callback_on_step_end`, as diffusers' pipelines call it: what a step shows, and what may be changed by it.

A run is planned before it starts. What a callback changes of guidance or of the text features makes a new
plan and new features for the steps that are left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from ..sampling.calls import with_guidance
from ..sampling.experts import Expert
from ..sampling.loop import SamplingRun

__all__ = ["GuidanceMixin", "StepEnd", "StepWatch"]

Callback = Callable[..., Any]


class StepEnd:
    """A callback and the tensors it wants.

    Args:
        callback: called with (pipeline, step, timestep, tensors), may return a dict of tensors to go on with.
        inputs: their names; more are wanted by a callback with `tensor_inputs`, as diffusers' own have.
        known: names that a step has.

    Raises:
        ValueError: it wants tensors that no step has.
    """

    STATE = ("latents", "pred_original_sample")
    TEXT = ("prompt_embeds", "negative_prompt_embeds")

    def __init__(
        self, callback: Callback | None, inputs: Sequence[str], known: Sequence[str] = STATE
    ) -> None:
        self.callback = callback
        self.inputs = tuple(dict.fromkeys([*inputs, *(getattr(callback, "tensor_inputs", None) or ())]))
        unknown = [name for name in self.inputs if name not in known]
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs may name {tuple(known)}, not {unknown}")

    def wants(self, name: str) -> bool:
        return self.callback is not None and name in self.inputs


class GuidanceMixin:
    """What diffusers' callbacks read of a pipeline during a run, and set."""

    _guidance_scale: float | None = None
    _num_timesteps: int | None = None

    @property
    def guidance_scale(self) -> float | None:
        """Of the expert at work. A callback that sets `pipe._guidance_scale` sets it for everyone, for the
        steps that are left of its batch; 1 or less turns guidance off."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the expert at work is guided."""
        return self._guidance_scale is not None and self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int | None:
        """How many steps a run has, as a callback counts them."""
        return self._num_timesteps


class Watched(Protocol):
    _guidance_scale: float | None


class StepWatch:
    """The callback's view of one batch.

    Args:
        step_end: the callback.
        host: the pipeline.
        experts: of the run.
        cond, uncond: text features of the batch, `uncond` by expert.
    """

    def __init__(
        self,
        step_end: StepEnd,
        host: Watched,
        experts: Sequence[Expert],
        cond: Mapping[str, Any],
        uncond: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> None:
        self._step_end, self._host, self._experts = step_end, host, experts
        self._cond, self._uncond = dict(cond), {name: dict(own) for name, own in uncond.items()}
        self._scale: float | None = None  # that a callback has set

    def __call__(self, info: Mapping[str, Any]) -> torch.Tensor | None:
        """Tell the callback; the latents that it puts in the place of the step's, if it does."""
        if self._step_end.callback is None:
            return None
        run, step = info["run"], info["plan_step"]
        call = step.calls[0]
        scale = self._host._guidance_scale = call.guidance_scale if self._scale is None else self._scale
        shown = {name: self._shown(name, info, call) for name in self._step_end.inputs}
        answer = self._step_end.callback(self._host, info["step"], call.timestep, dict(shown)) or {}
        if self._host._guidance_scale != scale:
            self._guide(run, self._host._guidance_scale)
        texts = {k: v for k, v in answer.items() if k in StepEnd.TEXT and v is not shown.get(k)}
        if texts:
            self._tell(run, call, texts)
        return answer.get("latents")

    def _shown(self, name: str, info: Mapping[str, Any], call: Any) -> torch.Tensor | None:
        if name in StepEnd.STATE:
            return info["x" if name == "latents" else "x0"]
        uncond = self._uncond.get(call.name, {}).get("prompt_embeds")
        if name == "negative_prompt_embeds":
            return uncond
        cond = self._cond["prompt_embeds"]
        # As in diffusers: where a step is guided, the model is given both at once.
        return torch.cat([uncond, cond]) if self._guided(call) and uncond is not None else cond

    def _guided(self, call: Any) -> bool:
        return call.guided if self._scale is None else self._scale > 1

    def _guide(self, run: SamplingRun, scale: Any) -> None:
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ValueError(f"a callback set the guidance scale to {scale!r}: give a finite number")
        names = {call.name for step in run.plan.steps[run.index :] for call in step.calls}
        bare = sorted(names - self._uncond.keys())
        if scale > 1 and bare:
            raise ValueError(
                f"a callback turns guidance on, but {' and '.join(bare)} began without it, so there are no "
                "negative prompts: begin with a guidance scale above 1"
            )
        self._scale = scale
        run.follow(with_guidance(run.plan, self._experts, scale, since=run.index))

    def _tell(self, run: SamplingRun, call: Any, texts: Mapping[str, Any]) -> None:
        cond, own = self._cond["prompt_embeds"], self._uncond.get(call.name, {}).get("prompt_embeds")
        rows = len(cond)
        positive, negative = texts.get("prompt_embeds"), texts.get("negative_prompt_embeds")
        for name, embeds in (("prompt_embeds", positive), ("negative_prompt_embeds", negative)):
            both = name == "prompt_embeds" and own is not None
            if embeds is not None and not _has_rows(embeds, cond, (rows, 2 * rows) if both else (rows,)):
                raise ValueError(
                    f"a callback's {name} must be {[rows, *cond.shape[1:]]}"
                    + (f", or {[2 * rows, *cond.shape[1:]]} with the negative ones first" if both else "")
                    + f", got {list(getattr(embeds, 'shape', [])) or type(embeds).__name__}"
                    + (": for a callback that is made for one image give batch_size=1" if rows > 1 else "")
                )
        if positive is not None and len(positive) == 2 * rows and rows:
            first, positive = positive.chunk(2)
            negative = first if negative is None else negative
        if positive is not None:
            self._cond["prompt_embeds"] = positive.to(cond)
        if negative is not None:
            if own is None:
                raise ValueError(f"{call.name} is not guided, so it has no use for negative_prompt_embeds")
            for each in self._uncond.values():  # those that shared the text
                if torch.equal(each["prompt_embeds"], own):
                    each["prompt_embeds"] = negative.to(own)
        run.tell(self._cond, self._uncond)


def _has_rows(embeds: Any, like: torch.Tensor, rows: Sequence[int]) -> bool:
    return isinstance(embeds, torch.Tensor) and embeds.shape[1:] == like.shape[1:] and embeds.shape[0] in rows
