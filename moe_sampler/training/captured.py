"""A training step recorded as one CUDA graph, which the host starts with a single call.

A GPU is done with a small model's operations before the host has launched the next ones: a step then takes as
long as Python does. A recorded step costs the host its random numbers, one copy and one launch.

What differs from step to step has a fixed place on the device that is filled anew before each: the batch, the
learning rate, and everything that comes from `Draws`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils import _pytree as pytree

from .._graphs import record
from ..errors import first_line
from .draws import Draws
from .settings import SettingsError
from .task import Losses, Task
from .training_settings import TrainingSettings

__all__ = ["CapturedStep", "FedDraws", "Inputs", "check_capture"]

WARM_UP = 3
"""Steps that are made as usual before: kernels are compiled, libraries choose theirs, tables are brought."""
_ALIGNMENT = 64

Work = Callable[[Any, Draws, Tensor], tuple[Losses, Tensor]]
"""(batch, draws, learning rate) -> (losses, the gradient's norm)."""


def check_capture(task: Task, settings: TrainingSettings, accelerator: Accelerator) -> None:
    """Whether this run's steps can be recorded.

    Raises:
        SettingsError: they can't, and why.
    """
    if accelerator.device.type != "cuda":
        raise SettingsError(f"cuda_graph needs a CUDA device; this run is on {accelerator.device.type}")
    if accelerator.num_processes > 1:
        raise SettingsError("cuda_graph is for one process: several have to wait for each other in a step")
    if accelerator.scaler is not None:
        raise SettingsError("cuda_graph: fp16's gradient scaling decides on the host; use bf16 or no")
    if settings.gradient_accumulation_steps > 1:
        raise SettingsError(
            "cuda_graph is for steps of one batch: with gradient_accumulation_steps 1 a larger "
            "train_batch_size does the same"
        )
    if settings.use_8bit_adam or settings.optimizer == "adafactor":
        name = "8-bit AdamW" if settings.use_8bit_adam else "Adafactor"
        raise SettingsError(f"cuda_graph: {name} can't be told on the device to leave a step out")
    if settings.gradient_checkpointing:
        raise SettingsError(
            "cuda_graph: gradient checkpointing looks at generators in a step; use one of them"
        )
    if not task.steps_alike:
        raise SettingsError(
            f"cuda_graph: what {task.name} does in a step is decided on the host, step by step, as experts "
            "that run in the loop need; train from a cache without them, or without cuda_graph"
        )


class Inputs:
    """Tensors at fixed places of a device, filled by one copy from the host.

    Args:
        like: on the host, of the shapes and dtypes there will be.
        device: where.
    """

    def __init__(self, like: Sequence[Tensor], device: torch.device) -> None:
        sizes = [-(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in like]
        starts = [0, *np.cumsum(sizes).tolist()]
        self._shapes = [(t.shape, t.dtype) for t in like]
        self._places = [slice(start, start + t.nbytes) for start, t in zip(starts, like, strict=False)]
        self._bytes = torch.empty(starts[-1], dtype=torch.uint8, device=device)
        self.tensors = self._split(self._bytes)
        self.fill(like)

    def _split(self, whole: Tensor) -> list[Tensor]:
        return [
            whole[place].view(dtype).view(shape)
            for place, (shape, dtype) in zip(self._places, self._shapes, strict=True)
        ]

    def fill(self, values: Sequence[Tensor]) -> None:
        """Without a wait: the device copies when it comes to it, out of memory that is kept until then.

        Raises:
            ValueError: values of other shapes or dtypes.
        """
        found = [(value.shape, value.dtype) for value in values]
        if found != self._shapes:
            raise ValueError(f"a recorded step takes {self._shapes}, got {found}")
        host = torch.empty(self._bytes.shape, dtype=torch.uint8, pin_memory=self._bytes.device.type == "cuda")
        for own, value in zip(self._split(host), values, strict=True):
            own.copy_(value)
        self._bytes.copy_(host, non_blocking=True)


class FedDraws(Draws):
    """Draws that remember what was asked of them, or give the tensors they are told to."""

    def __init__(self, draws: Draws, given: Mapping[tuple[Any, ...], Tensor] | None = None) -> None:
        super().__init__(draws.seed, draws.step, draws.places, draws.total, draws.device)
        self.asked: dict[tuple[Any, ...], None] = {}
        self._given = given

    def on(self, device: torch.device | str) -> Draws:
        if torch.device(device).type != torch.device(self.device).type:
            raise SettingsError("cuda_graph: the loss wants random numbers on the host")
        return self

    def generators(self, stream: str) -> list[np.random.Generator]:
        raise SettingsError("cuda_graph: the loss wants random numbers that are no tensors")

    def tensor(self, kind: str, of: Any, *more: Any) -> Tensor:
        key = (kind, of, *more)
        if self._given is None:
            self.asked[key] = None
            return super().tensor(*key)
        if key not in self._given:
            raise SettingsError(f"cuda_graph: the loss drew {of} at one step and not at another")
        return self._given[key]


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    found: Losses
    norm: Tensor


class CapturedStep:
    """Does a step's work: at first as usual, then recorded and replayed.

    Args:
        work: everything that the device does in a step; it makes the optimizer's step too, and leaves no
            gradient behind.
        optimizer: that one.
        device: a CUDA device.
    """

    def __init__(self, work: Work, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._work, self._optimizer, self._device = work, optimizer, device
        # Autograd goes backward on the stream of the forward pass: the same one before and in the recording.
        self._stream = torch.cuda.Stream(device)
        self._asked: list[tuple[Any, ...]] = []
        self._made = 0
        self._recorded: _Recorded | None = None

    def __call__(self, batch: Any, draws: Draws, rate: float) -> tuple[Losses, Tensor]:
        """A step. batch: on the host. rate: the learning rate.

        Returns what `work` does, in memory of its own.

        Raises:
            SettingsError: something in the step can't be recorded.
            ValueError: a batch of other shapes than before.
        """
        leaves, structure = pytree.tree_flatten(batch)
        values = [torch.tensor(rate), *(leaf for leaf in leaves if isinstance(leaf, Tensor))]

        def rebuilt(tensors: Sequence[Tensor]) -> Any:
            own = iter(tensors)
            whole = [next(own) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return pytree.tree_unflatten(whole, structure)

        if self._made < WARM_UP:
            self._made += 1
            return self._as_usual(values, rebuilt, draws)
        drawn = [draws.values(*key) for key in self._asked]
        if self._recorded is None:
            self._recorded = self._record(values, drawn, rebuilt, draws)
        else:
            self._recorded.inputs.fill([*values, *drawn])
        self._recorded.graph.replay()
        return self._recorded.found.kept(copy=True), self._recorded.norm.clone()

    def _as_usual(
        self, values: list[Tensor], rebuilt: Callable[[Sequence[Tensor]], Any], draws: Draws
    ) -> tuple[Losses, Tensor]:
        learning = FedDraws(draws)
        here = torch.cuda.current_stream(self._device)
        rate, *tensors = Inputs(values, self._device).tensors
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            found = self._work(rebuilt(tensors), learning, rate)
        here.wait_stream(self._stream)
        self._asked = list(learning.asked)
        return found

    def _record(
        self,
        values: list[Tensor],
        drawn: list[Tensor],
        rebuilt: Callable[[Sequence[Tensor]], Any],
        draws: Draws,
    ) -> _Recorded:
        inputs = Inputs([*values, *drawn], self._device)
        rate, *tensors = inputs.tensors[: len(values)]
        given = FedDraws(draws, dict(zip(self._asked, inputs.tensors[len(values) :], strict=True)))
        for group in self._optimizer.param_groups:
            group["capturable"] = True
        try:
            graph, (found, norm) = record(lambda: self._work(rebuilt(tensors), given, rate), self._stream)
        except RuntimeError as error:
            raise SettingsError(
                f"cuda_graph: the step can't be recorded ({first_line(error)}); train without it"
            ) from error
        return _Recorded(graph, inputs, found, norm)
