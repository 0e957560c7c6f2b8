"""One expert in memory at a time: who is at work takes its weights in, who was gives them up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..loading.weights import ExpertWeights
from ..sampling.plan import SamplingPlan
from .choices import OFFLOADS, Offload, check_choice

__all__ = ["OFFLOADS", "ExpertOffload", "Offload", "Stage", "check_offload", "stages"]


def check_offload(offload: str) -> None:
    check_choice("offload", offload, OFFLOADS)


@dataclass(frozen=True)
class Stage:
    """A stretch of a plan with the same experts at work: plan steps up to, not including, `until`."""

    experts: frozenset[str]
    until: int


def stages(plan: SamplingPlan) -> list[Stage]:
    """The plan's stretches in order. A crossfade is one with two experts."""
    found: list[Stage] = []
    for index, step in enumerate(plan.steps):
        experts = frozenset(call.name for call in step.calls)
        if found and found[-1].experts == experts:
            found.pop()
        found.append(Stage(experts, index + 1))
    return found


class ExpertOffload:
    """Which experts have their weights in memory.

    Args:
        weights: by expert.
        device: where they work.

    Raises:
        ValueError: on a CPU, an expert that was not loaded from files: there is nowhere to put it.
    """

    def __init__(self, weights: Mapping[str, ExpertWeights], device: torch.device) -> None:
        self.check(weights, device)
        self._weights, self._stream = dict(weights), None
        self.device = device
        self.use(())

    @staticmethod
    def check(weights: Mapping[str, ExpertWeights], device: torch.device) -> None:
        """Whether there is somewhere to put experts that are not at work."""
        held = [name for name, own in weights.items() if not own.has_files]
        if device.type == "cpu" and held:
            raise ValueError(
                f'offload="expert" on a CPU reads experts from their files when they are at work, but '
                f"{', '.join(held)} came without files: load with from_pretrained"
            )

    def use(self, names: Iterable[str]) -> None:
        """Make exactly these experts resident; the others go first, so that there is room."""
        names = set(names)
        for name, weights in self._weights.items():
            if name not in names:
                weights.release()
        for name in names:
            self._weights[name].take(self.device)

    def prefetch(self, names: Iterable[str]) -> None:
        """On CUDA, begin to copy the next experts from pinned memory on a stream of their own."""
        if self.device.type != "cuda":
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        for name in names:
            self._weights[name].prefetch(self.device, self._stream)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """One expert in memory for as long as the block lasts."""
        self.use([name])
        try:
            yield
        finally:
            self.use(())

    def end(self, device: torch.device | str) -> None:
        """Give every expert its weights for good, on `device`."""
        for weights in self._weights.values():
            weights.take_for_good(device)
