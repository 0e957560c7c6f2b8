"""The steps of diffusers' schedulers, in a whole run or a part of one, as trails."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from .paths import FlowPath, Level, noise_of_sigma
from .probing import Brownian, Trace, World, probe
from .scheduler_names import GIVEN_LEVELS, is_known_name, levels_of, scheduler_of
from .spacing_names import Levels
from .trails import Trail, trail_of

if TYPE_CHECKING:
    from .experts import Expert

__all__ = ["TimedPart", "as_double", "level_at", "probed", "scheduler_trail", "timed_part", "told_noise"]


@dataclass(frozen=True)
class TimedPart:
    """The timesteps `first` to `last` (excluded) of a scheduler with its timesteps set: an expert's part."""

    expert: Expert
    scheduler: Any
    first: int
    last: int

    @property
    def times(self) -> list[float | None]:
        """What the model is told. What people call by a name tells a flow the time it sees; some classes
        round it to whole timesteps."""
        exact = is_known_name(self.expert.solver) and not self.expert.path.discrete
        told = self.scheduler.timesteps[self.first : self.last].tolist()
        return [None if exact else float(timestep) for timestep in told]


def scheduler_trail(
    expert: Expert,
    steps: int | None,
    high: float = 1.0,
    low: float = 0.0,
    options: Mapping[str, Any] | None = None,
) -> Trail:
    """The steps that an expert's scheduler takes between two noise levels: those of its own levels for a
    whole run of as many steps as makes `steps` of them lie there.

    Args:
        expert: with a scheduler, or the name of one, as its solver.
        steps: how many; None where `options` say it.
        high, low: shares of noise. A whole run is from 1 to 0.
        options: more for the scheduler's `set_timesteps`, such as `mu` or `sigmas`, for a whole run.

    Raises:
        ValueError: the scheduler cannot be a plan, or not here.
    """
    scheduler = scheduler_of(expert)
    name = type(scheduler).__name__
    if steps is None and not options:
        raise ValueError("say how many steps")
    if steps is not None and name in GIVEN_LEVELS and not options:
        nodes = replace(expert, levels=levels_of(expert, name)).nodes(steps, high, low)
        timed = _with_levels(scheduler, expert, [*nodes, low])
        trace = probed(timed, expert, name, steps, from_noise=True)
        levels = [expert.path.at(noise) for noise in (*nodes, low)]
        return trail_of(expert, name, trace, levels[0], 1, times=[None] * steps, levels=levels)
    timed = timed_part(scheduler, expert, steps, high, low, options)
    start, times = level_at(timed, timed.first), timed.times
    own, count = timed.scheduler, timed.last - timed.first
    _cut(own, timed.first)
    trace = probed(own, expert, name, count, from_noise=timed.first == 0)
    return trail_of(expert, name, trace, start, int(getattr(own, "order", 1)), times=times)


def _with_levels(scheduler: Any, expert: Expert, noise: Sequence[float]) -> Any:
    """A copy that goes through given shares of noise."""
    timed, sigmas = copy.deepcopy(scheduler), [expert.path.at(each).sigma for each in noise]
    with World(type(timed).__name__, 1):  # in float64
        if type(timed).__name__ == "IPNDMScheduler":
            timed.register_to_config(trained_betas=sigmas)  # which it takes for sigmas
            timed.set_timesteps(len(sigmas) - 1)
        else:
            timed.set_timesteps(sigmas=sigmas)
    return timed


def _timed(
    scheduler: Any, expert: Expert, steps: int | None, options: Mapping[str, Any] | None = None
) -> Any:
    """A copy with its timesteps set."""
    timed = copy.deepcopy(scheduler)
    given: dict[str, Any] = {"num_inference_steps": steps, **(options or {})}
    takes = inspect.signature(timed.set_timesteps).parameters
    if {"timesteps", "sigmas"} & given.keys():
        given["num_inference_steps"] = None
    unknown = [key for key in given if key not in takes]
    if unknown:
        raise ValueError(f"{type(timed).__name__}.set_timesteps takes no {unknown[0]}")
    timed.set_timesteps(**given)
    most = float(max(getattr(timed, "sigmas", (0.0,))))
    if isinstance(expert.path, FlowPath) and not most <= 1.0:
        raise ValueError(
            f"{expert.name}: {type(timed).__name__} goes through sigmas from {most:g}, and a flow's are at "
            "most 1: with use_karras_sigmas, use_exponential_sigmas or use_beta_sigmas it forgets "
            'use_flow_sigmas. Name the solver and the spacing instead, like solver="unipc", levels="karras"'
        )
    if not expert.path.discrete and float(timed.timesteps[-1]) == 0.0:  # where there is nothing to predict
        timed.timesteps = timed.timesteps[:-1]
    return timed


def timed_part(
    scheduler: Any,
    expert: Expert,
    steps: int | None,
    high: float,
    low: float,
    options: Mapping[str, Any] | None = None,
) -> TimedPart:
    """The scheduler timed for a whole run, and which of its timesteps lie between two levels. Of all runs
    with so many steps there it is the longest, whose levels begin nearest to `high` and end nearest to
    `low`."""
    levels = levels_of(expert, type(scheduler).__name__)
    if levels is not None and steps is not None and not options:
        return _on_levels(scheduler, expert, levels, steps, high, low)
    if levels is not None:
        raise ValueError(
            f"{expert.name}: its levels are {levels}, and {', '.join(options or ())} would decide them too: "
            "leave one of them out"
        )
    if steps is None or (high >= 1.0 and low <= 0.0):
        timed = _timed(scheduler, expert, steps, options)
        return TimedPart(expert, timed, 0, len(timed.timesteps))
    total, found = steps, None
    while total <= 1000 and (found is None or len(found[1]) == steps):
        try:
            timed = _timed(scheduler, expert, total)
        except ValueError:  # more than it has
            break
        order = int(getattr(timed, "order", 1))
        noise = [told_noise(expert, float(t)) for t in timed.timesteps[::order]]
        inside = [i * order for i, each in enumerate(noise) if low < each and (high >= 1.0 or each <= high)]
        if len(inside) == steps or (found is None and len(inside) > steps):
            found = timed, inside
        total += max(steps - len(inside), 1)
        if len(inside) > steps:
            break
    if found is None:
        raise ValueError(
            f"{expert.name}: {type(scheduler).__name__} has no {steps} steps between noise levels {high:.3f} "
            f"and {low:.3f}: use fewer steps there"
        )
    timed, inside = found
    inside = inside[:steps] if high >= 1.0 else inside[-steps:]
    last = min(inside[-1] + int(getattr(timed, "order", 1)), len(timed.timesteps))
    return TimedPart(expert, timed, inside[0], last)


def _on_levels(
    scheduler: Any, expert: Expert, levels: Levels, steps: int, high: float, low: float
) -> TimedPart:
    """A flow's scheduler that goes through given levels. It begins no nearer to pure noise than it does by
    itself, where its formulas may have no number. A part that ends before the data is followed by one step
    more, as it is in a whole run: a scheduler's last step is another one."""
    timed = _timed(scheduler, expert, steps + (low > 0.0))
    most, last = (float(sigma) for sigma in timed.sigmas[[0, -1]])
    if isinstance(levels, tuple):
        levels = tuple(min(level, most) for level in levels)
    found = replace(expert, levels=levels).nodes(steps, min(high, most), low)
    if low > 0.0:
        found.append(low)
    # Those whose formulas have none for sigma = 0 stay at their last level, and the plan goes on from there.
    end = 0.0 if last == 0.0 else found[-1]
    order = int(getattr(timed, "order", 1))
    sigmas = [found[0], *(sigma for sigma in found[1:] for _ in range(order)), end]
    timed.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    times = [expert.path.timestep(expert.path.at(sigma)) for sigma in sigmas[:-1]]
    timed.timesteps = torch.tensor(times, dtype=torch.float64)
    timed.set_begin_index(0)
    return TimedPart(expert, timed, 0, min(steps * order, len(times)))


def told_noise(expert: Expert, timestep: float) -> float:
    most = getattr(expert.path, "num_train_timesteps", math.inf)
    return expert.path.level(min(timestep, most - 1.0)).noise


def level_at(timed: TimedPart, index: int) -> Level:
    """The level of the model input at a timestep: that of the scheduler's sigma, sigma / alpha or the flow's
    own, which a timestep may only be the nearest whole number to; else that of the timestep."""
    path, scheduler = timed.expert.path, timed.scheduler
    if not hasattr(scheduler, "sigmas"):
        return path.level(float(scheduler.timesteps[index]))
    return path.at(noise_of_sigma(path, float(scheduler.sigmas[index])))


def _input(timed: Any, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """What the model sees of a state; schedulers of flows leave it as it is."""
    scale = getattr(timed, "scale_model_input", None)
    return x if scale is None else scale(x, timestep)


def as_double(timed: Any) -> Any:
    """Its tables in float64, so that what is computed from them is exact."""
    for key, value in vars(timed).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(timed, key, value.double())
    return timed


def probed(timed: Any, expert: Expert, name: str, count: int, *, from_noise: bool) -> Trace:
    """The first `count` calls of a scheduler with its timesteps set."""
    takes = inspect.signature(timed.step).parameters
    options = {"eta": expert.eta} if expert.eta and "eta" in takes else {}
    timed = as_double(timed)
    double = timed.timesteps[:count]

    def run(world: World) -> torch.Tensor:
        own = copy.deepcopy(timed)
        if hasattr(own, "noise_sampler"):
            own.noise_sampler = Brownian(world)
        x = world.vector() * (float(getattr(own, "init_noise_sigma", 1.0)) if from_noise else 1.0)
        for timestep in double:
            told = _input(own, x, timestep)
            output = world.call(told, float(timestep))
            x = own.step(output, timestep, x, return_dict=False, **options)[0]
        if count < len(own.timesteps):
            # What comes behind is another expert's, on a state scaled as the models see it.
            x = _input(own, x, own.timesteps[count])
        return x

    return probe(name, run, 3 + 2 * count)


def _cut(timed: Any, first: int) -> None:
    """Take away what lies before a timestep, as if the run began there."""
    if not first:
        return
    count = len(timed.timesteps)
    for key, value in vars(timed).items():
        by_step = isinstance(value, torch.Tensor) and value.ndim == 1 and len(value) in (count, count + 1)
        if by_step and key != "alphas_cumprod":
            setattr(timed, key, value[first:])
