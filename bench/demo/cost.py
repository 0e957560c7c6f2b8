"""Quality against cost on the demo experts: reuse of features, guidance windows and fewer steps.

`python -m bench.demo.cost WORK_DIR`, with the work folder of a training run as for `bench.demo.evaluate`,
measures pictures of held-out prompts for every setting with three seeds, prints the table of
docs/PERFORMANCE.md and writes bench/results/cost.csv and cost.png. `--count` and `--seeds` shorten it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from bench.demo.evaluate import Referee, generate
from bench.demo.report import MEASURES, markdown_table, measured
from bench.report import RESULTS, write_csv
from moe_sampler import HybridPipeline
from moe_sampler.demo import experts_path

STEPS = (24, 16, 10)
REUSE = (None, 2, 3, 4)
WINDOWS: Mapping[str, tuple[float, float] | None] = {"everywhere": None, "1 to 0.3": (1.0, 0.3)}
"""Where guidance is on, as noise levels."""


@dataclass(frozen=True)
class Setting:
    """One way to make the pictures."""

    steps: int
    reuse: int | None = None
    window: str = "everywhere"

    @property
    def settings(self) -> dict[str, Any]:
        """As `HybridPipeline.__call__` takes them, beside the number of steps."""
        return {"reuse": self.reuse, "guidance_window": WINDOWS[self.window]}

    @property
    def title(self) -> str:
        parts = [f"{self.steps} steps", "all full" if self.reuse is None else f"1 of {self.reuse} full"]
        return ", ".join([*parts, *([] if self.window == "everywhere" else [f"guided {self.window}"])])

    def cost(self, pipe: HybridPipeline) -> float:
        """In full passes a picture."""
        experts = pipe.experts(reuse=self.reuse, guidance_window=WINDOWS[self.window])
        return pipe.plan("hybrid", self.steps, experts=experts).cost


SETTINGS = [Setting(steps, reuse, window) for window, steps, reuse in product(WINDOWS, STEPS, REUSE)]


@dataclass(frozen=True)
class Result:
    """What a setting came to, a run a seed, in the keys of `bench.demo.report`'s measures."""

    setting: Setting
    cost: float
    runs: Sequence[Mapping[str, float]]
    distance: float
    """RMS difference from the pictures of the full run of as many steps as STEPS begins with, in [0, 1]."""

    def row(self) -> dict[str, object]:
        keys = ("attributes", "frechet", "patches")
        means = {key: float(np.mean([run[key] for run in self.runs])) for key in keys}
        spread = {f"{key}_std": float(np.std([run[key] for run in self.runs], ddof=1)) for key in keys}
        shown = {key: f"{value:.5f}" for key, value in {**means, **spread}.items()}
        own = self.setting
        return {
            "steps": own.steps,
            "reuse": own.reuse or 1,
            "guided": own.window,
            "cost": f"{self.cost:.2f}",
            "rms_from_full": f"{self.distance:.4f}",
            **shown,
        }


def measure(
    pipe: HybridPipeline,
    referee: Referee,
    settings: Sequence[Setting],
    seeds: Sequence[int],
    batch_size: int = 50,
) -> list[Result]:
    """Every setting on the same prompts and seeds; the first one is what the others are compared with."""
    results: list[Result] = []
    first: list[np.ndarray] = []
    for setting in settings:
        made = [
            generate(pipe, "hybrid", referee.prompts, seed, setting.steps, batch_size, **setting.settings)
            for seed in seeds
        ]
        first = first or made
        apart = [np.mean(((a - b.astype(float)) / 255) ** 2) for a, b in zip(made, first, strict=True)]
        runs = [referee.measure(images) for images in made]
        results.append(Result(setting, setting.cost(pipe), runs, float(np.sqrt(np.mean(apart)))))
        print(results[-1].row(), flush=True)
    return results


def table(results: Sequence[Result]) -> str:
    """Markdown, a row a setting, from dear to cheap."""
    rows = (
        [r.setting.title, f"{r.cost:.1f}", f"{r.distance:.3f}", *measured(r.runs)]
        for r in sorted(results, key=lambda r: -r.cost)
    )
    return markdown_table(("full passes", "from the full run", *MEASURES), rows)


def draw(results: Sequence[Result], path: Path) -> None:
    """Each measure over the cost, a line a number of full calls."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = {"attributes": "attributes right", "frechet": "Fréchet distance", "patches": "patch distance"}
    for axes, (key, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for (window, reuse), style in zip(product(WINDOWS, REUSE), _STYLES, strict=True):
            own = [r for r in results if (r.setting.window, r.setting.reuse) == (window, reuse)]
            values = [[run[key] for run in r.runs] for r in own]
            label = "all full" if reuse is None else f"1 of {reuse} full"
            label += "" if WINDOWS[window] is None else f", guided {window}"
            if own:
                axes.errorbar(
                    [r.cost for r in own],
                    [np.mean(each) for each in values],
                    [np.std(each, ddof=1) if len(each) > 1 else 0.0 for each in values],
                    label=label,
                    **style,
                )
        axes.set_title(title)
        axes.set_xlabel("full passes a picture")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


_COLOURS = ("#333333", "#3d6db5", "#2f9d78", "#dd8a1f")
_STYLES = [
    {"color": colour, "linestyle": line, "marker": "o", "markersize": 4, "capsize": 2}
    for line, colour in product(("-", ":"), _COLOURS)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--experts", type=Path, default=experts_path())
    parser.add_argument("--count", type=int, default=300, help="prompts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=50, help="pictures made at once")
    options = parser.parse_args()
    pipe = HybridPipeline.from_pretrained(options.experts, device=options.device)
    pipe.set_progress_bar_config(disable=True)
    vae = HybridPipeline.from_pretrained(options.experts).vae
    referee = Referee.prepare(options.work_dir, vae, options.count)
    results = measure(pipe, referee, SETTINGS, range(options.seeds), options.batch_size)
    write_csv([result.row() for result in results], RESULTS / "cost.csv")
    draw(results, RESULTS / "cost.png")
    print(table(results))


if __name__ == "__main__":
    main()
