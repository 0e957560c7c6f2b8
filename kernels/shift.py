"""The shift of a flow's noise levels. Plain Python: planning needs neither torch nor a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Number = TypeVar("Number", float, "np.ndarray", "Tensor")


def shift_sigma(sigma: Number, shift: float) -> Number:
    """k·s / (1 + (k − 1)·s): the noise level s of a flow, moved towards noise for k > 1.

    sigma: a float, NumPy array or torch tensor of levels, 1 = noise; 0 and 1 stay where they are.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)
