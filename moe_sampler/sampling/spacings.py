"""Spacings: where the steps of a run lie between noise and data, each as one formula, in float64.

A spacing maps the place in a whole run, 0 at its noisiest level and 1 at its cleanest, to a noise level, and
back. The steps of a whole run are evenly spaced places; those of an expert's part of a run are evenly spaced
places between the part's ends, so that they have the density of the whole run's. It decides where a solver's
nodes are and nothing else: solvers are told their levels, whatever these are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moe_sampler.kernels.shift import shift_sigma

from .paths import FlowPath, Path, noise_of_sigma, sigma_of_noise
from .spacing_names import Levels, listed_between

__all__ = ["BY_NAME", "nodes"]


@dataclass(frozen=True)
class Spacing:
    """A formula and its inverse.

    Args:
        sigma: (place, most, least) -> sigma, as diffusers' schedulers have it: a flow's own, sigma / alpha on
            other paths. `most` and `least` are those of the path's ends.
        place: (sigma, most, least) -> place.
        ends_on_least: whether the last step of a run to the data begins at `least`; else it begins a stride
            before it.
        by_noise: whether the formula is one of the share of noise instead of sigma.
    """

    sigma: Callable[[float, float, float], float]
    place: Callable[[float, float, float], float]
    ends_on_least: bool = False
    by_noise: bool = False


_RHO = 7.0


def _karras(place: float, most: float, least: float) -> float:
    """arXiv:2206.00364, eq. 5: even in sigma^(1 / 7)."""
    return (most ** (1 / _RHO) + place * (least ** (1 / _RHO) - most ** (1 / _RHO))) ** _RHO


def _karras_place(sigma: float, most: float, least: float) -> float:
    return (most ** (1 / _RHO) - sigma ** (1 / _RHO)) / (most ** (1 / _RHO) - least ** (1 / _RHO))


def _exponential(place: float, most: float, least: float) -> float:
    """Even in ln sigma."""
    return most * (least / most) ** place


def _exponential_place(sigma: float, most: float, least: float) -> float:
    return math.log(sigma / most) / math.log(least / most)


_SHAPE = 0.6


def _beta(place: float, most: float, least: float) -> float:
    """arXiv:2407.12173 as diffusers has it: sigma at even quantiles of a beta distribution of 0.6 and 0.6,
    which is dense at both ends."""
    low, high = 0.0, 1.0
    while low < (middle := 0.5 * (low + high)) < high:
        low, high = (middle, high) if _beta_share(middle) < 1.0 - place else (low, middle)
    return least + high * (most - least)


def _beta_place(sigma: float, most: float, least: float) -> float:
    return 1.0 - _beta_share(min(max((sigma - least) / (most - least), 0.0), 1.0))


def _beta_share(x: float) -> float:
    """The regularised incomplete beta function at x of the two equal shapes: for x up to a half by its power
    series, x^a / (a B) * sum (1 - a)_k a / ((a + k) k!) x^k; above by symmetry."""
    if x > 0.5:
        return 1.0 - _beta_share(1.0 - x)
    total, factor = 0.0, 1.0
    for k in itertools.count():
        term = factor * _SHAPE / (_SHAPE + k)
        total += term
        if term <= 1e-17 * total:
            break
        factor *= (1.0 - _SHAPE + k) / (k + 1.0) * x
    scale = math.exp(math.lgamma(2 * _SHAPE) - 2 * math.lgamma(_SHAPE)) / _SHAPE
    return scale * x**_SHAPE * total


def _cosine(place: float, most: float, least: float) -> float:
    """Even in the angle of (alpha, sigma) on the unit circle, as in arXiv:2102.09672's cosine schedule; for
    flows that is arXiv:2403.03206's CosMap."""
    angle = 0.5 * math.pi * (1.0 - place)
    return math.sin(angle) / (math.sin(angle) + math.cos(angle))


def _cosine_place(noise: float, most: float, least: float) -> float:
    return 1.0 - math.atan2(noise, 1.0 - noise) / (0.5 * math.pi)


_STEPS_OF_SD15 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
"""sigma / alpha of Align Your Steps for Stable Diffusion 1.5 (arXiv:2404.14507), ten steps and where the
paper's eleventh would begin."""


def _align_your_steps(place: float, most: float, least: float) -> float:
    """Log-linear between the levels of the table, as its authors stretch it to other numbers of steps."""
    places = np.linspace(0.0, 1.0, len(_STEPS_OF_SD15))
    ratio = math.exp(np.interp(place, places, np.log(_STEPS_OF_SD15)))
    return ratio / (1.0 + ratio)


def _align_your_steps_place(noise: float, most: float, least: float) -> float:
    ratio = math.log(noise / (1.0 - noise)) if noise < 1.0 else math.inf
    places = np.linspace(0.0, 1.0, len(_STEPS_OF_SD15))
    return float(np.interp(-ratio, -np.log(_STEPS_OF_SD15), places))


BY_NAME = {
    "uniform": Spacing(lambda place, *_: 1.0 - place, lambda noise, *_: 1.0 - noise, by_noise=True),
    "karras": Spacing(_karras, _karras_place, ends_on_least=True),
    "exponential": Spacing(_exponential, _exponential_place, ends_on_least=True),
    "beta": Spacing(_beta, _beta_place, ends_on_least=True),
    "cosine": Spacing(_cosine, _cosine_place, by_noise=True),
    "align_your_steps": Spacing(_align_your_steps, _align_your_steps_place, by_noise=True),
}
"""But "timestep", which is how paths space by themselves (`Path.grid`)."""


def nodes(
    levels: Levels,
    path: Path,
    count: int,
    high: float = 1.0,
    low: float = 0.0,
    shift: float = 1.0,
    spacing: str = "trailing",
) -> list[float]:
    """`count` nodes from `high` (included) towards `low` (excluded), as shares of noise, descending.

    Args:
        levels: as `Expert` takes them; where they are a list, those between the ends.
        path: whose nodes; on one with integer timesteps nodes are the levels of the nearest ones, or of their
            neighbours where two would be the same.
        count: of nodes.
        high, low: shares of noise.
        shift: k of a flow's shifted sigmas. It bends "uniform", and moves the least sigma of those spacings
            that have one, as in diffusers.
        spacing: of the integer timesteps, at the ends of their axis (see `VPPath.grid`).

    Raises:
        ValueError: so many don't fit there.
    """
    if isinstance(levels, tuple):
        return _listed(levels, count, high, low)
    if levels is None or levels == "timestep" or (levels == "uniform" and not path.discrete):
        return path.grid(count, high, low, 1.0 if levels == "timestep" else shift, spacing)
    by_name, (most, least) = BY_NAME[levels], _ends(path, shift)
    if high <= least and not by_name.by_noise:
        raise ValueError(
            f"{levels} levels go down to noise level {least:.6f}, and this part of the run begins at "
            f"{high:.6f}: hand over further up, or use other levels there"
        )
    found = _spaced(by_name, path, count, (high, low), (most, least))
    return _on_timesteps(path, found, high, low) if path.discrete else [high, *found[1:]]


def _listed(levels: Sequence[float], count: int, high: float, low: float) -> list[float]:
    found = listed_between(levels, high, low)
    if len(found) != count:
        raise ValueError(
            f"{len(found)} of the listed levels lie between noise levels {high:g} and {low:g}, where "
            f"{count} steps are to be: leave the number of steps out, or list as many"
        )
    return found


def _ends(path: Path, shift: float) -> tuple[float, float]:
    """The shares of noise of the noisiest and the cleanest level that spacings go between: of the ends of
    integer timesteps, the noisiest one that has some signal; of a continuous clock, of its first thousandth.
    """
    noisy, clean = path.timestep(path.at(1.0)), path.timestep(path.at(0.0))
    if not path.discrete:
        clean += (noisy - clean) / 1000.0
    elif path.level(noisy).alpha == 0.0:
        noisy -= 1.0
    most, least = path.level(noisy).noise, path.level(clean).noise
    return most, shift_sigma(least, shift) if isinstance(path, FlowPath) else least


def _spaced(
    spacing: Spacing, path: Path, count: int, part: tuple[float, float], ends: tuple[float, float]
) -> list[float]:
    """Even places in a part of a run, as shares of noise."""

    def measure(noise: float) -> float:
        return noise if spacing.by_noise else sigma_of_noise(path, noise)

    most, least = (measure(end) for end in ends)
    high, low = part
    first = max(spacing.place(measure(min(high, ends[0])), most, least), 0.0)
    to_data = low <= (0.0 if spacing.by_noise else ends[1])
    last = 1.0 if to_data else min(spacing.place(measure(low), most, least), 1.0)
    strides = count - 1 if to_data and spacing.ends_on_least else count
    places = [first + (last - first) * (i / strides if strides else 0.0) for i in range(count)]
    found = [spacing.sigma(place, most, least) for place in places]
    return found if spacing.by_noise else [noise_of_sigma(path, sigma) for sigma in found]


def _on_timesteps(path: Path, wanted: Sequence[float], high: float, low: float) -> list[float]:
    """The levels of the integer timesteps nearest to the wanted ones, each of its own."""

    def timestep(noise: float) -> int:
        return round(path.timestep(path.at(noise)))

    top, bottom = timestep(high), timestep(low)
    if path.level(top).noise <= low:
        top += 1  # the nearest one lies beyond so short a part; the next noisier one is in front of it
    while bottom < top and path.level(bottom).noise <= low:
        bottom += 1
    if top - bottom + 1 < len(wanted):
        raise ValueError(
            f"{len(wanted)} steps do not fit on the integer timesteps between noise levels {high:.3f} and "
            f"{low:.3f}: use fewer steps there"
        )
    found: list[int] = []
    for noise in reversed(wanted):  # from the data up, where they crowd
        found.append(max(timestep(noise), found[-1] + 1 if found else bottom))
    found[-1] = top
    for i in range(len(found) - 2, -1, -1):
        found[i] = min(found[i], found[i + 1] - 1)
    return [path.level(each).noise for each in reversed(found)]
