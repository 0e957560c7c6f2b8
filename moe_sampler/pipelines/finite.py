"""NaN and infinities never leave a pipeline: where they came from, in one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from ..errors import NonFiniteError

__all__ = ["check_finite", "finite", "naming_weights"]


def finite(values: torch.Tensor) -> bool:
    """Whether all of it is; waits for the device. A sum keeps NaN and infinities, at a fraction of what it
    costs to ask every element."""
    return math.isfinite(values.sum(dtype=torch.float32).item())


def _cause(name: str, model: nn.Module) -> str:
    """What of a model may have made them: its weights, or else its number format."""
    for parameter, values in [*model.named_parameters(), *model.named_buffers()]:
        if values.is_floating_point() and values.device.type != "meta" and not finite(values.detach()):
            return f"{name} has NaN or infinite weights, {parameter} first: use another file, or another LoRA"
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    if dtype == torch.float16:
        return f"{name}'s weights are finite, but float16 overflows beyond 65504: try bfloat16 or float32"
    return f"{name}'s weights are finite: look at what it was given, and at a huge guidance scale"


def check_finite(what: str, values: torch.Tensor, name: str, model: nn.Module) -> None:
    """Raise NonFiniteError unless all of `values` is finite; waits for the device.

    Args:
        what: they are, for the message.
        values: any shape, floats.
        name, model: which made them.
    """
    if not finite(values):
        raise NonFiniteError(f"NaN or an infinity in {what}: {_cause(name, model)}")


@contextmanager
def naming_weights(
    model_of: Callable[[str], nn.Module],
    at_work: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
) -> Iterator[None]:
    """A block whose NonFiniteError also says whether the expert's weights are to blame.

    Args:
        model_of: an expert's model, by its name.
        at_work: a context in which an expert's weights are in memory.
    """
    try:
        yield
    except NonFiniteError as error:
        causes = []
        for name in error.experts:
            with at_work(name), torch.no_grad():
                causes.append(_cause(name, model_of(name)))
        if not causes:
            raise
        raise NonFiniteError(f"{error}: {'; '.join(causes)}", error.experts) from None
