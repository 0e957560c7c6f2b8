"""The evaluation's numbers as the Markdown tables of docs/DEMO.md."""

from __future__ import annotations

import numpy as np

_TITLES = {
    "renders": "held-out renders",
    "reconstructions": "the same through the autoencoder",
    "sol": "Sol alone",
    "lune": "Lune alone",
    "naive": "naive handoff",
    "hybrid": "hybrid",
}
_MEASURES = (
    ("attributes", "attributes right", 100.0, "{:.1f}", " %"),
    ("frechet", "Fréchet distance", 1.0, "{:.3f}", ""),
    ("high_frequencies", "high frequencies", 1.0, "{:.2f}", ""),
    ("patches", "patch distance", 1.0, "{:.2f}", ""),
)


def measures_table(table: dict[str, list[dict[str, float]]]) -> str:
    """One row a method: mean over seeds ± standard deviation between them."""
    lines = [f"| | {' | '.join(title for _, title, *_ in _MEASURES)} |", "|---|" + "---|" * len(_MEASURES)]
    for method, runs in table.items():
        cells = []
        for key, _, factor, form, unit in _MEASURES:
            values = np.array([run[key] for run in runs]) * factor
            cell = form.format(values.mean())
            if len(values) > 1:
                cell += " ± " + form.format(values.std(ddof=1))
            cells.append(cell + unit)
        lines.append(f"| {_TITLES[method]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def errors_table(rows: list[dict[str, float]]) -> str:
    """One row a noise level."""
    lines = ["| s | Sol's t | Sol | Lune | Sol, structure |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: -row["s"]):
        sol, lune = f"{row['sol']:.4f}", f"{row['lune']:.4f}"
        sol, lune = (f"**{sol}**", lune) if row["sol"] < row["lune"] else (sol, f"**{lune}**")
        lines.append(f"| {row['s']:.3f} | {row['timestep']} | {sol} | {lune} | {row['sol_structure']:.4f} |")
    return "\n".join(lines)
