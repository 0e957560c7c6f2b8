"""Sampling functions as k-diffusion and ComfyUI have them, `sample(model, x, sigmas, ...)`, as trails."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .paths import FlowPath, Level, noise_of_sigma
from .predictions import x0_coefficients
from .probing import Brownian, NotAffineError, Trace, World, probe
from .trails import Trail, trail_of

if TYPE_CHECKING:
    from .experts import Expert

__all__ = ["function_trail"]


class _Denoiser:
    """The model as such functions call it, and what it was told."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self._world.call(x, float(sigma.flatten()[0]))


def function_trail(
    sampler: Callable[..., torch.Tensor],
    sigmas: Sequence[float] | torch.Tensor,
    expert: Expert,
    options: Mapping[str, Any],
) -> Trail:
    """See `SamplingPlan.from_sampler`."""
    name = getattr(sampler, "__name__", type(sampler).__name__)
    given = torch.as_tensor(sigmas, dtype=torch.float64).cpu()
    _check_sigmas(name, given, expert)
    takes = inspect.signature(sampler).parameters

    def run(world: World) -> torch.Tensor:
        own = dict(options)
        if "noise_sampler" in takes and "noise_sampler" not in own:
            own["noise_sampler"] = Brownian(world)
        if "disable" in takes:
            own["disable"] = True  # its progress bar
        start = float(given[0]) if not isinstance(expert.path, FlowPath) else 1.0
        return sampler(_Denoiser(world), world.vector() * start, given.clone(), **own)

    try:
        trace = probe(name, run, 3 + 4 * len(given))
    except RuntimeError as error:
        raise NotAffineError(f"{name} cannot be compiled: {error}") from error
    trace, levels = _as_the_model_sees(trace, expert, float(given[-1]))
    return trail_of(expert, name, trace, levels[0], 1, levels=levels)


def _check_sigmas(name: str, sigmas: torch.Tensor, expert: Expert) -> None:
    if sigmas.ndim != 1 or len(sigmas) < 2 or not (sigmas[1:] < sigmas[:-1]).all() or sigmas[-1] < 0:
        raise ValueError(f"{name}'s sigmas go from noise to data, descending to 0 or above, at least two")
    if isinstance(expert.path, FlowPath) and sigmas[0] > 1:
        raise ValueError(f"{expert.name}: a flow's sigmas are shares of noise, at most 1, got {sigmas[0]:g}")


def _level(expert: Expert, sigma: float) -> Level:
    """A level on the expert's path from what such functions call sigma."""
    return expert.path.at(noise_of_sigma(expert.path, sigma))


def _as_the_model_sees(trace: Trace, expert: Expert, last: float) -> tuple[Trace, list[Level]]:
    """The trace of a function that has x0 + sigma * noise for a state and x0 for outputs, in the expert's own
    state and outputs."""
    levels = [_level(expert, sigma) for sigma in (*trace.times, last)]
    flow = isinstance(expert.path, FlowPath)
    scales = np.array([1.0 if flow else level.alpha for level in levels])
    inputs = trace.inputs * scales[:, None]
    for k, at in enumerate(trace.output_at):
        # In place of the basis vector x0_k: p * (model input k) + q * (output k).
        p, q = x0_coefficients(expert.prediction, levels[k])
        amount = inputs[:, at : at + 1].copy()
        inputs[:, at] = 0.0
        inputs += amount * p * inputs[k]
        inputs[:, at] += (amount * q)[:, 0]
    times = tuple(expert.path.timestep(level) for level in levels[:-1])
    return replace(trace, inputs=inputs, times=times), levels
