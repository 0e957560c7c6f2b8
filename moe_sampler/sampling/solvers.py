"""Solvers as rows: one step between two noise levels, x <- a * x + b * x0 + d_0 * m_0 + d_1 * m_1 + n * z.
The memories m of these solvers are the predictions of x0 at the steps before, whoever made them.

A solver sees only (alpha, sigma) of where it is and where it goes, so one formula serves every path, and a
target on *another* path is an exact handoff: it needs no code of its own. A Heun step is two rows, one for
each of its model evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from .paths import Level

__all__ = [
    "HEUN_CORRECTOR",
    "MOST_PAST",
    "SOLVERS",
    "Solver",
    "SolverRow",
    "check_solver",
    "heun_corrector_row",
    "solver_row",
]

Solver = Literal["ddpm", "ddim", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "unip_3"]
SOLVERS: tuple[str, ...] = get_args(Solver)

MOST_PAST = 2
"""How many levels of predictions before its own a solver here makes use of."""
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

    @property
    def keeps_x0(self) -> bool:
        """Whether what it writes there is its x0."""
        return (self.keep_x, self.keep_x0, self.keep_n) == (0.0, 1.0, 0.0)


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


def _usable(level: Level, past: Sequence[Level]) -> list[Level]:
    """The newest of the past levels, as far as a prediction's direction can be told from them: each noisier
    than what came after it, and none pure noise."""
    found: list[Level] = []
    for each in past:
        if not each.noise > (found[-1] if found else level).noise or math.isinf(each.half_log_snr):
            break
        found.append(each)
    return found


def _dpmpp_2m(level: Level, target: Level, past: Sequence[Level], stochastic: bool = False) -> SolverRow:
    """DPM-Solver++(2M), arXiv:2211.01095, algorithm 2, in half-log-SNR time, and its SDE (appendix B).

    First order without history at a noisier level, and into sigma' = 0, where the step in that time is
    infinite. The SDE's first order is DDPM's ancestral step.
    """
    noise = _posterior_std(level, target) if stochastic else 0.0
    usable = _usable(level, past)
    if not usable or target.sigma == 0.0:
        return _first_order(level, target, noise)
    h = target.half_log_snr - level.half_log_snr
    h_previous = level.half_log_snr - usable[0].half_log_snr
    weight = -target.alpha * math.expm1(-2.0 * h if stochastic else -h)
    extrapolation = h / (2.0 * h_previous)
    return SolverRow(
        a=target.sigma / level.sigma * (math.exp(-h) if stochastic else 1.0),
        b=weight * (1.0 + extrapolation),
        d_0=-weight * extrapolation,
        n=noise,
    )


def _third_order(level: Level, target: Level, past: Sequence[Level], curvature: float) -> SolverRow:
    """The parabola through three predictions, integrated exactly in half-log-SNR time: UniPC's predictor of
    order 3 (arXiv:2302.04867). With fewer predictions, and into sigma' = 0, DPM-Solver++(2M)'s step.

    x' = sigma' / sigma x + alpha' (phi x0 + (1 - phi / h) D1 + (1 - 2 (h - phi) / h^2) D2), phi = 1 - e^-h,
    where D1 and D2 are h and h^2 / 2 times the parabola's derivatives at the level.

    curvature: the share of D2's weight that counts. DPM-Solver++(3M), as its authors' code and diffusers have
        it, takes a half, and so is of second order, with an error that is often the smaller one in few steps.
    """
    usable = _usable(level, past)
    if len(usable) < 2 or target.sigma == 0.0:
        return _dpmpp_2m(level, target, past)
    here, before, earlier = (each.half_log_snr for each in (level, *usable[:2]))
    h = target.half_log_snr - here
    first, second = (here - before) / h, (before - earlier) / h
    phi = -math.expm1(-h)
    of_d1 = target.alpha * (1.0 - phi / h)
    of_d2 = target.alpha * curvature * (1.0 - 2.0 * (h - phi) / h**2)
    # D1 and D2 in the slopes (x0 - m_0) / first and (m_0 - m_1) / second
    of_second = -(of_d1 * first + of_d2) / (first + second)
    of_first = of_d1 - of_second
    return SolverRow(
        a=target.sigma / level.sigma,
        b=target.alpha * phi + of_first / first,
        d_0=of_second / second - of_first / first,
        d_1=-of_second / second,
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
    solver: Solver, level: Level, target: Level, past: Sequence[Level] = (), eta: float = 0.0
) -> SolverRow:
    """Coefficients, float64, of one step from `level` to the less noisy `target`.

    Args:
        solver: "ddpm" (ancestral), "ddim" (with `eta`), "euler" (first order), "heun" (its predictor; see
            `heun_corrector_row`), "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "unip_3".
        level, target: may lie on different paths.
        past: the levels that the memories were predicted at, newest first, as far as there are any.
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
    if solver in ("dpmpp_3m", "unip_3"):
        return _third_order(level, target, past, curvature=0.5 if solver == "dpmpp_3m" else 1.0)
    if solver in ("dpmpp_2m", "dpmpp_2m_sde"):
        return _dpmpp_2m(level, target, past, stochastic=solver == "dpmpp_2m_sde")
    share = {"ddpm": 1.0, "ddim": eta, "euler": 0.0, "heun": 0.0}[solver]
    return _first_order(level, target, share * _posterior_std(level, target))
