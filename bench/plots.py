"""The measured tables as pictures: how many times our time every other provider takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.measure import OURS

_GROUPS_A_COLUMN = 25
_MEASURES = {
    "images_per_s": "images a second",
    "steps_per_s": "steps a second",
    "times_ours": "",
}
Groups = dict[str, dict[str, float]]


def draw(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """One group of bars a case, one bar a provider; PNG."""
    measure = next(name for name in _MEASURES if name in rows[0])
    columns = list(rows[0])
    case = [name for name in columns[: columns.index("provider")] if name != "suite"]
    groups: Groups = {}
    for row in rows:
        groups.setdefault(", ".join(str(row[name]) for name in case), {})[str(row["provider"])] = float(
            str(row[measure])
        )
    shown = list(dict.fromkeys(name for group in groups.values() for name in group))
    if measure == "times_ours":
        shown.remove(OURS)
    colours = {name: colormaps["tab10"](i % 10) for i, name in enumerate(shown)}

    parts = _split(groups, math.ceil(len(groups) / _GROUPS_A_COLUMN))
    bars = max(sum(1 + len(group.keys() & colours.keys()) for group in part.values()) for part in parts)
    figure = Figure(figsize=(8.5 * len(parts), 1.5 + 0.155 * bars), layout="constrained")
    for part, axes in zip(parts, figure.subplots(1, len(parts), squeeze=False)[0], strict=True):
        _bars(axes, part, colours)
        if measure == "times_ours":
            _ratio_axis(axes)
        else:
            axes.set_xlabel(_MEASURES[measure])
    title = f"{rows[0]['suite']}: {rows[0]['machine']}, {rows[0]['threads']} threads"
    figure.suptitle(title, fontsize=10)
    handles = [figure.axes[0].barh(0, 0, color=colours[name])[0] for name in shown]
    figure.legend(handles, shown, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def _split(groups: Groups, count: int) -> list[Groups]:
    names, size = list(groups), math.ceil(len(groups) / count)
    return [{name: groups[name] for name in names[i : i + size]} for i in range(0, len(names), size)]


def _bars(axes: Axes, groups: Groups, colours: Mapping[str, tuple[float, ...]]) -> None:
    at, ticks = 0, []
    for group in groups.values():
        own = [name for name in group if name in colours]
        ticks.append(at + (len(own) - 1) / 2)
        for name in own:
            axes.barh(at, group[name], height=0.85, color=colours[name])
            label = f"{group[name]:.3g}" if group[name] < 100 else f"{group[name]:.0f}"
            place = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 6.5}
            axes.annotate(label, (group[name], at), **place)
            at += 1
        at += 1
    axes.set_yticks(ticks, list(groups), fontsize=7.5)
    axes.set_ylim(at - 1, -1)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)


def _ratio_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(f"time, in times that of {OURS} (left of 1: faster than ours)", fontsize=8)
