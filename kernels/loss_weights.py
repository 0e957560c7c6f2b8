"""What weighs a loss: the min-SNR weight of each prediction type, and maps interpolated to the pixels.

Min-SNR (Hang et al. 2023, arXiv:2303.09556) weighs the error of x0 by min(SNR, γ), SNR = α²/σ². A model's
output is not x0 but o with x0 = p·x + q·o, so its own error carries min(α²/σ², γ)·q²:

    epsilon         q = −σ/α            min(1, γ·σ²/α²)
    v_prediction    q = −σ/(α² + σ²)    min(α², γ·σ²)/(α² + σ²)²
    flow, reversed  q = ∓σ/(α + σ)      min(α², γ·σ²)/(α + σ)²
    sample          q = 1               min(α²/σ², γ)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moe_sampler.kernels import _jit

if TYPE_CHECKING:
    import triton.language as tl

_PREDICTIONS = ("epsilon", "v_prediction", "flow_prediction", "reversed_flow_prediction", "sample")


class MinSNR(NamedTuple):
    """Min-SNR weighting: γ, the levels α and σ of the samples, float32 [B] each, and the prediction type."""

    gamma: float
    alpha: Tensor
    sigma: Tensor
    prediction: str


def min_snr_weight(alpha: Tensor, sigma: Tensor, gamma: float, prediction: str) -> Tensor:
    """The weight of the squared error of a model's own output, as the module's docstring has it.

    alpha, sigma: levels of any shape and float dtype, (1 − s, s) on the flow path. gamma: γ > 0. prediction:
    "epsilon", "v_prediction", "flow_prediction", "reversed_flow_prediction" or "sample".
    """
    check_min_snr(gamma, prediction)
    signal, noise = alpha * alpha, sigma * sigma
    if prediction == "epsilon":
        return (gamma * noise / signal).clamp(max=1.0)
    if prediction == "sample":
        return (signal / noise).clamp(max=gamma)
    norm = signal + noise if prediction == "v_prediction" else alpha + sigma
    return torch.minimum(signal, gamma * noise) / (norm * norm)


def check_min_snr(gamma: float, prediction: str) -> None:
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    if prediction not in _PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(_PREDICTIONS)}, got {prediction!r}")


@_jit.jit
def weight_of_levels(alpha, sigma, gamma, PREDICTION: tl.constexpr):
    """`min_snr_weight` on the device. A NaN in the levels stays visible."""
    signal = alpha * alpha
    noise = sigma * sigma
    if PREDICTION == "epsilon":
        return tl.minimum(tl.div_rn(gamma * noise, signal), 1.0, propagate_nan=tl.PropagateNan.ALL)
    elif PREDICTION == "sample":
        return tl.minimum(tl.div_rn(signal, noise), gamma, propagate_nan=tl.PropagateNan.ALL)
    else:
        norm = signal + noise if PREDICTION == "v_prediction" else alpha + sigma
        smaller = tl.minimum(signal, gamma * noise, propagate_nan=tl.PropagateNan.ALL)
        return tl.div_rn(smaller, norm * norm)


@_jit.jit
def bilinear(corner, y, x, map_height, map_width, scale_y, scale_x):
    """The map that lies at `corner`, interpolated at pixels (y, x) as torch does with align_corners=False."""
    top, bottom, down = _taps(y, map_height, scale_y)
    left, right, across = _taps(x, map_width, scale_x)
    top, bottom = corner + top * map_width, corner + bottom * map_width
    upper = (1.0 - across) * tl.load(top + left) + across * tl.load(top + right)
    lower = (1.0 - across) * tl.load(bottom + left) + across * tl.load(bottom + right)
    return (1.0 - down) * upper + down * lower


@_jit.jit
def _taps(pixel, size, scale):
    """(first tap, second tap, weight of the second) of pixels along one axis of a map of `size` texels."""
    position = tl.maximum(scale * (pixel.to(tl.float32) + 0.5) - 0.5, 0.0)
    first = tl.minimum(position.to(tl.int32), size - 1)
    return first, tl.minimum(first + 1, size - 1), tl.minimum(position - first.to(tl.float32), 1.0)
