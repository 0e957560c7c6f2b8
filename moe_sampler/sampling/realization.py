"""From what a sampler does with everything that came before, to rows that remember as little as possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_sampler.kernels.rows import MOST_MEMORIES

from .paths import Level
from .probing import NotAffineError, Trace
from .solvers import SolverRow

__all__ = ["rows_of"]

_TOLERANCE, _NOTHING = 1e-8, 1e-10
"""Relative: what is smaller comes of rounding. What is left out of the memories must be far below what a row
may be off by."""
_KINDS = 4
_HORIZON = 64
"""Calls ahead that are asked what they will need."""


@dataclass(frozen=True)
class _Kept:
    """A memory: keep_x * x + keep_x0 * x0 + keep_n * z of the step that keeps it."""

    vector: np.ndarray
    weights: tuple[float, float, float]


def rows_of(
    name: str, trace: Trace, levels: Sequence[Level], predictions: Sequence[tuple[float, float]]
) -> list[SolverRow]:
    """One row a model call, with as few memories as there can be.

    Args:
        name: of the sampler, for messages.
        trace: what it does.
        levels, predictions: of every call, with (p, q) for x0 = p * x + q * output.

    Raises:
        NotAffineError: it needs more memories than a row has, or noise of an earlier step.
    """
    trace = _with_one_noise_a_call(trace)
    needed = _needed(trace)
    calls = [(*own, level) for own, level in zip(predictions, levels, strict=True)]
    for count in range(MOST_MEMORIES + 1):
        for kind in range(_KINDS + 1) if count else (0,):
            rows = _realized(trace, calls, needed, count, kind)
            if rows is not None:
                return rows
    raise NotAffineError(
        f"{name} must remember more than {MOST_MEMORIES} things beside the state, or noise of steps before"
    )


def _with_one_noise_a_call(trace: Trace) -> Trace:
    """The same sampler, drawing once a call: what is only ever used as one sum is one draw."""
    inputs, found = trace.inputs.copy(), []
    for k, drawn in enumerate(trace.noise_at):
        used = [at for at in drawn if inputs[:, at].any()]
        if len(used) > 1:
            own = inputs[k + 1, used]
            size = np.linalg.norm(own)
            shares = inputs[:, used] @ own / size
            if not np.allclose(np.outer(shares, own / size), inputs[:, used], rtol=0, atol=1e-9 * size):
                found.append((-1,))
                continue
            inputs[:, used[0]], inputs[:, used[1:]] = shares, 0.0
        found.append(tuple(used[:1]))
    return Trace(inputs, trace.times, trace.output_at, tuple(found))


def _needed(trace: Trace) -> list[np.ndarray]:
    """Before every call: a basis, [directions, dimensions], of all that later inputs are made of, of what is
    there by then. From the nearest of them on, each as it was traced: a basis found for the next call would
    hand its rounding down, and every call would multiply it."""
    sizes = np.linalg.norm(trace.inputs, axis=1, keepdims=True)
    inputs = trace.inputs / np.where(sizes > 0, sizes, 1.0)
    later = np.zeros(inputs.shape[1], bool)
    found = []
    for k in range(len(trace) - 1, -1, -1):
        later[[trace.output_at[k], *trace.noise_at[k]]] = True
        past = np.where(later, 0.0, inputs[k : k + _HORIZON])
        basis = np.zeros((0, past.shape[1]))
        for row in range(len(past)):
            rest = past[row] - basis.T @ (basis @ past[row])
            rest -= basis.T @ (basis @ rest)
            size = float(np.linalg.norm(rest))
            if size > _NOTHING:
                basis = np.concatenate([basis, rest[None] / size])
            if len(basis) > MOST_MEMORIES + 1:
                break
        found.append(basis)
    return found[::-1]


def _fit(target: np.ndarray, parts: Sequence[np.ndarray]) -> np.ndarray | None:
    """Weights of the fewest parts, the first ones first, that add up to the target; None if none do."""
    size = np.linalg.norm(target)
    weights = np.zeros(len(parts))
    if size == 0.0:
        return weights
    for count in range(1, len(parts) + 1):
        matrix = np.stack(parts[:count], axis=1)
        scales = np.linalg.norm(matrix, axis=0)
        scales = np.where(scales > 0, scales, 1.0)
        solved, *_ = np.linalg.lstsq(matrix / scales, target, rcond=1e-13)
        if np.linalg.norm(matrix @ (solved / scales) - target) <= _TOLERANCE * size:
            weights[:count] = np.where(np.abs(solved) > 1e-3 * _TOLERANCE * size, solved / scales, 0.0)
            return weights
    return None


def _spans(wanted: np.ndarray, parts: Sequence[np.ndarray]) -> bool:
    return all(_fit(direction, parts) is not None for direction in wanted)


def _realized(
    trace: Trace, calls: Sequence[tuple[float, float, Level]], needed: list[np.ndarray], count: int, kind: int
) -> list[SolverRow] | None:
    """Rows with `count` memories of one kind (see `_to_keep`), newest first; None if they don't suffice."""
    memories: list[_Kept] = []
    rows = []
    for k, (p, q, level) in enumerate(calls):
        state, after = trace.inputs[k], trace.inputs[k + 1]
        if -1 in trace.noise_at[k]:
            return None
        noise_at = trace.noise_at[k]
        of_output, of_noise = after[trace.output_at[k]], sum(after[at] for at in noise_at)
        past = after.copy()
        past[[trace.output_at[k], *noise_at]] = 0.0
        weights = _fit(past, [state, *(memory.vector for memory in memories)])
        if weights is None:
            return None
        b = of_output / q
        decays = [*weights[1:], 0.0, 0.0, 0.0][:MOST_MEMORIES]
        kept = None
        if k + 1 < len(trace):
            retained = [memory.vector for memory in memories]
            if not _spans(needed[k + 1], [after, *retained]):
                kept = _to_keep(trace, k, (p, q, level), needed[k + 1], retained[: max(count - 1, 0)], kind)
                if kept is None or count == 0:
                    return None
                memories = [kept, *memories][:count]
        keep = kept.weights if kept is not None else (0.0, 0.0, 0.0)
        rows.append(
            SolverRow(float(weights[0] - b * p), float(b), float(of_noise), *map(float, (*decays, *keep)))
        )
    return rows


def _to_keep(
    trace: Trace,
    k: int,
    call: tuple[float, float, Level],
    wanted: np.ndarray,
    retained: list[np.ndarray],
    kind: int,
) -> _Kept | None:
    """What to keep of call k so that the future is made of the state after it and the memories.

    By kind: 0 the prediction of the data, 1 that of the noise, 2 the model's output, 3 the state, 4 whatever
    sum of the state, the prediction and the noise will do. A ring of more than one holds one kind: what is
    as good as another at one step may be worthless at the next.
    """
    p, q, level = call
    state, after = trace.inputs[k], trace.inputs[k + 1]
    output, noise = np.zeros_like(state), np.zeros_like(state)
    output[trace.output_at[k]] = 1.0
    noise[list(trace.noise_at[k])] = 1.0
    x0 = p * state + q * output
    if kind < _KINDS:
        epsilon = (1.0 / level.sigma, -level.alpha / level.sigma, 0.0)
        weights = ((0.0, 1.0, 0.0), epsilon, (-p / q, 1.0 / q, 0.0), (1.0, 0.0, 0.0))[kind]
        vector = weights[0] * state + weights[1] * x0
        return _Kept(vector, weights) if _spans(wanted, [after, vector, *retained]) else None
    for direction in wanted:
        found = _fit(direction, [state, x0, *([noise] if noise.any() else []), after, *retained])
        if found is None:
            continue
        weights = (float(found[0]), float(found[1]), float(found[2]) if noise.any() else 0.0)
        vector = weights[0] * state + weights[1] * x0 + weights[2] * noise
        size = float(np.linalg.norm(vector))
        if size > 0 and _spans(wanted, [after, vector, *retained]):
            weights = (weights[0] / size, weights[1] / size, weights[2] / size)
            return _Kept(vector / size, weights)
    return None
