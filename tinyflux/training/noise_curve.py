"""A number for every noise level, as settings write it: knots with straight lines between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["NoiseCurve"]


@dataclass(frozen=True)
class NoiseCurve:
    """Straight lines between knots; beyond the outermost ones their values hold.

    Args:
        noise: the knots' shares of noise in [0, 1], 1 at pure noise, all different.
        values: finite.

    Raises:
        ValueError: knots that are no such things.
    """

    noise: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        knots = sorted(zip(self.noise, self.values, strict=True))
        if not knots or not all(0 <= noise <= 1 and np.isfinite(value) for noise, value in knots):
            raise ValueError(f"a curve has knots at noise levels from 0 to 1 with finite values, got {knots}")
        if len(set(self.noise)) < len(knots):
            raise ValueError(f"a curve has one value at a noise level, got {knots}")
        noise, values = zip(*knots, strict=True)
        object.__setattr__(self, "noise", noise)
        object.__setattr__(self, "values", values)

    @classmethod
    def parse(cls, text: str) -> NoiseCurve:
        """From "noise:value, noise:value ...", such as "1:1, 0.5:0"; one number alone holds everywhere."""
        try:
            if ":" not in text:
                return cls((0.0,), (float(text),))
            pairs = [[float(number) for number in knot.split(":")] for knot in text.split(",")]
            noise, values = zip(*pairs, strict=True)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f'a curve is "noise:value, noise:value ..." or one number, got {text!r} ({error})'
            ) from None
        return cls(noise, values)

    def __call__(self, noise: Tensor) -> Tensor:
        """The values at shares of noise, in their shape, dtype and device, where no table has to be."""
        found = torch.full_like(noise, self.values[0])
        for place in range(1, len(self.noise)):
            start, end = self.noise[place - 1], self.noise[place]
            share = ((noise - start) / (end - start)).clamp(0, 1)
            found = found + (self.values[place] - self.values[place - 1]) * share
        return found
