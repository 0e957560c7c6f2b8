"""A sampling plan: a whole run as a table of coefficients, known before it starts."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass

import torch

from moe_sampler.kernels.rows import COLUMNS, INDEX, ROW_WIDTH, check_row

from .paths import Level
from .solvers import HEUN_CORRECTOR

__all__ = ["ExpertCall", "PlanStep", "SamplingPlan"]

_FORMAT = 2
_READABLE_FORMATS = (1, 2)  # 1 knew no guidance rescale


@dataclass(frozen=True, slots=True)
class ExpertCall:
    """One expert's part in one step."""

    name: str
    weight: float
    timestep: float
    """What the model is told; an int where the expert's path is discrete."""
    guidance_scale: float
    input_scale: float
    """Factor from the state to this expert's input: 1 unless two paths are mixed."""
    guidance_rescale: float = 0.0
    """Share of the guided prediction that is scaled back to the conditional one's standard deviation: the one
    thing that depends on the data, so it is no coefficient of the row."""

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1.0


@dataclass(frozen=True, slots=True)
class PlanStep:
    """One model evaluation (of one or two experts) and the update that follows it."""

    calls: tuple[ExpertCall, ...]
    level: Level
    target: Level
    solver: str
    """That of the expert that leads where the step begins; `heun_corrector` is a Heun step's second row."""
    row: tuple[float, ...]
    """The update's coefficients, float64, in the order of `moe_sampler.kernels.rows.COLUMNS`."""

    @property
    def corrects(self) -> bool:
        """Whether this is the second evaluation of a step, at the level the first one went to."""
        return self.solver == HEUN_CORRECTOR

    @property
    def coefficients(self) -> dict[str, float]:
        return dict(zip(COLUMNS, self.row, strict=True))

    @property
    def adds_noise(self) -> bool:
        return self.row[INDEX["n"]] != 0.0

    @property
    def reads_history(self) -> bool:
        """Whether a multistep solver needs the prediction of the step before."""
        return self.row[INDEX["d"]] != 0.0


@dataclass(frozen=True)
class SamplingPlan:
    """A whole run, known before it starts. Immutable, printable, JSON-serialisable.

    Args:
        steps: from noise to data.
        initial_scale: factor on N(0, 1) noise that makes the first state.
    """

    steps: tuple[PlanStep, ...]
    initial_scale: float

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts at work, in order of appearance."""
        return tuple(dict.fromkeys(call.name for step in self.steps for call in step.calls))

    @property
    def start_level(self) -> Level:
        """Where the run begins: an image that is to be changed needs this much noise (see `noised`)."""
        return self.steps[0].level

    @property
    def noise_levels(self) -> tuple[float, ...]:
        """The solver's nodes. `plan(..., noise_levels=compiled.noise_levels[k:])` is the run without its
        first k steps."""
        return tuple(step.level.noise for step in self.steps if not step.corrects)

    @property
    def model_calls(self) -> int:
        """Passes through a model per sample; guidance costs two."""
        return sum(2 if call.guided else 1 for step in self.steps for call in step.calls)

    @property
    def guided(self) -> bool:
        """Whether any step uses classifier-free guidance."""
        return any(call.guided for step in self.steps for call in step.calls)

    @property
    def needs_noise(self) -> bool:
        """Whether any step adds noise."""
        return any(step.adds_noise for step in self.steps)

    def table(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """[steps, ROW_WIDTH] float32: one row a step, as `sampler_step_` reads it."""
        for step in self.steps:
            check_row(step.row)
        table = torch.zeros(len(self.steps), ROW_WIDTH)
        table[:, : len(COLUMNS)] = torch.tensor([step.row for step in self.steps], dtype=torch.float64)
        return table.to(device)

    def to_json(self, **kwargs) -> str:
        """JSON that `from_json` reads back to an equal plan, bit for bit. kwargs go to `json.dumps`."""
        body = dataclasses.asdict(self)
        for step in body["steps"]:
            # JSON has no infinity: null is "no clip".
            step["row"] = {
                name: (value if math.isfinite(value) else None)
                for name, value in zip(COLUMNS, step["row"], strict=True)
            }
        return json.dumps({"format": _FORMAT, **body}, **kwargs)

    @classmethod
    def from_json(cls, text: str) -> SamplingPlan:
        body = json.loads(text)
        if body.get("format") not in _READABLE_FORMATS:
            raise ValueError(
                f"this is not a sampling plan of format {_FORMAT}: format is {body.get('format')!r}"
            )
        steps = tuple(
            PlanStep(
                calls=tuple(ExpertCall(**call) for call in step["calls"]),
                level=Level(**step["level"]),
                target=Level(**step["target"]),
                solver=step["solver"],
                row=tuple(math.inf if step["row"][name] is None else step["row"][name] for name in COLUMNS),
            )
            for step in body["steps"]
        )
        return cls(steps, body["initial_scale"])

    def _display_rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and cells of the printed plan."""
        header = (
            "step",
            "expert",
            "timestep",
            "noise",
            "alpha",
            "sigma",
            "to noise",
            "guidance",
            "solver",
            "fresh noise",
        )
        cells = []
        for index, step in enumerate(self.steps):
            mixed = len(step.calls) > 1
            names = (f"{c.weight:.0%} {c.name}" if mixed else c.name for c in step.calls)
            timesteps = (
                f"{c.timestep}" if isinstance(c.timestep, int) else f"{c.timestep:.2f}" for c in step.calls
            )
            cells.append(
                (
                    str(index),
                    " + ".join(names),
                    " + ".join(timesteps),
                    f"{step.level.noise:.4f}",
                    f"{step.level.alpha:.4f}",
                    f"{step.level.sigma:.4f}",
                    f"{step.target.noise:.4f}",
                    " + ".join(map(_guidance, step.calls)),
                    step.solver,
                    f"{step.coefficients['n']:.4f}",
                )
            )
        return header, cells

    def __str__(self) -> str:
        header, cells = self._display_rows()
        widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in [header, *cells]
        ]
        return "\n".join(
            [f"{len(self.noise_levels)} steps, {self.model_calls} model calls per sample", *lines]
        )


def _guidance(call: ExpertCall) -> str:
    rescaled = f" rescaled {call.guidance_rescale:g}" if call.guidance_rescale else ""
    return f"{call.guidance_scale:g}{rescaled}"
