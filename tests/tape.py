"""A tape of torch's operators, which stands in for a CUDA graph where there is no GPU."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from moe_sampler.architectures.captured_model import CapturedModel, Recordings

__all__ = ["Recorder", "Tape", "captured"]


class Tape(TorchDispatchMode):
    """What a CUDA graph is: operators over the memory they had, without the Python that asked for them."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        if not (operator.is_view and not operator._schema.is_mutable):
            self.operators.append((operator, args, kwargs or {}, made))
        return made

    @torch.inference_mode()  # in which all that was made in it may be written to, as by a graph anywhere
    def replay(self) -> None:
        for operator, args, kwargs, made in self.operators:
            again = operator(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(made), pytree.tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


class Recorder:
    """Counts its recordings, and how often one is replayed."""

    def __init__(self):
        self.count = self.replays = 0

    def __call__(self, work):
        self.count += 1
        work()  # as a CUDA graph's: what is recorded has been tried
        with Tape() as tape:
            output = work()

        def replay():
            self.replays += 1
            tape.replay()

        return replay, output


def captured(model: nn.Module) -> tuple[CapturedModel, Recorder]:
    recorder = Recorder()
    return CapturedModel(Recordings(model, recorder)), recorder
