"""Ways to step, in words: which solver and which spacing each expert has, as comparisons name them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..sampling.plan import SamplingPlan
from ..sampling.scheduler_names import check_solver_name
from ..sampling.spacing_names import read_levels

__all__ = ["Stepping", "plan_of_calls"]


@dataclass(frozen=True)
class Stepping:
    """A solver and a spacing by expert.

    Args:
        title: as it was written: "dpmpp_2m", "ddpm+euler", "dpmpp_2m@karras", "ddpm+euler@beta".
        solver, levels: by expert, as `Expert` takes them.
    """

    title: str
    solver: Mapping[str, str]
    levels: Mapping[str, Any]

    @classmethod
    def read(cls, text: str, names: Sequence[str]) -> Stepping:
        """From SOLVER[@SPACING], for all experts, or one each from noise to data, joined by +.

        Raises:
            ValueError: another form, an unknown solver or spacing, or as many as there are not experts.
        """
        parts = [part.strip() for part in text.split("+")]
        if len(parts) == 1:
            parts *= len(names)
        if len(parts) != len(names):
            raise ValueError(
                f'"{text}" has {len(parts)} solvers for {len(names)} experts: give one for all, or '
                f"{'+'.join(['SOLVER'] * len(names))}, from noise to data"
            )
        solver, levels = {}, {}
        for name, part in zip(names, parts, strict=True):
            own, at, spacing = part.partition("@")
            check_solver_name(own)
            solver[name] = own
            if at:
                levels[name] = read_levels(f'"{text}"', spacing)
        return cls(text, solver, levels)

    @property
    def settings(self) -> dict[str, Any]:
        """As `HybridPipeline.experts` takes them."""
        return {"solver": dict(self.solver), **({"levels": dict(self.levels)} if self.levels else {})}


def plan_of_calls(make: Callable[[int], SamplingPlan], calls: int) -> SamplingPlan:
    """The longest plan that calls models at most `calls` times: a step of Heun's takes two calls. A guided
    call counts once.

    Args:
        make: from a number of steps to a plan.

    Raises:
        ValueError: even the shortest plan takes more, or none of them can be made.
    """
    refused: ValueError | None = None
    for steps in range(calls, 0, -1):
        try:
            found = make(steps)
        except ValueError as error:  # too many or too few for these experts
            refused = refused or error
            continue
        if len(found) <= calls:
            return found
    raise refused or ValueError(f"no plan of these solvers takes {calls} model calls or fewer")
