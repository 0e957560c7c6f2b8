"""Solvers as rows: one step between two noise levels, x <- a * x + b * x0 + d * x0_prev + n * z.

A solver sees only (alpha, sigma) of where it is and where it goes, so one formula serves every path, and a
target on *another* path is an exact handoff: it needs no code of its own.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

from .paths import Level

__all__ = ["SOLVERS", "Solver", "SolverRow", "check_solver", "solver_row"]

Solver = Literal["ddpm", "ddim", "euler", "dpmpp_2m"]
SOLVERS: tuple[str, ...] = get_args(Solver)


class SolverRow(NamedTuple):
    a: float
    b: float
    d: float = 0.0
    n: float = 0.0


def check_solver(solver: str) -> None:
    if solver not in SOLVERS:
        raise ValueError(f'unknown solver "{solver}": use one of {", ".join(SOLVERS)}')


def _first_order(level: Level, target: Level, n: float = 0.0) -> SolverRow:
    """x' = alpha' x0 + sqrt(sigma'^2 - n^2) eps + n z with eps = (x - alpha x0) / sigma.

    n = 0 is DDIM (arXiv:2010.02502), Euler on the flow path, and DPM-Solver++'s first order.
    """
    direction = math.sqrt(max(target.sigma**2 - n**2, 0.0)) / level.sigma
    return SolverRow(a=direction, b=target.alpha - direction * level.alpha, n=n)


def _posterior_std(level: Level, target: Level) -> float:
    """sigma' * sqrt(1 - SNR / SNR'): the square root of DDPM's posterior variance
    (1 - abar') / (1 - abar) * (1 - abar / abar') on the VP path (arXiv:2006.11239, eq. 7)."""
    if target.sigma == 0.0 or level.alpha == 0.0:
        return target.sigma
    return target.sigma * math.sqrt(-math.expm1(2.0 * (level.half_log_snr - target.half_log_snr)))


def _dpmpp_2m(level: Level, target: Level, previous: Level | None) -> SolverRow:
    """DPM-Solver++(2M), arXiv:2211.01095, algorithm 2, in half-log-SNR time. First order without history, and
    into sigma' = 0, where the step in that time is infinite."""
    if previous is None or target.sigma == 0.0 or math.isinf(previous.half_log_snr):
        return _first_order(level, target)
    h = target.half_log_snr - level.half_log_snr
    h_previous = level.half_log_snr - previous.half_log_snr
    weight = -target.alpha * math.expm1(-h)
    extrapolation = h / (2.0 * h_previous)
    return SolverRow(
        a=target.sigma / level.sigma, b=weight * (1.0 + extrapolation), d=-weight * extrapolation
    )


def solver_row(
    solver: Solver, level: Level, target: Level, previous: Level | None, eta: float = 0.0
) -> SolverRow:
    """Coefficients, float64, of one step from `level` to the less noisy `target`.

    Args:
        solver: "ddpm" (ancestral), "ddim" (with `eta`), "euler" (first order), "dpmpp_2m".
        level, target: may lie on different paths.
        previous: the level x0_prev was predicted at, or None without history.
        eta: DDIM's share of the posterior's noise, 0 to 1.

    Raises:
        ValueError: the target is not less noisy than the level, or an unknown solver.
    """
    check_solver(solver)
    if not target.noise < level.noise:
        raise ValueError(
            f"time runs from noise to data: cannot step from noise level {level.noise:.4f} "
            f"to {target.noise:.4f}"
        )
    if solver == "dpmpp_2m":
        return _dpmpp_2m(level, target, previous)
    share = {"ddpm": 1.0, "ddim": eta, "euler": 0.0}[solver]
    return _first_order(level, target, share * _posterior_std(level, target))
