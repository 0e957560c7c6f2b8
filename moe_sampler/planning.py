"""Planning: from experts and a router to a table of coefficients, in float64, before the first model call."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .experts import Expert
from .kernels.conversions import shift_sigma
from .kernels.rows import COLUMNS, make_row
from .paths import Level
from .predictions import x0_coefficients
from .routers import Router, Spans, active_experts, lead_expert, lead_spans
from .solvers import solver_row

__all__ = ["ExpertCall", "PlanStep", "SamplingPlan", "plan"]

_FORMAT = 1


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
    row: tuple[float, ...]
    """The update's coefficients, float64, in the order of `moe_sampler.kernels.rows.COLUMNS`."""

    @property
    def coefficients(self) -> dict[str, float]:
        return dict(zip(COLUMNS, self.row, strict=True))


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
        return any(step.coefficients["n"] != 0.0 for step in self.steps)

    def table(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """[steps, ROW_WIDTH] float32: one row a step, as `sampler_step_` reads it."""
        rows = [make_row(**step.coefficients) for step in self.steps]
        return torch.tensor(rows, dtype=torch.float64).float().to(device)

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
        if body.get("format") != _FORMAT:
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
                    " + ".join(f"{c.guidance_scale:g}" for c in step.calls),
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
        return "\n".join([f"{len(self)} steps, {self.model_calls} model calls per sample", *lines])


@dataclass(frozen=True, slots=True)
class _Node:
    """A place where models are evaluated: the state's level and who looks at it."""

    noise: float
    weights: Mapping[str, float]
    lead: Expert
    level: Level


def _allocate(spans: Sequence[tuple[str, float, float]], steps: int, shift: float) -> list[int]:
    """Share `steps` out to spans in proportion to their length on the shifted grid, at least one each."""
    if steps < len(spans):
        raise ValueError(
            f"{steps} steps cannot serve {len(spans)} spans of experts: use at least {len(spans)}"
        )
    u = [shift_sigma(high, 1.0 / shift) - shift_sigma(low, 1.0 / shift) for _, high, low in spans]
    exact = [steps * length / sum(u) for length in u]
    counts = [max(1, math.floor(share)) for share in exact]
    while sum(counts) < steps:
        counts[max(range(len(u)), key=lambda i: exact[i] - counts[i])] += 1
    while sum(counts) > steps:
        counts[max((i for i in range(len(u)) if counts[i] > 1), key=lambda i: counts[i] - exact[i])] -= 1
    return counts


def _counts_by_name(
    spans: Sequence[tuple[str, float, float]], steps: Mapping[str, int], known: Sequence[str]
) -> list[int]:
    for name in steps:
        if name not in known:
            raise ValueError(f"steps names {name!r}, but the experts are {', '.join(map(repr, known))}")
    counts: list[int] = [0] * len(spans)
    for name in {span[0] for span in spans}:
        if name not in steps:
            raise ValueError(f"expert {name!r} leads a part of the run: say how many steps it gets")
        own = [i for i, span in enumerate(spans) if span[0] == name]
        for i, count in zip(own, _allocate([spans[i] for i in own], steps[name], 1.0), strict=True):
            counts[i] = count
    return counts


def _noise_levels(
    experts: Mapping[str, Expert], router: Router, steps: int | Mapping[str, int], start: float, end: float
) -> list[float]:
    """Nodes for every span, each on its leading expert's own grid."""
    spans = lead_spans(router, list(experts), start, end)
    if isinstance(steps, Mapping):
        counts = _counts_by_name(spans, steps, list(experts))
    else:
        shifts = [e.shift for e in experts.values() if not e.path.discrete]
        counts = _allocate(spans, steps, max(shifts, default=1.0))
    return [
        noise
        for (name, high, low), count in zip(spans, counts, strict=True)
        for noise in experts[name].path.grid(count, high, low, experts[name].shift, experts[name].spacing)
    ]


def _nodes(experts: Mapping[str, Expert], router: Router, noises: Sequence[float]) -> list[_Node]:
    nodes: list[_Node] = []
    for noise in noises:
        weights = active_experts(router, noise, list(experts))
        lead = experts[lead_expert(weights)]
        # A discrete-time model sees only its integer grid; a continuous one follows it anywhere.
        grid = next((e.path for e in (lead, *(experts[name] for name in weights)) if e.path.discrete), None)
        level = lead.path.at(noise)
        if grid is not None:
            on_grid = grid.level(round(grid.timestep(level)))
            noise = on_grid.noise
            level = on_grid if lead.path is grid else lead.path.at(noise)
        if nodes and not noise < nodes[-1].noise:
            raise ValueError(
                f"two steps fall on noise level {noise:.4f} of the integer timesteps: use fewer steps"
            )
        nodes.append(_Node(noise, weights, lead, level))
    return nodes


def _call(expert: Expert, weight: float, state: Level) -> tuple[ExpertCall, float, tuple[float, float]]:
    """An expert's call at the state's level, with its share of p and its (q_cond, q_uncond)."""
    own = expert.path.at(state.noise)
    timestep = expert.path.timestep(own)
    if expert.path.discrete and abs(timestep - round(timestep)) < 1e-6:
        timestep = round(timestep)
        own = expert.path.level(timestep)
    scale = own.sigma / state.sigma
    p, q = x0_coefficients(expert.prediction, own)
    g = expert.guidance_scale
    call = ExpertCall(expert.name, weight, timestep, g, 1.0 if own == state else scale)
    return call, weight * p * call.input_scale, (weight * g * q, weight * (1.0 - g) * q)


def _compile(experts: Mapping[str, Expert], nodes: Sequence[_Node], end: float) -> tuple[PlanStep, ...]:
    """One step from every node to the next; the last one goes to `end`."""
    last = Level(1.0, 0.0) if end == 0.0 else nodes[-1].lead.path.at(end)
    targets = [*(node.level for node in nodes[1:]), last]
    calls: list[tuple[ExpertCall, ...]] = []
    rows: list[dict[str, float]] = []
    for index, (node, target) in enumerate(zip(nodes, targets, strict=True)):
        lead, previous = node.lead, nodes[index - 1].level if index else None
        row = dict.fromkeys(COLUMNS, 0.0)
        row |= solver_row(lead.solver, node.level, target, previous, lead.eta)._asdict()
        row["clip"] = math.inf if lead.clip_sample_range is None else lead.clip_sample_range
        own = []
        for slot, (name, weight) in enumerate(node.weights.items()):
            call, p, (q_cond, q_uncond) = _call(experts[name], weight, node.level)
            own.append(call)
            row["p"] += p
            row[f"q_cond_{slot}"], row[f"q_uncond_{slot}"] = q_cond, q_uncond
            if rows:
                # The launch that ends a step also writes the next step's model inputs.
                rows[-1][f"scale_{slot}"] = call.input_scale
        calls.append(tuple(own))
        rows.append(row)
    return tuple(
        PlanStep(own, node.level, target, node.lead.solver, tuple(row[name] for name in COLUMNS))
        for own, node, target, row in zip(calls, nodes, targets, rows, strict=True)
    )


def plan(
    experts: Expert | Sequence[Expert],
    router: Router | None = None,
    *,
    steps: int | Mapping[str, int] = 20,
    start: float = 1.0,
    end: float = 0.0,
    noise_levels: Sequence[float] | None = None,
) -> SamplingPlan:
    """Compile a run: every step's guidance, conversion, solver, handoff and mixing folded into one row.

    Args:
        experts: one or several. Their solver, shift, spacing, guidance and clipping are their own.
        router: who works at which noise level; not needed for a single expert.
        steps: in all, shared out over the experts' spans by their length on the shifted grid; or by name,
            `{"sol": 8, "lune": 12}`.
        start, end: the noise levels (`Level.noise`) the run begins and ends at.
        noise_levels: the nodes themselves, descending, instead of `steps`, `start` and the experts' grids.

    Returns:
        An immutable `SamplingPlan`.

    Raises:
        ValueError: anything out of range or inconsistent, before any work.
    """
    known = {e.name: e for e in ([experts] if isinstance(experts, Expert) else experts)}
    if not known or len(known) < (1 if isinstance(experts, Expert) else len(experts)):
        raise ValueError("give at least one expert, each with a name of its own")
    if router is None:
        if len(known) > 1:
            raise ValueError(f"{len(known)} experts need a router that says which works when")
        router = Spans(((next(iter(known)), 0.0),))
    if not 0.0 <= end < start <= 1.0:
        raise ValueError(f"a run goes from start to end with 0 <= end < start <= 1, got {start} to {end}")
    for count in steps.values() if isinstance(steps, Mapping) else [steps]:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"steps must be whole numbers of at least 1, got {count!r}")

    if noise_levels is None:
        noise_levels = _noise_levels(known, router, steps, start, end)
    nodes = _nodes(known, router, noise_levels)
    if not nodes or not nodes[-1].noise > end:
        raise ValueError(f"noise levels must be given, descending and above the end of the run ({end})")
    return SamplingPlan(_compile(known, nodes, end), nodes[0].lead.path.initial_scale(nodes[0].level))
