"""The measured tables as pictures: how many times our time every other provider takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from bench.measure import OURS

_KNOWN = ("suite", "provider", "rounds", "machine", "threads", "torch", "diffusers", "numpy")
_COLOURS = ("#c44e52", "#dd8452", "#8172b3", "#937860", "#4c72b0")


def draw(rows: Sequence[dict[str, object]], path: Path) -> None:
    """One group of bars a case, one bar a provider; PNG."""
    measure = "times_ours" if "times_ours" in rows[0] else "images_per_s"
    columns = list(rows[0])
    case = [name for name in columns[: columns.index("provider")] if name not in _KNOWN]
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        groups.setdefault(", ".join(str(row[name]) for name in case), {})[str(row["provider"])] = float(
            row[measure]
        )
    shown = list(dict.fromkeys(name for group in groups.values() for name in group))
    if measure == "times_ours":
        shown.remove(OURS)
    colours = dict(zip(shown, _COLOURS * (1 + len(shown) // len(_COLOURS)), strict=False))

    bars = sum(len([name for name in group if name in colours]) for group in groups.values())
    figure = Figure(figsize=(9, 1.4 + 0.17 * bars + 0.16 * len(groups)), layout="constrained")
    axes = figure.subplots()
    at, ticks = 0.0, []
    for group in groups.values():
        own = [name for name in group if name in colours]
        ticks.append(at + (len(own) - 1) / 2)
        for name in own:
            axes.barh(at, group[name], height=0.85, color=colours[name])
            axes.annotate(
                f"{group[name]:.3g}",
                (group[name], at),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=6.5,
            )
            at += 1
        at += 1
    axes.set_yticks(ticks, list(groups), fontsize=7)
    axes.set_ylim(at - 1, -1)
    axes.margins(x=0.08)
    if measure == "times_ours":
        axes.set_xscale("log")
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_xlabel(f"times the median of {OURS} (1: as fast, left of it: faster than ours)")
    else:
        axes.set_xlabel("images a second")
    handles = [figure.axes[0].barh(0, 0, color=colours[name]) for name in shown]
    figure.legend(handles, shown, loc="outside upper left", ncols=3, fontsize=7, frameon=False)
    axes.set_title(f"{rows[0]['suite']} — {rows[0]['machine']}, {rows[0]['threads']} threads", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
