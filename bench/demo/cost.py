"""What pictures of the demo experts cost, and what they are worth.

`python -m bench.demo.cost WORK_DIR`, with the work folder of a training run as for `bench.demo.evaluate`,
measures pictures of held-out prompts for every setting of a study with three seeds, writes
bench/results/<study>.csv, .md and .png, and renews its table in docs/PERFORMANCE.md. The studies:

    cost       how many steps, how many of them full, guidance everywhere or in a window
    cheap      what is to be had below a dozen passes: fewer steps, or fewer of them full
    guidance   scales and guiders

A setting that the CSV file has already isn't measured again: a study can be stopped and run again, and
`--report` measures none.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from bench.demo.evaluate import Referee, generate
from bench.demo.report import MEASURES, cells, markdown_table, summarized
from bench.pages import PERFORMANCE, renew_page
from bench.report import RESULTS, read_csv, write_csv
from moe_sampler import HybridPipeline
from moe_sampler.demo import experts_path

STEPS = (24, 16, 10)
REUSE = (None, 2, 3, 4)
WINDOWS: Mapping[str, tuple[float, float] | None] = {"everywhere": None, "1 to 0.3": (1.0, 0.3)}
"""Where guidance is on, as noise levels."""
GUIDERS = ("cfg", "cfg_zero_star", "apg", "apg momentum -0.5")
SCALES = (2.5, 4.0, 6.0)


@dataclass(frozen=True)
class Setting:
    """One way to make the pictures."""

    steps: int
    reuse: int = 1
    guided: str = "everywhere"
    scale: float | None = None
    guider: str = "cfg"

    @property
    def settings(self) -> dict[str, Any]:
        """As `HybridPipeline.__call__` and `HybridPipeline.experts` take them, beside the number of steps."""
        found: dict[str, Any] = {"reuse": self.reuse, "guidance_window": WINDOWS[self.guided]}
        found |= {} if self.scale is None else {"guidance_scale": self.scale}
        return found | ({} if self.guider == "cfg" else {"guider": self.guider})

    @property
    def kind(self) -> str:
        """The line of the plot that it is a point of."""
        if self.scale is not None:
            return self.guider
        own = "all full" if self.reuse == 1 else f"1 of {self.reuse} full"
        return own + ("" if WINDOWS[self.guided] is None else f", guided {self.guided}")

    @property
    def title(self) -> str:
        return (
            f"{self.steps} steps, {self.kind}" if self.scale is None else f"{self.kind}, scale {self.scale:g}"
        )

    def cost(self, pipe: HybridPipeline) -> float:
        """In full passes a picture."""
        return pipe.plan("hybrid", self.steps, experts=pipe.experts(**self.settings)).cost


STUDIES: Mapping[str, Sequence[Setting]] = {
    "cost": [
        *(Setting(steps, reuse or 1, window) for window, steps, reuse in product(WINDOWS, STEPS, REUSE)),
        *(Setting(steps) for steps in (8, 6)),
    ],
    "cheap": [
        *(Setting(steps) for steps in (10, 6, 5, 4)),
        *(Setting(n, k) for n in (10, 8) for k in (2, 3)),
    ],
    "guidance": [Setting(10, scale=scale, guider=guider) for scale, guider in product(SCALES, GUIDERS)],
}
AXES = {**dict.fromkeys(("cost", "cheap"), "full passes a picture"), "guidance": "guidance scale"}
Row = dict[str, Any]


def measure(
    pipe: HybridPipeline,
    referee: Referee,
    settings: Sequence[Setting],
    seeds: Sequence[int],
    batch_size: int = 50,
    done: Sequence[Row] = (),
) -> Iterator[Row]:
    """A row for every setting that isn't `done`, on the same prompts and seeds.

    Their pictures' distance is the RMS difference, of values in [0, 1], from those of the first setting.
    """

    def made_with(setting: Setting) -> list[np.ndarray]:
        shared = (setting.steps, batch_size)
        return [generate(pipe, "hybrid", referee.prompts, s, *shared, **setting.settings) for s in seeds]

    titles = {row["setting"] for row in done}
    first: list[np.ndarray] = []
    for setting in settings:
        if setting.title in titles:
            continue
        first = first or made_with(settings[0])
        made = first if setting == settings[0] else made_with(setting)
        apart = [np.mean(((a - b.astype(float)) / 255) ** 2) for a, b in zip(made, first, strict=True)]
        yield {
            "setting": setting.title,
            "cost": setting.cost(pipe),
            "rms_from_first": float(np.sqrt(np.mean(apart))),
            **summarized([referee.measure(images) for images in made]),
        }


def read(path: Path) -> list[Row]:
    """The rows of a study's CSV file; none where there is none."""
    found = read_csv(path) if path.exists() else []
    return [{k: v if k == "setting" else float(v) for k, v in row.items()} for row in found]


def table(rows: Sequence[Row]) -> str:
    """Markdown, a row a setting, from dear to cheap."""
    shown = (
        [row["setting"], f"{row['cost']:.1f}", f"{row['rms_from_first']:.3f}", *cells(row)]
        for row in sorted(rows, key=lambda row: -row["cost"])
    )
    return markdown_table(("full passes", "from the first", *MEASURES), shown)


def draw(study: str, rows: Sequence[Row], path: Path) -> None:
    """Each measure over the cost or the scale, a line a kind of setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = {"attributes": "attributes right", "frechet": "Fréchet distance", "patches": "patch distance"}
    by_title = {row["setting"]: row for row in rows}
    own = [(setting, by_title[setting.title]) for setting in STUDIES[study] if setting.title in by_title]
    kinds = list(dict.fromkeys(setting.kind for setting, _ in own))
    for axes, (key, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for number, kind in enumerate(kinds):
            points = sorted(
                (
                    row["cost"] if setting.scale is None else setting.scale,
                    row[key],
                    row.get(f"{key}_std", 0.0),
                )
                for setting, row in own
                if setting.kind == kind
            )
            axes.errorbar(
                *zip(*points, strict=True),
                label=kind,
                color=_COLOURS[number % 4 if study == "cost" else number],
                linestyle=":" if "guided" in kind else "-",
                marker="o",
                markersize=4,
                capsize=2,
            )
        axes.set_title(title)
        axes.set_xlabel(AXES[study])
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


_COLOURS = ("#333333", "#3d6db5", "#2f9d78", "#dd8a1f", "#a64ca6")


def report(study: str, rows: Sequence[Row], count: str) -> None:
    """The study's files but its CSV, and its table in docs/PERFORMANCE.md."""
    made = f"Made by `python -m bench.demo.cost --study {study}`, {count}."
    text = f"# {study.capitalize()}\n\n{made}\n\n{table(rows)}\n"
    (RESULTS / f"{study}.md").write_text(text, encoding="utf-8")
    draw(study, rows, RESULTS / f"{study}.png")
    renew_page(PERFORMANCE, study, table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--study", choices=STUDIES, default="cost")
    parser.add_argument("--report", action="store_true", help="of what is measured, measure nothing")
    parser.add_argument("--experts", type=Path, default=experts_path())
    parser.add_argument("--count", type=int, default=300, help="prompts")
    parser.add_argument("--scenes", type=int, help="that the judge learns from; default: those of the run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=50, help="pictures made at once")
    options = parser.parse_args()
    path = RESULTS / f"{options.study}.csv"
    rows = read(path)
    if not options.report:
        pipe = HybridPipeline.from_pretrained(options.experts, device=options.device)
        pipe.set_progress_bar_config(disable=True)
        vae = HybridPipeline.from_pretrained(options.experts).vae
        referee = Referee.prepare(options.work_dir, vae, options.count, trained=options.scenes)
        seeds, settings = range(options.seeds), STUDIES[options.study]
        for row in measure(pipe, referee, settings, seeds, options.batch_size, done=list(rows)):
            print(row, flush=True)
            rows.append(row)
            write_csv(rows, path)
    report(options.study, rows, f"{options.count} prompts, {options.seeds} seeds")
    print(table(rows))


if __name__ == "__main__":
    main()
