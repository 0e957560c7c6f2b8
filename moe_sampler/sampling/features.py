"""The deep features that a run keeps from one call of an expert for the next ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .plan import ExpertCall, PlanStep, SamplingPlan
from .reuse import check_reuse

__all__ = ["KeptFeatures"]


class KeptFeatures:
    """Calls a run's models, and keeps the features of full calls for as long as the plan reuses them: a
    run's own, so that no other run, batch, expert or half of the guidance ever reads them.

    Args:
        models: by expert; of those whose features are reused, a `reuse.ReusableModel`.
    """

    def __init__(self, models: Mapping[str, Callable[..., Any]]) -> None:
        self._models = models
        self._features: dict[str, torch.Tensor] = {}

    def check(self, plan: SamplingPlan, index: int, batch: int) -> None:
        """Raise ValueError unless the plan can be run from this step on.

        Args:
            batch: of the latents.
        """
        for name in dict.fromkeys(c.name for step in plan.steps[index:] for c in step.calls if c.reuses):
            model: Any = self._models[name]
            if not hasattr(model, "reusing"):
                raise ValueError(
                    f"the plan lets {name} reuse features, and its model can't: give the expert "
                    "moe_sampler.architectures.expert_model.ExpertModel(model), or plan without reuse"
                )
            model.check_reusable()
        have = {name: len(own) > batch for name, own in self._features.items()}
        check_reuse(plan.steps[index:], have, index)

    def call(
        self,
        call: ExpertCall,
        following: PlanStep | None,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """A model's output.

        Args:
            following: the plan's next step, which may reuse the features.
        """
        model: Any = self._models[call.name]
        kept = _reuses(() if following is None else following.calls, call.name)
        features: Any = self._features.pop(call.name, None)
        if call.reuses:
            # An unguided call after guided ones has no unconditional half, which comes first.
            output = model.reusing(sample, timestep, features[-len(sample) :], **conditioning)
        elif kept:
            output, features = model.recording(sample, timestep, **conditioning)
        else:
            output = model(sample, timestep, **conditioning)
        if kept:
            self._features[call.name] = features
        return output if isinstance(output, torch.Tensor) else output[0]


def _reuses(calls: Sequence[ExpertCall], name: str) -> bool:
    return any(call.name == name and call.reuses for call in calls)
