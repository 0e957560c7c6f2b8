"""Running somebody else's sampler on basis vectors: what it does, as coefficients.

A sampler that is affine in the state it starts from, in the model's outputs and in its noise says all of
itself when each of them is a basis vector of its own: every model input then *is* its coefficients. Where a
sampler would read a value, or do something that isn't affine, it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

__all__ = ["Brownian", "InDouble", "NotAffineError", "Trace", "World", "probe"]

_DRAWS = (torch.randn, torch.randn_like)
_OTHER_DRAWS = (torch.rand, torch.rand_like, torch.randint, torch.normal, torch.bernoulli, torch.multinomial)
_READS = (
    *(torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__bool__),
    *(torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.__array__),
)
_CONSTANTS = (
    *(torch.Tensor.new_ones, torch.Tensor.new_zeros, torch.Tensor.new_full, torch.Tensor.new_tensor),
    *(torch.ones_like, torch.zeros_like, torch.full_like),
)
"""They take a vector for its dtype and device alone."""
_NUMBERS = 7


class NotAffineError(ValueError):
    """A sampler whose steps are no fixed sums of state, model outputs and noise."""


class _Full(Exception):
    """More vectors than dimensions were asked for."""


class Vector(torch.Tensor):
    """A state, an output, noise, or what was made of them: [1, 1, 1, dimensions] float64."""


@dataclass(frozen=True)
class Trace:
    """What a sampler made of the start, the outputs and the noise.

    Attributes:
        inputs: [calls + 1, dimensions] float64, the coefficients of every model input, and of the result.
        times: what the model was told with each.
        output_at: the dimension of each call's output.
        noise_at: the dimensions of the noise drawn after each call and before the next.
    """

    inputs: np.ndarray
    times: tuple[float, ...]
    output_at: tuple[int, ...]
    noise_at: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.times)


class InDouble(TorchFunctionMode):
    """Where all that asks for float32 gets float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if each is torch.float32 else each for each in args)
        kwargs = {
            key: torch.float64 if each is torch.float32 else each for key, each in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


class World(InDouble):
    """Where a sampler is probed: float64 throughout, and noise is a vector wherever it is drawn.

    Args:
        name: of the sampler, for messages.
        dimensions: of the vectors.
        numbers: instead of basis vectors, these: [vectors, dimensions] float64.
    """

    def __init__(self, name: str, dimensions: int, numbers: np.ndarray | None = None) -> None:
        super().__init__()
        self._name, self._dimensions, self._numbers = name, dimensions, numbers
        self._count = 0
        self.inputs: list[np.ndarray] = []
        self.times: list[float] = []
        self.output_at: list[int] = []
        self.noise_at: list[list[int]] = []
        self._early: list[int] = []

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, 1, 1, self._dimensions)

    def vector(self) -> torch.Tensor:
        """The next basis vector."""
        values = torch.zeros(self.shape, dtype=torch.float64)
        if self._numbers is not None:
            values[:] = torch.from_numpy(self._numbers[self._count])
        elif self._count < self._dimensions:
            values[..., self._count] = 1.0
        else:
            raise _Full
        self._count += 1
        return values.as_subclass(Vector)

    def call(self, x: torch.Tensor, time: float) -> torch.Tensor:
        """The model: it is told `time` of x, and its output is a vector of its own."""
        self.see(x)
        self.times.append(time)
        self.output_at.append(self._count)
        self.noise_at.append([])
        return self.vector()

    def see(self, x: torch.Tensor) -> None:
        if x.shape != self.shape:
            raise NotAffineError(f"{self._name} changes the shape of what it samples")
        self.inputs.append(x.as_subclass(torch.Tensor).double().flatten().numpy().copy())

    def noise(self) -> torch.Tensor:
        (self.noise_at[-1] if self.noise_at else self._early).append(self._count)
        return self.vector()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        of_vectors = any(isinstance(each, Vector) for each in args)
        if func in _DRAWS and math.prod(_drawn_shape(args)) == math.prod(self.shape):
            return self.noise()
        if func in _OTHER_DRAWS:
            raise NotAffineError(f"{self._name} draws random numbers that are no normal noise")
        if of_vectors and func in _READS:
            raise NotAffineError(f"{self._name} reads values of what it samples, and decides by them")
        made = super().__torch_function__(func, types, args, kwargs)
        return made.as_subclass(torch.Tensor) if func in _CONSTANTS else made

    def trace(self) -> Trace:
        """What was seen."""
        inputs = np.stack(self.inputs)
        if not np.isfinite(inputs).all():
            raise ValueError(
                f"{self._name} gives numbers that are not finite: its settings contradict each other"
            )
        if inputs[:, self._early].any():
            raise NotAffineError(f"{self._name} adds noise before the model's first call")
        noise = tuple(map(tuple, self.noise_at))
        return Trace(inputs, tuple(self.times), tuple(self.output_at), noise)


def _drawn_shape(args: tuple[Any, ...]) -> tuple[int, ...]:
    if args and isinstance(args[0], torch.Tensor):
        return tuple(args[0].shape)
    if len(args) == 1 and not isinstance(args[0], int):
        return tuple(args[0])
    return tuple(each for each in args if isinstance(each, int))


def probe(name: str, run: Callable[[World], torch.Tensor], dimensions: int) -> Trace:
    """What a sampler does.

    Args:
        name: of the sampler, for messages.
        run: samples in a world: it begins with `world.vector()`, calls the model as `world.call(x, time)` and
            returns the result. It is run twice, and must do the same both times.
        dimensions: how many vectors it will need, about.

    Raises:
        NotAffineError: it isn't.
    """
    while True:
        world = World(name, dimensions)
        try:
            with torch.no_grad(), world:
                world.see(run(world))
        except _Full:
            dimensions *= 2
            continue
        break
    trace = world.trace()
    if not len(trace):
        raise ValueError(f"{name} never called the model")
    # Once more with numbers in place of the basis vectors: they must become what the coefficients say.
    numbers = 0.3 * np.random.default_rng(7).standard_normal((dimensions, _NUMBERS))
    again = World(name, _NUMBERS, numbers)
    with torch.no_grad(), again:
        again.see(run(again))
    found = np.stack(again.inputs)
    expected, scale = trace.inputs @ numbers, np.abs(trace.inputs) @ np.abs(numbers) + 1e-30
    if found.shape != expected.shape or not (np.abs(found - expected) <= 1e-9 * scale).all():
        raise NotAffineError(
            f"{name} is not affine in the state, the model's outputs and its noise (it clips, thresholds, "
            "normalises or adapts its steps), so that no plan can hold it"
        )
    last = max(trace.output_at[-1], *(drawn[-1] for drawn in trace.noise_at if drawn), 0)
    return replace(trace, inputs=trace.inputs[:, : last + 1])


class NoiseSource(Protocol):
    """Who draws independent normal noise."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def noise(self) -> torch.Tensor: ...


class Brownian:
    """A noise sampler as k-diffusion's functions take it: `(sigma, sigma_next)` -> N(0, 1) numbers, which are
    a Brownian motion's increment over that time by its root, so that overlapping times get correlated noise.
    """

    _REMEMBERED = 8

    def __init__(self, world: NoiseSource) -> None:
        self._world = world
        self._asked: list[tuple[float, float, torch.Tensor]] = []

    def __call__(self, sigma: Any, sigma_next: Any) -> torch.Tensor:
        low, high = sorted((float(sigma), float(sigma_next)))
        if not high > low:
            raise NotAffineError(f"noise was asked for between sigma {low:g} and the same sigma")
        before = self._asked[-self._REMEMBERED :]
        shared = np.array([_correlation((low, high), (a, b)) for a, b, _ in before])
        among = np.array([[_correlation((a, b), (c, d)) for c, d, _ in before] for a, b, _ in before])
        weights = np.linalg.pinv(among, rcond=1e-10) @ shared if shared.any() else np.zeros(len(before))
        rest = 1.0 - float(weights @ shared)
        value = torch.zeros(self._world.shape, dtype=torch.float64).as_subclass(Vector)
        for weight, (_, _, noise) in zip(weights, before, strict=True):
            value = value + float(weight) * noise
        if rest > 1e-10:
            value = value + math.sqrt(rest) * self._world.noise()
        self._asked.append((low, high, value))
        return value


def _correlation(one: tuple[float, float], other: tuple[float, float]) -> float:
    overlap = max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
    return overlap / math.sqrt((one[1] - one[0]) * (other[1] - other[0]))
