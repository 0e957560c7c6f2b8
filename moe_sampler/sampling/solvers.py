"""Solvers as rows: one step between two noise levels, x <- a * x + b * x0 + d_0 * memory_0 + n * z, where the
one memory these solvers have is the prediction of the step before.

A solver sees only (alpha, sigma) of where it is and where it goes, so one formula serves every path, and a
target on *another* path is an exact handoff: it needs no code of its own. A Heun step is two rows, one for
each of its model evaluations.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from .paths import Level

__all__ = [
    "HEUN_CORRECTOR",
    "SOLVERS",
    "Solver",
    "SolverRow",
    "check_solver",
    "heun_corrector_row",
    "solver_row",
]

Solver = Literal["ddpm", "ddim", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde"]
SOLVERS: tuple[str, ...] = get_args(Solver)

HEUN_CORRECTOR = "heun_corrector"
"""How plans call the row of a Heun step's second evaluation."""


class SolverRow(NamedTuple):
    """The columns of a row (see `moe_sampler.kernels.rows`) that say how a step moves the state and what it
    keeps for steps to come, whatever the models predict."""

    a: float
    b: float
    n: float = 0.0
    d_0: float = 0.0
    d_1: float = 0.0
    d_2: float = 0.0
    keep_x: float = 0.0
    keep_x0: float = 0.0
    keep_n: float = 0.0

    @property
    def memories(self) -> int:
        """How many of the memories the step reads, at least: the newest ones."""
        return max((age for age, d in enumerate((self.d_0, self.d_1, self.d_2), 1) if d != 0.0), default=0)

    @property
    def keeps(self) -> bool:
        """Whether the step writes a memory."""
        return any((self.keep_x, self.keep_x0, self.keep_n))


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


def _dpmpp_2m(level: Level, target: Level, previous: Level | None, stochastic: bool) -> SolverRow:
    """DPM-Solver++(2M), arXiv:2211.01095, algorithm 2, in half-log-SNR time, and its SDE (appendix B).

    First order without history at a noisier level, and into sigma' = 0, where the step in that time is
    infinite. The SDE's first order is DDPM's ancestral step.
    """
    noise = _posterior_std(level, target) if stochastic else 0.0
    if (
        previous is None
        or not previous.noise > level.noise
        or target.sigma == 0.0
        or math.isinf(previous.half_log_snr)
    ):
        return _first_order(level, target, noise)
    h = target.half_log_snr - level.half_log_snr
    h_previous = level.half_log_snr - previous.half_log_snr
    weight = -target.alpha * math.expm1(-2.0 * h if stochastic else -h)
    extrapolation = h / (2.0 * h_previous)
    return SolverRow(
        a=target.sigma / level.sigma * (math.exp(-h) if stochastic else 1.0),
        b=weight * (1.0 + extrapolation),
        d_0=-weight * extrapolation,
        n=noise,
    )


def heun_corrector_row(level: Level, target: Level) -> SolverRow:
    """The second half of a Heun step from `level` to `target`, as a row of its own, float64.

    The first half is the first-order step to x~. With c = alpha + k * sigma the scaled state y = x / c obeys
    dy / dtau = (y - x0) / tau in the time tau = sigma / c, so the average of the slopes at both ends gives

        x' = x~ + c' * (tau / tau' - 1) / 2 * (x0(x~) - x0(x)):

    x itself is no longer needed. k = 0 is EDM's time sigma / alpha (arXiv:2206.00364, algorithm 1), taken on
    the VP path as diffusers' HeunDiscreteScheduler does; k = 1 is the flow's own time s, which stays finite
    at pure noise, taken where alpha + sigma = 1 as FlowMatchHeunDiscreteScheduler does.

    Args:
        level, target: may lie on different paths; `level` decides the time.

    Raises:
        ValueError: a target without noise, where the slope is unknown: Heun ends with a first-order step.
    """
    if target.sigma == 0.0:
        raise ValueError("Heun's corrector has no slope at sigma = 0: the last step is first order")
    k = 1.0 if math.isclose(level.alpha + level.sigma, 1.0, rel_tol=1e-9) else 0.0

    def time(at: Level) -> float:
        return at.sigma / (at.alpha + k * at.sigma)

    scale = target.alpha + k * target.sigma
    weight = 0.5 * scale * (time(level) / time(target) - 1.0)
    return SolverRow(a=1.0, b=weight, d_0=-weight)


def solver_row(
    solver: Solver, level: Level, target: Level, previous: Level | None, eta: float = 0.0
) -> SolverRow:
    """Coefficients, float64, of one step from `level` to the less noisy `target`.

    Args:
        solver: "ddpm" (ancestral), "ddim" (with `eta`), "euler" (first order), "heun" (its predictor; see
            `heun_corrector_row`), "dpmpp_2m", "dpmpp_2m_sde".
        level, target: may lie on different paths.
        previous: the level the memory was predicted at, or None without one.
        eta: DDIM's share of the posterior's noise, 0 to 1.

    Raises:
        ValueError: the target is not less noisy than the level, or an unknown solver.
    """
    check_solver(solver)
    if not target.half_log_snr > level.half_log_snr:
        raise ValueError(
            f"time runs from noise to data: cannot step from noise level {level.noise:.4f} "
            f"to {target.noise:.4f}"
        )
    if solver in ("dpmpp_2m", "dpmpp_2m_sde"):
        return _dpmpp_2m(level, target, previous, stochastic=solver == "dpmpp_2m_sde")
    share = {"ddpm": 1.0, "ddim": eta, "euler": 0.0, "heun": 0.0}[solver]
    return _first_order(level, target, share * _posterior_std(level, target))
