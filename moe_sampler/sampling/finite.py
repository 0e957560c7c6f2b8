"""Whether a run's state stayed finite, without a wait: flags on the device, read when the run is over."""

from __future__ import annotations

import torch

from ..errors import NonFiniteError
from .plan import SamplingPlan

__all__ = ["FiniteWatch"]


class FiniteWatch:
    """Flags, one a step, which the launch that takes a step sets if it left NaN or an infinity.

    Args:
        plan: that is run.
        x: [B, ...] float32, the state, as it is before the first step.

    Attributes:
        by_step: int32 [steps], as `sampler_step_` takes it.
    """

    def __init__(self, plan: SamplingPlan, x: torch.Tensor) -> None:
        self._plan, self._x = plan, x
        self.by_step = torch.zeros(len(plan), dtype=torch.int32, device=x.device)
        self._start = x.sum()  # NaN and infinities survive a sum
        self._by_callback: dict[int, torch.Tensor] = {}

    def see_callback(self, index: int) -> None:
        """The state is what the callback put in the place of what plan step `index` made."""
        self._by_callback[index] = self._x.sum()

    def check(self) -> None:
        """Raise NonFiniteError for the first step that left no finite state; waits for the device."""
        others = torch.stack([self._start, *self._by_callback.values()]).isfinite().logical_not()
        found = torch.cat([self.by_step, others.int()]).tolist()  # one read
        by_step, started, by_callback = (
            found[: len(self._plan)],
            found[len(self._plan)],
            found[len(self._plan) + 1 :],
        )
        if started:
            raise NonFiniteError("the state that the run starts from holds NaN or an infinity")
        # A step comes before its callback.
        bad = [(index, False) for index, flag in enumerate(by_step) if flag]
        bad += [(index, True) for index, flag in zip(self._by_callback, by_callback, strict=True) if flag]
        if not bad:
            return
        index, replaced = min(bad)
        step = self._plan.steps[index]
        where = f"at step {index} (of 0 to {len(self._plan) - 1}, noise level {step.level.noise:.4f})"
        if replaced:
            raise NonFiniteError(f"the callback's latents {where} hold NaN or an infinity")
        names = tuple(call.name for call in step.calls)
        raise NonFiniteError(f"{' or '.join(names)} gave NaN or an infinity {where}", names)
