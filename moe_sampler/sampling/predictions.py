"""What a model predicts, as the affine map x0 = p * x + q * output. One table for every parametrization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from .paths import Level

if TYPE_CHECKING:
    import torch

__all__ = [
    "PREDICTIONS",
    "Prediction",
    "add_noise",
    "check_prediction",
    "epsilon_to_x0",
    "velocity_to_x0",
    "x0_coefficients",
    "x0_to_epsilon",
]

Prediction = Literal["epsilon", "v_prediction", "flow_prediction", "reversed_flow_prediction", "sample"]
"""diffusers' names; `reversed_flow_prediction` is data - noise, as TinyFlux predicts."""

PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def check_prediction(prediction: str) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f'unknown prediction type "{prediction}": use one of {", ".join(PREDICTIONS)}')


def x0_coefficients(prediction: Prediction, level: Level) -> tuple[float, float]:
    """(p, q) with x0 = p * x + q * output at a noise level, in float64.

    - epsilon: eps. x0 = (x - sigma * eps) / alpha
    - v_prediction: v = alpha * eps - sigma * x0 (Salimans & Ho 2022, arXiv:2202.00512)
    - flow_prediction: u = eps - x0 (on the flow path: dx / ds)
    - reversed_flow_prediction: -u
    - sample: x0 itself
    """
    check_prediction(prediction)
    alpha, sigma = level.alpha, level.sigma
    if prediction == "epsilon":
        if alpha == 0.0:
            raise ValueError("an epsilon expert says nothing about x0 at pure noise (alpha = 0)")
        return 1.0 / alpha, -sigma / alpha
    if prediction == "v_prediction":
        norm = alpha**2 + sigma**2
        return alpha / norm, -sigma / norm
    if prediction == "sample":
        return 0.0, 1.0
    # x = alpha x0 + sigma (x0 + u), whatever the path
    p, q = 1.0 / (alpha + sigma), -sigma / (alpha + sigma)
    return p, (q if prediction == "flow_prediction" else -q)


def velocity_to_x0(velocity: torch.Tensor, x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """x0 from v = alpha * eps - sigma * x0. velocity, x: [B, ...] of one shape and dtype."""
    p, q = x0_coefficients("v_prediction", Level(alpha, sigma))
    return p * x + q * velocity


def epsilon_to_x0(epsilon: torch.Tensor, x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """x0 = (x - sigma * eps) / alpha. epsilon, x: [B, ...] of one shape and dtype."""
    p, q = x0_coefficients("epsilon", Level(alpha, sigma))
    return p * x + q * epsilon


def x0_to_epsilon(x0: torch.Tensor, x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """eps = (x - alpha * x0) / sigma. x0, x: [B, ...] of one shape and dtype; sigma > 0."""
    if sigma <= 0:
        raise ValueError("a clean sample (sigma = 0) holds no noise to read off")
    return (x - alpha * x0) / sigma


def add_noise(
    x0: torch.Tensor, noise: torch.Tensor, alpha: float | torch.Tensor, sigma: float | torch.Tensor
) -> torch.Tensor:
    """x = alpha * x0 + sigma * noise: DDPM's forward process and flow's interpolation (1 - s, s) alike."""
    return alpha * x0 + sigma * noise
