"""What teachers bring a student, and from how long a training on: held-out errors while several trained.

`python -m bench.student_curves RUN RUN ...`, with the folders of training runs that validated at the same
steps, the baseline first, writes bench/results/student_curves.csv and .png and renews the table in
docs/TINYFLUX.md. A run is called by its folder's name.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.demo.report import markdown_table
from bench.pages import DOCS, renew_page
from bench.report import RESULTS, write_csv

PAGE, SUITE = DOCS / "TINYFLUX.md", "student curves"
Errors = dict[int, dict[str, float]]
"""By step what a validation said."""


def held_out_errors(folder: Path) -> Errors:
    """What a run's log says of its validations.

    Raises:
        ValueError: a log without any.
    """
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    found = {
        record["step"]: record["validation"] for record in map(json.loads, lines) if "validation" in record
    }
    if not found:
        raise ValueError(f"{folder} validated nothing: train with --held-out and --validation-steps")
    return found


def common_steps(runs: Mapping[str, Errors]) -> list[int]:
    """Steps at which all runs were validated.

    Raises:
        ValueError: there are none.
    """
    steps = set.intersection(*(set(errors) for errors in runs.values()))
    if not steps:
        raise ValueError(f"{', '.join(runs)} were never validated at the same step")
    return sorted(steps)


def block(runs: Mapping[str, Errors]) -> str:
    """Markdown: the error over the steps, beside the first run's, and by time at the end."""
    steps, baseline = common_steps(runs), next(iter(runs))

    def cell(name: str, step: int, key: str) -> str:
        value, first = runs[name][step][key], runs[baseline][step][key]
        return f"{value:.4f}" if name == baseline else f"{value:.4f} ({value / first - 1:+.1%})"

    over_steps = [[f"{step:,} steps", *(cell(name, step, "loss") for name in runs)] for step in steps]
    last = steps[-1]
    times = [key for key in runs[baseline][last] if key != "loss"]
    by_time = [[key.replace("noise", "at time"), *(cell(name, last, key) for name in runs)] for key in times]
    return markdown_table(tuple(runs), [*over_steps, *by_time])


def draw(runs: Mapping[str, Errors], path: Path) -> None:
    """The errors, and their ratio to the first run's, over the steps; PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, baseline = common_steps(runs), runs[next(iter(runs))]
    for name, errors in runs.items():
        values = [errors[step]["loss"] for step in steps]
        left.plot(steps, values, marker="o", markersize=4, label=name)
        right.plot(
            steps,
            [100 * (value / baseline[step]["loss"] - 1) for step, value in zip(steps, values, strict=True)],
            marker="o",
            markersize=4,
        )
    left.set_title("held-out velocity error")
    right.set_title(f"% above or below {next(iter(runs))}")
    for axes in (left, right):
        axes.set_xlabel("training steps")
        axes.grid(alpha=0.3)
    left.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="training runs' folders, the baseline first")
    options = parser.parse_args(arguments)
    runs = {folder.name: held_out_errors(folder) for folder in options.runs}
    rows = [{"run": name, "step": step, **runs[name][step]} for name in runs for step in common_steps(runs)]
    write_csv(rows, RESULTS / "student_curves.csv")
    draw(runs, RESULTS / "student_curves.png")
    print(text := block(runs))
    renew_page(PAGE, SUITE, text)


if __name__ == "__main__":
    main()
