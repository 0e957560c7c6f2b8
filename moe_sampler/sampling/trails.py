"""A stretch of a run that somebody else's sampler takes: its levels, and its steps as rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .paths import Level, Path
from .predictions import x0_coefficients
from .solvers import SolverRow

if TYPE_CHECKING:
    from .experts import Expert
    from .probing import Trace

__all__ = ["Evaluation", "Trail", "begin_behind", "means", "retargeted", "trail_of"]


@dataclass(frozen=True)
class Evaluation:
    """One model call of a trail, and the update that follows it."""

    level: Level
    landing: Level
    """Where the update goes."""
    timestep: float
    """What the model is told; an int where the expert's path is discrete and it is whole."""
    update: SolverRow
    corrects: bool
    """Whether it is the second of a step of two."""


@dataclass(frozen=True)
class Trail:
    """Consecutive evaluations of one sampler.

    Args:
        name: of the sampler.
        evaluations: from noise to data.
        initial_scale: factor on N(0, 1) noise that makes the first state, if the run starts here.
    """

    name: str
    evaluations: tuple[Evaluation, ...]
    initial_scale: float


def retargeted(update: SolverRow, level: Level, landing: Level, target: Level) -> SolverRow:
    """An update that goes to `target` instead of to `landing`.

    What it arrives with, x = alpha * x0 + sigma * eps, is taken on with this step's x0: x' = alpha' * x0 +
    sigma' * eps, which is a change of scale alone, hence exact, where both are the same noise level; and an
    Euler step from one to the other where they are not.
    """
    if landing == target:
        return update
    if landing.sigma == 0.0:  # no noise is left to go on with: take the whole step as an Euler step
        ratio = target.sigma / level.sigma
        first = SolverRow(ratio, target.alpha - ratio * level.alpha)
        return first._replace(keep_x=update.keep_x, keep_x0=update.keep_x0, keep_n=update.keep_n)
    ratio = target.sigma / landing.sigma
    rest = target.alpha - ratio * landing.alpha
    if abs(rest) <= 1e-12 * target.alpha:
        rest = 0.0
    scaled = {name: ratio * getattr(update, name) for name in ("a", "b", "n", "d_0", "d_1", "d_2")}
    scaled["b"] += rest
    return update._replace(**scaled)


def trail_of(
    expert: Expert,
    name: str,
    trace: Trace,
    start: Level,
    order: int,
    *,
    times: Sequence[float | None] | None = None,
    leads: Sequence[Expert] | None = None,
    levels: Sequence[Level] | None = None,
) -> Trail:
    """What a trace is for an expert, or for several that one sampler went through.

    Args:
        expert: whose path and prediction the sampler works with.
        name: of the sampler.
        trace: what it does.
        start: the level of its first model input.
        order: model calls a step.
        times: what the model is told at each call, where that isn't what the sampler says; None is what the
            path says of the level.
        leads: whose model is called each time, where that isn't `expert`. Rows are sums of x0, whatever
            predicts it; on another path the state has another scale.
        levels: of every input and of the result, where the sampler says itself what they are.

    Raises:
        ValueError: the sampler's levels are not those that the expert means by the timesteps it is told.
    """
    from .realization import rows_of  # brings torch, which other plans don't need

    found, predictions = _levels(expert, trace, start)
    found = _checked(name, found, levels) if levels is not None else found
    leads = [expert] * len(trace) if leads is None else leads
    own = [
        level if lead.path == expert.path else lead.path.at(level.noise)
        for lead, level in zip([*leads, leads[-1]], found, strict=True)
    ]
    evaluations = []
    said = trace.times if times is None else times
    for k, row in enumerate(rows_of(name, trace, found[:-1], predictions)):
        told = said[k]
        if told is None:
            told = leads[k].path.timestep(own[k])
        else:
            _check_time(leads[k], name, told, own[k])
        row = _rescaled(row, _scale(own[k], found[k]), _scale(own[k + 1], found[k + 1]))
        evaluations.append(
            Evaluation(own[k], own[k + 1], _whole(leads[k], told), row, _corrects(own, k, order))
        )
    return Trail(name, tuple(evaluations), float(np.abs(trace.inputs[0]).sum()))


def begin_behind(high: float, low: float, landed: float) -> float:
    """The noise level at which a part from `high` to `low` begins, where the one before it landed: nothing is
    lost between that and the handoff."""
    return landed if low < landed < high else high


def _scale(own: Level, other: Level) -> float:
    """Factor on a state at a level, to the same noise level on one's own path."""
    return (own.alpha + own.sigma) / (other.alpha + other.sigma)


def _rescaled(update: SolverRow, before: float, after: float) -> SolverRow:
    """An update of a state times `before` to one times `after`, with memories of what they were."""
    if before == after == 1.0:
        return update
    scaled = {name: after * getattr(update, name) for name in ("a", "b", "n", "d_0", "d_1", "d_2")}
    scaled["a"] /= before
    return update._replace(**scaled, keep_x=update.keep_x / before)


def _checked(name: str, found: Sequence[Level], said: Sequence[Level]) -> list[Level]:
    """The levels that a sampler says it goes through, if it does.

    Raises:
        ValueError: it doesn't: it was made for another kind of path.
    """
    for k, (own, other) in enumerate(zip(found, said, strict=True)):
        if not math.hypot(own.alpha - other.alpha, own.sigma - other.sigma) <= 1e-6:
            raise ValueError(
                f"{name} leaves the path: after {k} calls it has alpha = {own.alpha:.4f} and sigma = "
                f"{own.sigma:.4f} where it says {other.alpha:.4f} and {other.sigma:.4f}. It is for another "
                "kind of path (ancestral steps differ between flows and DDPM paths), or ends elsewhere"
            )
    return list(said)


def _corrects(levels: Sequence[Level], k: int, order: int) -> bool:
    """Whether call k is a second one: it is in a step of two, or ends where it begins, before the end."""
    stays = math.isclose(levels[k].noise, levels[k + 1].noise, rel_tol=1e-9)
    return k % order > 0 or (stays and k + 2 < len(levels))


def _whole(expert: Expert, timestep: float) -> float:
    near = round(timestep)
    return near if expert.path.discrete and abs(timestep - near) < 1e-6 else float(timestep)


def _levels(expert: Expert, trace: Trace, start: Level) -> tuple[list[Level], list[tuple[float, float]]]:
    """The level of every model input and of the result, and what the model's outputs mean there, (p, q): the
    sampler is followed with a model that always predicts the same data."""
    noises = [at for drawn in trace.noise_at for at in drawn]
    meaning = np.zeros((trace.inputs.shape[1], 2 + len(noises)))  # data, noise at the start, noise drawn
    first = trace.inputs[0]
    begin = int(np.argmax(np.abs(first)))
    meaning[begin, :2] = start.alpha / first[begin], start.sigma / first[begin]
    for column, at in enumerate(noises, 2):
        meaning[at, column] = 1.0
    levels, predictions = [start], []
    for k, at in enumerate(trace.output_at):
        state = trace.inputs[k] @ meaning
        p, q = x0_coefficients(expert.prediction, levels[-1])
        predictions.append((p, q))
        meaning[at] = -p / q * state
        meaning[at, 0] += 1.0 / q
        arrived = trace.inputs[k + 1] @ meaning
        sigma = float(np.linalg.norm(arrived[1:]))
        at_data = sigma <= 1e-6 * abs(arrived[0]) and math.isclose(arrived[0], 1.0, rel_tol=1e-5)
        levels.append(Level(1.0, 0.0) if at_data else Level(float(arrived[0]), sigma))
    return levels, predictions


def _check_time(expert: Expert, name: str, told: float, level: Level) -> None:
    if not means(expert.path, told, level):
        raise ValueError(
            f"{expert.name}: {name} would tell the model timestep {told:g} at alpha = "
            f"{level.alpha:.4f}, sigma = {level.sigma:.4f}, which is no such timestep of its path: the "
            "scheduler is for another path or prediction type, or cannot begin where it would have to"
        )


def means(path: Path, timestep: float, level: Level) -> bool:
    """Whether a model on a path may be told a timestep at a level: the level's own to within three whole
    ones, as schedulers round it, and PNDM its strides besides."""
    if not (level.alpha >= 0.0 and level.sigma >= 0.0 and level.alpha + level.sigma > 0.0):
        return False
    whole = 1.0 if path.discrete else 1e-3 * abs(path.timestep(path.at(1.0)) - path.timestep(path.at(0.0)))
    return abs(path.timestep(level) - timestep) <= 3.0 * whole
