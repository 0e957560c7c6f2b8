"""The evaluation's numbers as the Markdown tables of docs/DEMO.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from bench.demo.evaluator import Tally
from moe_sampler.demo.attributes import GROUPS, HEADS, group_of, kind_of

TITLES = {
    "renders": "held-out renders",
    "reconstructions": "the same through the autoencoder",
    "sol": "Sol alone",
    "lune": "Lune alone",
    "naive": "naive handoff",
    "hybrid": "hybrid",
}
_MEASURES = (
    ("attributes", "attributes right", 100.0, "{:.1f}", " %"),
    ("composition", "composition", 100.0, "{:.1f}", " %"),
    ("surface", "surface", 100.0, "{:.1f}", " %"),
    ("frechet", "Fréchet distance", 1.0, "{:.3f}", ""),
    ("high_frequencies", "high frequencies", 1.0, "{:.2f}", ""),
    ("patches", "patch distance", 1.0, "{:.2f}", ""),
)
_GROUP_ORDER = (None, *GROUPS)

MEASURES = tuple(title for _, title, *_ in _MEASURES)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column has no heading."""
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


def summarized(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of every measure the mean over seeds and, of several, the standard deviation as `<measure>_std`."""
    found = {}
    for key, *_ in _MEASURES:
        values = np.array([run[key] for run in runs])
        found[key] = float(values.mean())
        if len(values) > 1:
            found[f"{key}_std"] = float(values.std(ddof=1))
    return found


def cells(summary: Mapping[str, float]) -> list[str]:
    """A cell for each of MEASURES, of what `summarized` returned."""
    made = []
    for key, _, factor, form, unit in _MEASURES:
        cell = form.format(summary[key] * factor)
        if f"{key}_std" in summary:
            cell += " ± " + form.format(summary[f"{key}_std"] * factor)
        made.append(cell + unit)
    return made


def measured(runs: Sequence[Mapping[str, float]]) -> list[str]:
    """A cell for each of MEASURES: mean over seeds ± standard deviation between them."""
    return cells(summarized(runs))


def measures_table(table: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """One row a method."""
    return markdown_table(MEASURES, ([TITLES[method], *measured(runs)] for method, runs in table.items()))


def attributes_table(tallies: Mapping[str, Sequence[Tally]]) -> str:
    """One row an attribute, grouped: how often the prompts mention it, and the share right by method."""
    heads = sorted(
        {head for runs in tallies.values() for run in runs for head in run},
        key=lambda head: (_GROUP_ORDER.index(group_of(head)), list(HEADS).index(head)),
    )
    rows = []
    for head in heads:
        mentioned = max(run[head][1] for runs in tallies.values() for run in runs if head in run)
        cells = [kind_of(head), str(mentioned)]
        for runs in tallies.values():
            shares = [100 * right / count for right, count in (run[head] for run in runs if head in run)]
            cells.append(f"{np.mean(shares):.1f} %" if shares else "")
        rows.append([head.replace(".", ": ").replace("_", " "), *cells])
    return markdown_table(["what it is", "mentioned", *(TITLES[method] for method in tallies)], rows)


def errors_table(rows: list[dict[str, float]]) -> str:
    """One row a noise level."""
    lines = ["| s | Sol's t | Sol | Lune | Sol, structure |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: -row["s"]):
        sol, lune = f"{row['sol']:.4f}", f"{row['lune']:.4f}"
        sol, lune = (f"**{sol}**", lune) if row["sol"] < row["lune"] else (sol, f"**{lune}**")
        lines.append(f"| {row['s']:.3f} | {row['timestep']} | {sol} | {lune} | {row['sol_structure']:.4f} |")
    return "\n".join(lines)
