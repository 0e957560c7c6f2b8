"""Which solvers and spacings are best on the demo experts, for how many model calls.

`python -m bench.demo.solvers WORK_DIR`, with the work folder of a training run as for
`bench.demo.evaluate`, makes pictures of held-out prompts with every pair of solvers, spacing and number of
calls, prints the table of docs/SOLVERS.md and writes bench/results/solvers.csv, .md and .png. Pictures are
made a few prompts at a time, for everything, and kept under WORK_DIR/solvers: it can be stopped and run
again, and `--report` measures what there is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.demo.evaluate import Referee, to_bytes
from bench.demo.held_out import HELD_OUT_SCENES, HeldOut
from bench.pages import renew_page
from bench.report import RESULTS, write_csv
from moe_sampler import HybridPipeline, SamplingPlan
from moe_sampler.demo import experts_path
from moe_sampler.demo.data import HELD_OUT_FIRST, SceneSet, write_array
from moe_sampler.pipelines.solver_columns import Stepping, plan_of_calls

SOLVERS = Path(__file__).parents[2] / "docs" / "SOLVERS.md"
CALLS = (6, 10, 20)
SEEDS = (0, 1, 2)
PAIRS = (
    *("ddpm+euler", "ddim+euler", "heun", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde"),
    *("ddpm+dpmpp_2m", "dpmpp_2m_sde+dpmpp_2m"),
)
SPACINGS = (None, "karras", "beta", "cosine")
BORROWED = ("unipc", "deis_3", "dpmpp_3m_sde", "euler_a")
"""diffusers' own, at the levels they bring."""
CHUNK = 8
"""Prompts made together, with all seeds, unless told otherwise."""


@dataclass(frozen=True)
class Setting:
    """One way to make the pictures."""

    pair: str
    spacing: str | None
    calls: int

    @property
    def name(self) -> str:
        return f"{self.pair}-{self.spacing or 'own'}-{self.calls}"

    def plan(self, pipe: HybridPipeline) -> SamplingPlan:
        at = "" if self.spacing is None else f"@{self.spacing}"
        stepping = Stepping.read("+".join(part + at for part in self.pair.split("+")), pipe.expert_names)
        experts = pipe.experts(**stepping.settings, reuse=1)
        return plan_of_calls(lambda steps: pipe.plan("hybrid", steps, experts=experts), self.calls)

    def path(self, folder: Path, first: int) -> Path:
        return folder / f"{self.name}-{first:04}.npy"


SETTINGS = [
    *(Setting(pair, spacing, calls) for calls in CALLS for pair in PAIRS for spacing in SPACINGS),
    *(Setting(name, None, calls) for calls in CALLS for name in BORROWED),
]


def make(pipe: HybridPipeline, prompts: Sequence[str], folder: Path, chunk: int = CHUNK) -> None:
    """uint8 [seeds, chunk, 64, 64, 3] of every setting and chunk of prompts that isn't there yet. An image's
    noise is that of its prompt and seed, whatever else it is made by and with."""
    folder.mkdir(exist_ok=True)
    for first in range(0, len(prompts), chunk):
        texts = prompts[first : first + chunk]
        seeds = [1_000_000 * seed + first + i for seed in SEEDS for i in range(len(texts))]
        for setting in SETTINGS:
            path = setting.path(folder, first)
            if path.exists():
                continue
            made = pipe(
                list(texts) * len(SEEDS), plan=setting.plan(pipe), seed=seeds, output_type="np"
            ).images
            pixels = to_bytes(made)
            write_array(path, pixels.reshape(len(SEEDS), len(texts), *pixels.shape[1:]))
        print(f"{first + len(texts)} prompts", flush=True)


def chunks(folder: Path, chunk: int = CHUNK) -> list[int]:
    """Those that are there of every setting."""
    firsts = range(0, HELD_OUT_SCENES, chunk)
    return [each for each in firsts if all(one.path(folder, each).exists() for one in SETTINGS)]


def pictures(setting: Setting, folder: Path, firsts: Sequence[int]) -> np.ndarray:
    """uint8 [seeds, prompts, 64, 64, 3]."""
    return np.concatenate([np.load(setting.path(folder, first)) for first in firsts], axis=1)


MEASURES = ("attributes", "frechet", "patches")


@dataclass(frozen=True)
class Result:
    """What a setting came to: each of MEASURES, a run a seed."""

    setting: Setting
    made: int
    """Model calls that it takes, at most those that were asked for."""
    runs: Sequence[dict[str, float]]

    def mean(self, key: str) -> float:
        return float(np.mean([run[key] for run in self.runs]))

    def spread(self, key: str) -> float:
        """Standard deviation between seeds."""
        return float(np.std([run[key] for run in self.runs], ddof=1))

    def row(self) -> dict[str, Any]:
        own = self.setting
        row = {"solvers": own.pair, "levels": own.spacing or "own", "calls": own.calls, "made": self.made}
        for key in MEASURES:
            row |= {key: f"{self.mean(key):.4f}", f"{key}_std": f"{self.spread(key):.4f}"}
        return row


def measure(pipe: HybridPipeline, referee: Referee, folder: Path, firsts: Sequence[int]) -> Iterator[Result]:
    for setting in SETTINGS:
        made = pictures(setting, folder, firsts)
        yield Result(setting, len(setting.plan(pipe)), [referee.measure(own) for own in made])


_FORMS = {"attributes": (100.0, "{:.1f}"), "frechet": (1.0, "{:.3f}"), "patches": (1.0, "{:.2f}")}


def table(results: Sequence[Result]) -> str:
    """Markdown, a row a pair and spacing, three columns a number of calls."""
    titles = [f"{key}, {calls}" for calls in CALLS for key in MEASURES]
    lines = [f"| solvers | levels | {' | '.join(titles)} |", "|---|---|" + "---|" * len(titles)]
    found = {(one.setting.pair, one.setting.spacing, one.setting.calls): one for one in results}
    best = {
        (key, calls): (max if key == "attributes" else min)(
            one.mean(key) for one in results if one.setting.calls == calls
        )
        for calls in CALLS
        for key in MEASURES
    }
    for pair, spacing in dict.fromkeys((one.setting.pair, one.setting.spacing) for one in results):
        cells = []
        for calls in CALLS:
            one = found[pair, spacing, calls]
            for key in MEASURES:
                factor, form = _FORMS[key]
                cell = f"{form.format(factor * one.mean(key))} ± {form.format(factor * one.spread(key))}"
                cells.append(f"**{cell}**" if one.mean(key) == best[key, calls] else cell)
        lines.append(f"| {pair} | {spacing or 'own'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def beyond_spread(results: Sequence[Result], key: str, calls: int) -> list[Result]:
    """What is better than the first of PAIRS on the experts' own levels, by more than both spreads together,
    from the best on."""
    own = [one for one in results if one.setting.calls == calls]
    default = next(one for one in own if (one.setting.pair, one.setting.spacing) == (PAIRS[0], None))
    sign = 1.0 if key == "attributes" else -1.0
    ahead = {
        one.setting: sign * (one.mean(key) - default.mean(key)) - one.spread(key) - default.spread(key)
        for one in own
    }
    better = [one for one in own if ahead[one.setting] > 0.0]
    return sorted(better, key=lambda one: -ahead[one.setting])


def block(results: Sequence[Result], prompts: int) -> str:
    """The section of docs/SOLVERS.md: what was done, what beats the first pair, and the plot, beside which
    the whole table is."""
    lines = [
        "### Which is best on the demo experts",
        f"The hybrid with {len(PAIRS)} pairs of solvers on {len(SPACINGS)} spacings, and {len(BORROWED)} of "
        f"diffusers' on the levels they bring, in {', '.join(map(str, CALLS))} model calls (a guided one "
        f"counts once): {prompts} held-out prompts and {len(SEEDS)} seeds, measured as [DEMO.md](DEMO.md) "
        "says; ± is the standard deviation between seeds. Made by `python -m bench.demo.solvers`; the whole "
        "table is [bench/results/solvers.md](../bench/results/solvers.md).",
        "![Attributes, Fréchet and patch distance over model calls](../bench/results/solvers.png)",
        "Better than Sol DDPM and Lune Euler, each on its own levels, by more than both spreads "
        "together, the three that are furthest ahead:",
    ]
    rows = []
    for calls in CALLS:
        cells = [str(calls)]
        for key in MEASURES:
            found = beyond_spread(results, key, calls)
            names = [f"{one.setting.pair} {one.setting.spacing or ''}".strip() for one in found[:3]]
            cells.append(", ".join(names) or "none")
        rows.append(f"| {' | '.join(cells)} |")
    titles = ("model calls", "attributes right", "Fréchet distance", "patch distance")
    lines.append("\n".join([f"| {' | '.join(titles)} |", "|---|---|---|---|", *rows]))
    return "\n\n".join(lines)


_COLOURS = ("#333333", "#8c8c3a", "#b5527e", "#3d6db5", "#2f9d78", "#dd8a1f", "#7a62b8", "#4fa3c7")
_LINES: dict[str | None, str] = {None: "-", "karras": ":", "beta": "--", "cosine": "-."}


def draw(results: Sequence[Result], path: Path) -> None:
    """Each measure over the number of calls: a colour a pair, a line a spacing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5.6), layout="constrained")
    titles = ("attributes right (up is better)", "Fréchet distance (down)", "patch distance (down)")
    for axes, key, title in zip(figure.subplots(1, 3), MEASURES, titles, strict=True):
        for pair, colour in zip(PAIRS, _COLOURS, strict=False):
            for spacing, line in _LINES.items():
                own = [one for one in results if (one.setting.pair, one.setting.spacing) == (pair, spacing)]
                axes.errorbar(
                    [one.made for one in own],
                    [one.mean(key) for one in own],
                    [one.spread(key) for one in own],
                    color=colour,
                    linestyle=line,
                    marker="o",
                    markersize=3,
                    linewidth=1.2,
                    elinewidth=0.6,
                    label=pair if spacing is None else None,
                )
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("model calls")
        axes.set_xticks(CALLS)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    for spacing, line in _LINES.items():
        handles.append(figure.axes[0].plot([], [], color="#777777", linestyle=line)[0])
        labels.append("own levels" if spacing is None else spacing)
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--experts", type=Path, default=experts_path())
    parser.add_argument("--count", type=int, default=48, help="prompts")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="prompts made together, with all seeds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--report", action="store_true", help="measure what there is, and make no more")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe = HybridPipeline.from_pretrained(options.experts, device=options.device, speed="fast")
    pipe.set_progress_bar_config(disable=True)
    folder = options.work_dir / "solvers"
    if not options.report:
        scenes = SceneSet(options.work_dir / "scenes", HELD_OUT_SCENES, HELD_OUT_FIRST)
        make(pipe, HeldOut(scenes, options.count).prompts()[0], folder, options.chunk)
    firsts = chunks(folder, options.chunk)
    if not firsts:
        parser.error("no prompts have pictures of every setting yet: run it without --report")
    vae = HybridPipeline.from_pretrained(options.experts).vae
    referee = Referee.prepare(options.work_dir, vae, options.chunk * len(firsts))
    results = list(measure(pipe, referee, folder, firsts))
    write_csv([result.row() for result in results], RESULTS / "solvers.csv")
    draw(results, RESULTS / "solvers.png")
    prompts, text = options.chunk * len(firsts), table(results)
    page = f"# Solvers and spacings on the demo experts\n\n{prompts} prompts, {len(SEEDS)} seeds."
    (RESULTS / "solvers.md").write_text(f"{page}\n\n{text}\n", encoding="utf-8")
    own = block(results, prompts)
    renew_page(SOLVERS, "solver pairs", own)
    print(text, own, sep="\n\n")


if __name__ == "__main__":
    main()
