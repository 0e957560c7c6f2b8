"""The steps since the log was written: their numbers stay on the device until they are wanted.

To read a number waits for the device, which then has nothing to do until the host has caught up. So a step
that isn't logged reads none: what it found is kept here, and all of it is read at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from .task import Losses

__all__ = ["StepNumbers", "Window"]


@dataclass(frozen=True)
class StepNumbers:
    """What a step was, on the host.

    step: its number. loss: this process's. grad_norm: before clipping. finite: whether every process's loss
    and the gradient are. losses_finite: the losses alone. terms: by name. per_sample, noise: of its
    micro-batches, [B] each.
    """

    step: int
    loss: float
    grad_norm: float
    finite: bool
    losses_finite: bool
    terms: dict[str, float]
    per_sample: tuple[Tensor, ...]
    noise: tuple[Tensor, ...]


class Window:
    """Steps that were made and not read yet."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, list[Losses], Tensor]] = []

    def add(self, step: int, found: Sequence[Losses], grad_norm: Tensor) -> None:
        """found: of the micro-batches, detached. grad_norm: []."""
        self._steps.append((step, list(found), grad_norm))

    def read(self, accelerator: Accelerator) -> list[StepNumbers]:
        """All of them, in order; none are left. This waits for the device. All processes call it at once."""
        steps, self._steps = self._steps, []
        if not steps:
            return []
        losses = torch.stack(
            [torch.stack([micro.loss.float() for micro in found]).mean() for _, found, _ in steps]
        )
        norms = torch.stack([norm.float() for _, _, norm in steps])
        broken = accelerator.reduce((~losses.isfinite()).float(), "sum")
        assert isinstance(broken, Tensor)
        names = list(dict.fromkeys(name for _, found, _ in steps for micro in found for name in micro.terms))
        terms = _terms(steps, names, losses)
        numbers = torch.cat([torch.stack([losses, norms, broken]).double(), terms]).tolist()
        rows = _split(steps)
        result = []
        for place, (step, found, _) in enumerate(steps):
            loss, norm, bad, *own = (row[place] for row in numbers)
            present = {name for micro in found for name in micro.terms}
            named = {name: value for name, value in zip(names, own, strict=True) if name in present}
            per_sample, noise = rows[place]
            whole = not bad
            result.append(
                StepNumbers(step, loss, norm, whole and math.isfinite(norm), whole, named, per_sample, noise)
            )
        return result


def _terms(steps: list[tuple[int, list[Losses], Tensor]], names: list[str], like: Tensor) -> Tensor:
    """float64 [names, steps], means over the micro-batches; NaN where a step has no such term."""
    absent = like.new_full((), math.nan, dtype=torch.float64)

    def mean(found: list[Losses], name: str) -> Tensor:
        own = [micro.terms[name].detach().double().reshape(()) for micro in found if name in micro.terms]
        return torch.stack(own).sum() / len(found) if own else absent

    if not names:
        return like.new_empty((0, len(steps)), dtype=torch.float64)
    return torch.stack([torch.stack([mean(found, name) for _, found, _ in steps]) for name in names])


def _split(
    steps: list[tuple[int, list[Losses], Tensor]],
) -> list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """(per_sample, noise) of every step's micro-batches, on the host."""
    flat = [micro for _, found, _ in steps for micro in found]
    sizes = [len(micro.per_sample) for micro in flat]
    both = torch.stack(
        [
            torch.cat([micro.per_sample.detach().double() for micro in flat]),
            torch.cat([micro.noise.detach().double() for micro in flat]),
        ]
    ).cpu()
    per_sample, noise = (iter(row.split(sizes)) for row in both)
    return [
        (tuple(next(per_sample) for _ in found), tuple(next(noise) for _ in found)) for _, found, _ in steps
    ]
