"""Steps that one recording serves: consecutive calls of one expert, alike, each with the launch that ends it.

What differs between them, the row, the timestep and the noise's number, is found on the device by a position
that the launch itself moves on. So to take such a step again asks nothing of the host but to say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from moe_sampler.kernels import sampler_step_
from moe_sampler.kernels._dispatch import all_apart

from .plan import PlanStep, SamplingPlan

__all__ = ["MovingTable", "RecordableModel", "Recording", "steps_alike", "take_step", "turns_memories"]

_ROWS = 256
"""Tables are filled up to a multiple of it, since a recording serves tables of one size."""


class Recording(NamedTuple):
    """A step that was recorded.

    state: what `take_step` was given, in the recording's own memory: what a replay reads, and what it leaves.
    replay: takes the step once more.
    holds: whether the model is still the one that was recorded, and this memory nobody else's.
    """

    state: Mapping[str, Any]
    replay: Callable[[], None]
    holds: Callable[[], bool]


class RecordableModel(Protocol):
    """A model whose steps can be recorded, as `architectures.captured_model.CapturedModel`."""

    def record(self, work: Callable[..., None], /, **state: Any) -> Recording | None:
        """`work(model, **state)`, recorded, with this state in its memory; None where nothing is recorded."""
        ...


class MovingTable:
    """A plan's rows and timesteps as recordings read them.

    Attributes:
        table: float32 [rows, ROW_WIDTH].
        timesteps: float32 [rows], of the steps that have one.
    """

    def __init__(self, plan: SamplingPlan, table: torch.Tensor) -> None:
        # A recording is tried twice before it is made, and a try moves on.
        rows = -(-(len(plan) + 2) // _ROWS) * _ROWS
        self.table = table.new_zeros(rows, table.shape[1])
        self.table[: len(table)] = table
        told = [float(step.calls[0].timestep) for step in plan.steps]
        self.timesteps = torch.tensor([*told, *[0.0] * (rows - len(told))]).to(table.device)

    def at(self, index: int) -> dict[str, torch.Tensor]:
        """The part of a step's state that says where the run is, for plan step `index` as the next."""
        position = torch.zeros(2, dtype=torch.int32, device=self.table.device)
        position[:1].fill_(index)
        flags = torch.zeros(len(self.table), dtype=torch.int32, device=self.table.device)
        return {
            "table": self.table,
            "timesteps": self.timesteps,
            "position": position,
            "nonfinite": flags,
        }


def turns_memories(step: PlanStep, memories: int) -> bool:
    """Whether another one of a run's memories is the newest after this step."""
    return memories > 1 and step.update.keeps


def steps_alike(plan: SamplingPlan, index: int, until: int, memories: int) -> int:
    """How many steps from `index` on, before `until`, one recording serves.

    Args:
        memories: `plan.memories`, which looks through all steps.
    """
    first = _kind(plan, index, memories)
    if first is None:
        return 0
    count = 1
    while index + count < until and _kind(plan, index + count, memories) == first:
        count += 1
    return count


def _kind(plan: SamplingPlan, index: int, memories: int) -> tuple[Any, ...] | None:
    """What is the same of steps that one recording serves; None for a step that wants more of the host:
    several experts, features that are kept, or guidance that the row can't hold."""
    step = plan.steps[index]
    coming = plan.steps[index + 1].calls if index + 1 < len(plan) else ()
    call = step.calls[0]
    if len(step.calls) > 1 or call.guider or call.guidance_rescale:
        return None
    if call.reuses or any(following.reuses for following in coming):
        return None
    return call.name, call.guided, type(call.timestep), turns_memories(step, memories)


def take_step(
    model: Callable[..., Any],
    *,
    x: torch.Tensor,
    model_input: torch.Tensor,
    timestep: torch.Tensor,
    conditioning: Mapping[str, torch.Tensor],
    memories: Sequence[torch.Tensor],
    turns: bool,
    **launch: Any,
) -> None:
    """A model's call and the launch that ends the step, in place: the same tensors serve the next step.

    Args:
        model_input: [B or 2B, ...], becomes the next step's.
        timestep: 0-d, becomes the next step's.
        memories: newest first, and so afterwards.
        turns: whether the row keeps something, and there are several memories.
        launch: the rest of what `sampler_step_` takes.
    """
    output = model(model_input, timestep, **conditioning)
    output = (output if isinstance(output, torch.Tensor) else output[0]).contiguous()
    if not all_apart((output, model_input)):  # a model may return its input
        output = output.clone()
    moving = {"next_inputs": [model_input], "next_timestep": timestep}
    sampler_step_(x, [output], step=0, memories=memories, **moving, **launch)
    if turns:
        turned = [memory.clone() for memory in (memories[-1], *memories[:-1])]
        for memory, now in zip(memories, turned, strict=True):
            memory.copy_(now)
