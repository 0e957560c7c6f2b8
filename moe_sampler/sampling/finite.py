"""Whether a run's state stayed finite, found out without a wait: sums on the device, read when it is over."""

from __future__ import annotations

import torch

from ..errors import NonFiniteError
from .plan import SamplingPlan

__all__ = ["FiniteWatch"]


class FiniteWatch:
    """A sum of the state after every step: NaN and infinities survive it, and it takes a fraction of the time
    that asking every element takes.

    Args:
        plan: that is run.
        x: [B, ...] float32, the state, as it is before the first step.
    """

    def __init__(self, plan: SamplingPlan, x: torch.Tensor) -> None:
        self._plan, self._x, self._axes = plan, x, tuple(range(x.ndim))
        self._sums = torch.zeros(2, len(plan) + 1, device=x.device)
        self._after_callback, self._after_step = (row.unbind() for row in self._sums)
        torch.sum(x, dim=self._axes, out=self._after_step[0])

    def see_step(self, index: int) -> None:
        """The state is what plan step `index` made of it."""
        torch.sum(self._x, dim=self._axes, out=self._after_step[index + 1])

    def see_callback(self, index: int) -> None:
        """The state is what the callback put in the place of what plan step `index` made."""
        torch.sum(self._x, dim=self._axes, out=self._after_callback[index + 1])

    def check(self) -> None:
        """Raise NonFiniteError for the first step that left no finite state; waits for the device."""
        finite = self._sums.isfinite()
        if finite.all():
            return
        # A step comes before its callback.
        seen = finite.flip(0).T.flatten().tolist()
        place, by_callback = divmod(seen.index(False), 2)
        if place == 0:
            raise NonFiniteError("the state that the run starts from holds NaN or an infinity")
        index = place - 1
        step = self._plan.steps[index]
        where = f"at step {index} (of 0 to {len(self._plan) - 1}, noise level {step.level.noise:.4f})"
        if by_callback:
            raise NonFiniteError(f"the callback's latents {where} hold NaN or an infinity")
        names = tuple(call.name for call in step.calls)
        raise NonFiniteError(f"{' or '.join(names)} gave NaN or an infinity {where}", names)
