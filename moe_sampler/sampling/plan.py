"""A sampling plan: a whole run as a table of coefficients, known before it starts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_sampler._readers import parse_json, typed
from moe_sampler.kernels.rows import COLUMNS, INDEX, MOST_EXPERTS, ROW_WIDTH, check_row

from .guiders import Guider
from .paths import Level
from .recipe import Recipe, compile_again
from .reuse import check_reuse
from .solvers import SolverRow

if TYPE_CHECKING:
    import torch

    from .experts import Expert

__all__ = ["ExpertCall", "PlanStep", "SamplingPlan"]

MOST_STEPS = 100_000
_ROW_BEFORE_7 = {"p", "a", "b", "d", "n", "clip", "scale_0", "scale_1"} | {
    f"q_{kind}_{slot}" for kind in ("cond", "uncond") for slot in (0, 1)
}
_FORMAT = 9
_READABLE_FORMATS = (1, 2, 3, 4, 5, 6, 7, 8, 9)
"""1 knew no guidance rescale, 2 no start from an image, 3 no digest, 4 not what it was compiled from, 5 no
reuse of features, 6 but one memory, which every step wrote, 7 no levels of experts, 8 no guiders."""


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
    """Share of the guided prediction that is scaled back to the conditional one's standard deviation. It
    depends on the data, as guiders do, so it is no coefficient of the row."""
    share: float = 1.0
    """How much of a full pass it computes; below 1 the rest is reused from the expert's last full call (see
    `reuse`)."""
    guider: Guider | None = None
    """How the guidance is made of the two predictions, if not plainly."""
    to_x0: tuple[float, float] = (0.0, 1.0)
    """(p, q) from the state and this expert's output to x0, which an "apg" guider projects on."""

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1.0

    @property
    def reuses(self) -> bool:
        return self.share < 1.0


@dataclass(frozen=True, slots=True)
class PlanStep:
    """One model evaluation (of one to four experts) and the update that follows it."""

    calls: tuple[ExpertCall, ...]
    level: Level
    target: Level
    solver: str
    """That of the expert that leads where the step begins; `..._corrector` is the second row of a step of
    two, like `heun_corrector`."""
    row: tuple[float, ...]
    """The update's coefficients, float64, in the order of `moe_sampler.kernels.rows.COLUMNS`."""

    @property
    def corrects(self) -> bool:
        """Whether this is the second evaluation of a step, at the level the first one went to."""
        return self.solver.endswith("_corrector")

    @property
    def coefficients(self) -> dict[str, float]:
        return dict(zip(COLUMNS, self.row, strict=True))

    @property
    def adds_noise(self) -> bool:
        return self.row[INDEX["n"]] != 0.0

    @property
    def cost(self) -> float:
        """Of its calls, as `SamplingPlan.cost` counts them."""
        return sum(call.share * (2 if call.guided else 1) for call in self.calls)

    @property
    def update(self) -> SolverRow:
        """The part of the row that is the solver's."""
        return SolverRow(*(self.row[INDEX[name]] for name in SolverRow._fields))


@dataclass(frozen=True)
class SamplingPlan:
    """A whole run, known before it starts. Immutable, printable, JSON-serialisable.

    Args:
        steps: from noise to data.
        initial_scale: factor on N(0, 1) noise that makes the first state.
        from_image: the run begins with an image and the first level's share of noise (see `noised`), not with
            noise alone.
        made_from: the experts, the router and the counts it was compiled from, as data (see `Recipe`); None
            for a plan that wasn't compiled, or was changed since. It says nothing that the steps don't do,
            so that equal plans may differ in it.
    """

    steps: tuple[PlanStep, ...]
    initial_scale: float
    from_image: bool = False
    made_from: Recipe | None = field(default=None, compare=False, repr=False)

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
        """The solver's nodes. Planned with `noise_levels` from the k-th on, a run is without its first k
        steps."""
        return tuple(step.level.noise for step in self.steps if not step.corrects)

    @property
    def model_calls(self) -> int:
        """Passes through a model per sample; guidance costs two."""
        return sum(2 if call.guided else 1 for step in self.steps for call in step.calls)

    @property
    def cost(self) -> float:
        """What a sample costs, in full passes through a model: as `model_calls`, but a call that reuses
        features counts as the share of a pass that it computes."""
        return sum(step.cost for step in self.steps)

    @property
    def reuses(self) -> bool:
        """Whether any call reuses features of an earlier one."""
        return any(call.reuses for step in self.steps for call in step.calls)

    @property
    def guided(self) -> bool:
        """Whether any step uses classifier-free guidance."""
        return any(call.guided for step in self.steps for call in step.calls)

    @property
    def memories(self) -> int:
        """How many of the things that steps keep have to be at hand at once: 0 to 3."""
        updates = [step.update for step in self.steps]
        return max((max(update.memories, int(update.keeps)) for update in updates), default=0)

    @property
    def needs_noise(self) -> bool:
        """Whether any step adds noise."""
        return any(step.adds_noise for step in self.steps)

    def check(self) -> None:
        """Raise ValueError unless this can be run from its first step: not every plan is the planner's."""
        if not self.steps:
            raise ValueError("the plan has no steps")
        for index, step in enumerate(self.steps):
            if not 1 <= len(step.calls) <= MOST_EXPERTS:
                raise ValueError(
                    f"step {index} of the plan calls {len(step.calls)} experts: one to {MOST_EXPERTS} work"
                )
            check_row(step.row)
            if not all(0.0 < call.share <= 1.0 for call in step.calls):
                raise ValueError(f"step {index} of the plan has a call whose share is not in (0, 1]")
            if not all(len(call.to_x0) == 2 and call.to_x0[1] for call in step.calls):
                raise ValueError(f"step {index} of the plan has a call whose output says nothing of x0")
        check_reuse(self.steps)
        kept = 0
        for step in self.steps:
            if step.update.memories > kept:
                raise ValueError(
                    "the plan reads the prediction of a step before its first one, so its beginning was cut "
                    "off: plan the rest anew, with noise_levels=plan.noise_levels[k:]"
                )
            kept += step.update.keeps

    def table(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """[steps, ROW_WIDTH] float32: one row a step, as `sampler_step_` reads it."""
        import torch  # planning needs none

        for step in self.steps:
            check_row(step.row)
        table = torch.zeros(len(self.steps), ROW_WIDTH)
        table[:, : len(COLUMNS)] = torch.tensor([step.row for step in self.steps], dtype=torch.float64)
        return table.to(device)

    def to_json(self, **kwargs: Any) -> str:
        """JSON that `from_json` reads back to an equal plan, bit for bit. kwargs go to `json.dumps`."""
        body = dataclasses.asdict(self)
        for step in body["steps"]:
            # JSON has no infinity: null is "no clip".
            step["row"] = {
                name: (value if math.isfinite(value) else None)
                for name, value in zip(COLUMNS, step["row"], strict=True)
            }
        body = {"format": _FORMAT, "made_from": body.pop("made_from"), **body}
        return json.dumps({**body, "digest": _digest(body)}, **kwargs)

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, steps: int | None, expert: Expert, **options: Any
    ) -> SamplingPlan:
        """What a diffusers scheduler does in a whole run, compiled.

        Args:
            scheduler: one of diffusers', its class name, or a name people know (see `Expert`'s solver).
            steps: how many; None where `options` say it.
            expert: whose model it is for; its guidance is folded in.
            options: more for the scheduler's `set_timesteps`, such as `mu`, `sigmas` or `timesteps`.

        Raises:
            ValueError: the scheduler is for other models, or no plan can hold what it does.
        """
        from .planner import plan_trail
        from .scheduler_trails import scheduler_trail

        own = dataclasses.replace(expert, solver=scheduler)
        return plan_trail(own, scheduler_trail(own, steps, options=options))

    @classmethod
    def from_sampler(
        cls,
        sampler: Callable[..., torch.Tensor],
        sigmas: Sequence[float] | torch.Tensor,
        expert: Expert,
        **options: Any,
    ) -> SamplingPlan:
        """What a sampling function in k-diffusion's and ComfyUI's form does, compiled.

        Args:
            sampler: `sampler(model, x, sigmas, ...)`, which calls `model(x, sigma)` for x0, sigma being [1].
            sigmas: from noise to data, as the function takes them: sigma / alpha of a DDPM path, whose state
                is x0 + sigma * noise; on the flow path the share of noise, whose state is the flow's own.
            expert: whose model it is for; its guidance is folded in.
            options: more for the function, such as `eta` or `s_churn`.

        Raises:
            ValueError: the function adapts its steps to what it samples, remembers too much, or leaves the
                expert's path.
        """
        from .planner import plan_trail
        from .sampler_functions import function_trail

        return plan_trail(expert, function_trail(sampler, sigmas, expert, options))

    def then(self, other: SamplingPlan) -> SamplingPlan:
        """This plan and another one after it, as one: its last step goes on to where the other begins, as the
        same state on the other's path. Neither remembers anything of the other.

        Args:
            other: begins at the noise level this one ends at, on whichever path.

        Raises:
            ValueError: it begins elsewhere.
        """
        from .joining import joined

        return joined(self, other)

    @classmethod
    def from_json(cls, text: str) -> SamplingPlan:
        """The plan that `to_json` wrote.

        Raises:
            ValueError: no JSON, no plan of a format this version reads, one that was changed since it was
                written, whose coefficients aren't those of what it says it was compiled from, or that cannot
                be run.
        """
        body = parse_json(text, "this", ValueError)
        found = body.get("format") if isinstance(body, dict) else None
        if found not in _READABLE_FORMATS:
            raise ValueError(f"this is not a sampling plan of format {_FORMAT}: format is {found!r}")
        try:
            if found >= 4 and body.get("digest") != _digest(body):
                raise ValueError("it was changed since it was compiled (its digest differs): plan anew")
            values = {key: value for key, value in body.items() if key not in ("format", "digest")}
            if isinstance(values.get("steps"), list):
                if len(values["steps"]) > MOST_STEPS:
                    raise ValueError(f"{len(values['steps'])} steps are more than {MOST_STEPS}")
                if found < 7:
                    values["steps"] = _with_memories(values["steps"])
                values["steps"] = [
                    _step_from_json(step, f"steps[{index}]") for index, step in enumerate(values["steps"])
                ]
            plan = typed(cls, values, "plan")
            plan.check()
            plan._check_recipe()
        except (TypeError, ValueError) as error:
            raise ValueError(f"this sampling plan is damaged: {error}") from None
        return plan

    def _check_recipe(self) -> None:
        """Raise ValueError unless the plan is what its recipe compiles to, on any machine."""
        if self.made_from is None:
            return
        again = compile_again(self.made_from)
        if again is None:
            return
        if len(again) != len(self):
            raise ValueError(
                f"it has {len(self)} steps, but its made_from compiles to {len(again)}: plan anew"
            )
        for index, (own, other) in enumerate(zip(self.steps, again.steps, strict=True)):
            name = _difference(own, other)
            if name is not None:
                raise ValueError(
                    f"step {index}'s {name} is not what its made_from compiles to: plan anew, or, if it was "
                    "meant to be changed, set made_from to None"
                )
        if not _close(self.initial_scale, again.initial_scale):
            raise ValueError("its initial_scale is not what its made_from compiles to: plan anew")

    def _display_rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and cells of the printed plan."""
        header: tuple[str, ...] = (
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
        if self.reuses:  # a column that says nothing else
            header = (*header, "pass")
            passes = [" + ".join("reuse" if c.reuses else "full" for c in s.calls) for s in self.steps]
            cells = [(*row, each) for row, each in zip(cells, passes, strict=True)]
        return header, cells

    def __str__(self) -> str:
        header, cells = self._display_rows()
        widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in [header, *cells]
        ]
        return "\n".join([self.steps_and_cost(), *lines])

    def steps_and_cost(self) -> str:
        """How many steps it has, how many passes through a model these take and, with reuse, what those cost,
        in words."""
        steps, calls = len(self.noise_levels), self.model_calls
        told = f"{steps} step{'s' * (steps != 1)}, {calls} model call{'s' * (calls != 1)} per sample"
        return f"{told} at the cost of {self.cost:.1f}" if self.reuses else told


def _digest(body: dict[str, Any]) -> str:
    """SHA-256 of a plan's JSON but for the digest itself, whatever the order and spacing."""
    plain = json.dumps({key: body[key] for key in body if key != "digest"}, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def _close(a: float, b: float) -> bool:
    """Whether two machines may compute these of the same settings."""
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


def _difference(one: PlanStep, other: PlanStep) -> str | None:
    """What of two steps isn't the same, to the rounding of another machine."""
    if one.solver != other.solver:
        return "solver"
    if [call.name for call in one.calls] != [call.name for call in other.calls]:
        return "expert"
    pairs = [*zip(COLUMNS, one.row, other.row, strict=True)]
    for side in ("level", "target"):
        mine, theirs = getattr(one, side), getattr(other, side)
        pairs += [(side, mine.alpha, theirs.alpha), (side, mine.sigma, theirs.sigma)]
    for mine, theirs in zip(one.calls, other.calls, strict=True):
        if mine.guider != theirs.guider:
            return "guider"
        for name in ("weight", "timestep", "guidance_scale", "input_scale", "guidance_rescale", "share"):
            pairs.append((name, getattr(mine, name), getattr(theirs, name)))
        pairs += [("to_x0", *each) for each in zip(mine.to_x0, theirs.to_x0, strict=True)]
    return next((name for name, a, b in pairs if not _close(a, b)), None)


def _with_memories(steps: list[Any]) -> list[Any]:
    """Steps of a format before 7, whose one memory was `d` and was written by every step, in this one's
    columns. What is no step is left for others to find."""
    made: list[Any] = []
    for step in steps:
        row = step.get("row") if isinstance(step, dict) else None
        if not isinstance(row, dict) or set(row) != _ROW_BEFORE_7:
            made.append(step)
            continue
        row = dict.fromkeys(COLUMNS, 0.0) | {"d_0" if name == "d" else name: row[name] for name in row}
        made.append({**step, "row": row})
        if row["d_0"] and len(made) > 1 and isinstance(made[-2], dict) and "row" in made[-2]:
            made[-2]["row"]["keep_x0"] = 1.0
    return made


def _step_from_json(step: Any, where: str) -> PlanStep:
    """A step whose row is an object by column, where null is "no clip"."""
    row = step.get("row") if isinstance(step, dict) else None
    if not isinstance(row, dict) or set(row) != set(COLUMNS):
        raise TypeError(f"{where} must be an object whose row has {', '.join(COLUMNS)}")
    clips = tuple(name for name in COLUMNS if row[name] is None)
    plain = [0.0 if row[name] is None else row[name] for name in COLUMNS]
    made = typed(PlanStep, {**step, "row": plain}, where)
    for value in (made.level, made.target):
        if min(value.alpha, value.sigma) < 0 or not 0 < value.alpha + value.sigma < 1e6:
            raise ValueError(f"{where} has a level that is none: {value}")
    own = {name: math.inf for name in clips}
    return dataclasses.replace(
        made, row=tuple(own.get(name, value) for name, value in zip(COLUMNS, made.row, strict=True))
    )


def _guidance(call: ExpertCall) -> str:
    rescaled = f" rescaled {call.guidance_rescale:g}" if call.guidance_rescale else ""
    kind = f" {call.guider.kind}" if call.guider else ""
    return f"{call.guidance_scale:g}{kind}{rescaled}"
