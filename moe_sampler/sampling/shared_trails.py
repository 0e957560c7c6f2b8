"""One scheduler across a change of expert: what it remembers goes on where both are sampled by one method.

The multistep methods of diffusers are functions of ln(alpha / sigma) and of predictions of x0 or noise, so a
run on one path is one on any other with its states scaled. The scheduler of the first expert goes through
the levels of all; who predicts what, and on which path, is the rows' affair.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .experts import Expert
from .paths import FlowPath, VPPath, noise_of_sigma, sigma_of_noise
from .scheduler_names import levels_of, scheduler_of
from .scheduler_trails import TimedPart, level_at, probed, scheduler_trail, timed_part, told_noise
from .trails import Trail, begin_behind, trail_of

__all__ = ["Part", "trails"]

MULTISTEP = (
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "LMSDiscreteScheduler"),
    *("SASolverScheduler", "UniPCMultistepScheduler"),
)
"""Those that remember predictions from step to step and take any levels. PNDM's and IPNDM's formulas are for
even timesteps or angles; the others remember nothing beyond a step."""
_PREDICTION = frozenset({"prediction_type"})
_LEVELS = frozenset(
    {
        *("trained_betas", "beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "steps_offset"),
        *("rescale_betas_zero_snr", "timestep_spacing", "use_flow_sigmas", "flow_shift"),
        *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
    }
)
"""Keys of a scheduler's config that say what the model predicts, and where the steps lie."""


@dataclass(frozen=True)
class Part:
    """What an expert leads of a run: `steps` between two shares of noise."""

    expert: Expert
    steps: int
    high: float
    low: float


def trails(parts: Sequence[Part], *, own_counts: bool) -> list[Trail]:
    """The trails of consecutive parts of a run whose experts have schedulers for solvers, one a part.

    Args:
        parts: from noise to data.
        own_counts: whether the number of steps may be another in each part, as long as their sum is kept, so
            that experts which one scheduler samples on one path share its levels.

    Raises:
        ValueError: a scheduler cannot be a plan, or not here.
    """
    found: list[Trail] = []
    for group in _groups(parts):
        if found:
            group[0] = _from(group[0], found[-1].evaluations[-1].landing.noise)
        if len(group) == 1:
            part = group[0]
            found.append(scheduler_trail(part.expert, part.steps, part.high, part.low))
        else:
            found += _across(_timed(group, own_counts))
    return found


def _from(part: Part, noise: float) -> Part:
    """A part behind one that landed there."""
    return replace(part, high=begin_behind(part.high, part.low, noise))


def _groups(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts that one method samples, together."""
    group: list[Part] = []
    for part in parts:
        if group and not _same(group[0].expert, part.expert, _PREDICTION | _LEVELS):
            yield group
            group = []
        group = [*group, part]
    yield group


def _same(one: Expert, other: Expert, but: frozenset[str]) -> bool:
    """Whether two experts are sampled by one method: a multistep scheduler of the same config but for some
    keys."""
    schedulers = scheduler_of(one), scheduler_of(other)
    names = {type(scheduler).__name__ for scheduler in schedulers}
    known = all(isinstance(expert.path, FlowPath | VPPath) for expert in (one, other))
    if len(names) > 1 or not names <= set(MULTISTEP) or not (known or one.path == other.path):
        return False
    first, second = (_config(scheduler, but) for scheduler in schedulers)
    return first == second


def _same_levels(one: Expert, other: Expert) -> bool:
    """Whether a whole run of both has one method's steps at the same levels."""
    name = type(scheduler_of(one)).__name__
    return _same(one, other, _PREDICTION) and levels_of(one, name) == levels_of(other, name)


def _config(scheduler: Any, but: frozenset[str]) -> Mapping[str, Any]:
    return {
        key: value
        for key, value in dict(scheduler.config).items()
        if key not in but and not key.startswith("_")
    }


def _timed(group: Sequence[Part], own_counts: bool) -> list[TimedPart]:
    """The levels of every part: those of one run of all steps, where there is one scheduler on one path and
    every part gets a step of it, else of each expert's own scheduler."""
    home = group[0].expert
    one_path = all(part.expert.path == home.path for part in group)
    if own_counts and one_path and all(_same_levels(home, part.expert) for part in group):
        total = sum(part.steps for part in group)
        whole = timed_part(scheduler_of(home), home, total, group[0].high, group[-1].low)
        noise = [told_noise(home, float(t)) for t in whole.scheduler.timesteps[whole.first : whole.last]]
        ends = [whole.first + sum(each > part.low for each in noise) for part in group[:-1]]
        bounds = [whole.first, *ends, whole.last]
        if all(a < b for a, b in itertools.pairwise(bounds)):
            cut = zip(group, itertools.pairwise(bounds), strict=True)
            return [TimedPart(part.expert, whole.scheduler, *own) for part, own in cut]
    found: list[TimedPart] = []
    for part in group:
        if found and found[-1].last < len(found[-1].scheduler.timesteps):
            part = _from(part, level_at(found[-1], found[-1].last).noise)
        found.append(timed_part(scheduler_of(part.expert), part.expert, part.steps, part.high, part.low))
    return found


def _across(parts: Sequence[TimedPart]) -> list[Trail]:
    """The trail of the first part's scheduler through all parts, cut where they end."""
    home, name = parts[0].expert, type(parts[0].scheduler).__name__
    counts = [part.last - part.first for part in parts]
    joined = _joined(parts)
    trace = probed(joined, home, name, sum(counts), from_noise=parts[0].first == 0)
    leads = [part.expert for part, count in zip(parts, counts, strict=True) for _ in range(count)]
    times = [time for part in parts for time in part.times]
    start = level_at(parts[0], parts[0].first)
    whole = trail_of(home, name, trace, start, 1, times=times, leads=leads)
    found, first = [], 0
    for count in counts:
        found.append(Trail(name, whole.evaluations[first : first + count], whole.initial_scale))
        first += count
    return found


def _joined(parts: Sequence[TimedPart]) -> Any:
    """The first part's scheduler with the steps of all, and those that would follow the last."""
    home, last = parts[0], parts[-1]
    pieces = [*parts, TimedPart(last.expert, last.scheduler, last.last, len(last.scheduler.timesteps) + 1)]
    joined = copy.deepcopy(home.scheduler)
    joined.timesteps = torch.cat([p.scheduler.timesteps[p.first : p.last].double() for p in pieces])
    sigmas = [sigma for piece in pieces for sigma in _sigmas(piece, home)]
    joined.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    joined.num_inference_steps = len(joined.timesteps)
    joined.set_begin_index(0)
    return joined


def _sigmas(part: TimedPart, home: TimedPart) -> list[float]:
    """A part's sigmas, as the path of another has them."""
    own = part.scheduler.sigmas[part.first : part.last].tolist()
    here, there = part.expert.path, home.expert.path
    return own if here == there else [sigma_of_noise(there, noise_of_sigma(here, each)) for each in own]
