"""What teachers do for a student's pictures, measured as docs/DEMO.md measures the demo experts:

    python -m bench.student_quality runs/study --work-dir runs/demo

reads trained students, paints the held-out prompts with each, prints the tables, and writes
bench/results/student_quality.json, docs/images/student_quality.png and the measured part of docs/TINYFLUX.md.

The folder holds `equal_steps/VARIANT-SEED` and `equal_time/VARIANT-SEED`, training runs' folders or students
as `save_pretrained` writes them; VARIANT is alone, features or distilled. What training took is read from
their logs. Pictures are kept in the folder and painted again only where weights or settings are others.
Several processes may share the work: `--paint alone-0 features-0` paints those students' pictures and stops.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from bench.demo.evaluate import Referee
from bench.demo.held_out import HELD_OUT_SCENES
from bench.demo.report import MEASURES, markdown_table, measured
from bench.demo.sheet import contact_sheet
from bench.pages import renew_page
from bench.report import RESULTS
from bench.student_study import EXPERTS, REAL, SETS, Painter, Results, Sampling, paint, study
from moe_sampler import HybridPipeline
from moe_sampler.demo import experts_path

DOCS = Path(__file__).parents[1] / "docs"
PAGE, PICTURE = DOCS / "TINYFLUX.md", DOCS / "images" / "student_quality.png"
SUITE = "quality"


def table(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown: steps of training, where they are known of all, and mean ± standard deviation over seeds."""
    known = all("steps" in run for runs in rows.values() for run in runs)
    lines = []
    for title, runs in rows.items():
        cells = measured(runs)
        if known:
            cells = [f"{np.mean([run['steps'] for run in runs]):,.0f}", *cells]
        lines.append([title, *cells])
    return markdown_table([*(("steps",) if known else ()), *MEASURES], lines)


def shown_prompts(referee: Referee, each: int = 2) -> list[int]:
    """The first prompts of every kind of scene."""
    kinds: dict[str, list[int]] = {}
    for i in range(referee.test.count):
        kinds.setdefault(referee.test.scenes.scene(i).kind, []).append(i)
    return [i for found in kinds.values() for i in found[:each]]


def comparison(pictures: Mapping[str, Mapping[str, np.ndarray]], which: Sequence[int]) -> Image.Image:
    """A row a variant, a column a prompt, from the same noise."""
    students = next(pictures[name] for name in SETS if name in pictures)
    rows = {"held-out scene": pictures["references"][REAL["reconstructions"]], **students}
    rows[EXPERTS] = pictures["references"][EXPERTS]
    sheet = contact_sheet(
        [str(k + 1) for k in range(len(which))],
        [(title, [images[i] for i in which]) for title, images in rows.items()],
    )
    # A palette makes the file a third as large.
    return sheet.quantize(256, kmeans=1, dither=Image.Dither.NONE)


def _block(numbers: Results, sampling: Sampling, prompts: Sequence[str], which: Sequence[int]) -> str:
    """What docs/TINYFLUX.md shows."""
    seeds = max(len(runs) for name in SETS if name in numbers for runs in numbers[name].values())
    first = next(title for name, title in SETS.items() if name in numbers)
    shown = [f"{k + 1}. {prompts[i]}" for k, i in enumerate(which)]
    parts = [
        f"{len(prompts)} held-out prompts, {seeds} training seeds, mean ± standard deviation between seeds; "
        f"{sampling.steps} steps, guidance {sampling.guidance:g}. Guidance experts: Sol's weight "
        f"{sampling.sol_weight:g} above the handoff, Lune's {sampling.lune_weight:g} below it."
    ]
    for name, title in SETS.items():
        if name in numbers:
            parts += [f"{title}:", table(numbers[name])]
    parts += ["For comparison:", table(numbers["references"])]
    parts += [f"![The same prompts from the same noise](images/{PICTURE.name})"]
    parts += [f"{first}, the first seed:", "\n".join(shown)]
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    experts = HybridPipeline.from_pretrained(options.experts)
    experts.set_progress_bar_config(disable=True)
    referee = Referee.prepare(options.work_dir, experts.vae, options.count)
    sampling = Sampling(options.steps, options.guidance, options.sol_weight, options.lune_weight)
    kept = options.runs / "pictures"
    painter = Painter(experts, referee.prompts, sampling, options.batch_size, kept)
    if options.paint:
        paint(options.runs, painter, options.paint)
        return
    numbers, pictures = study(options.runs, referee, painter)
    which = shown_prompts(referee)
    block = _block(numbers, sampling, referee.prompts, which)
    print(block)
    if not options.dry:
        settings = {**asdict(sampling), "count": options.count}
        content = json.dumps({"settings": settings, **numbers}, indent=1)
        (RESULTS / "student_quality.json").write_text(content + "\n", encoding="utf-8")
        comparison(pictures, which).save(PICTURE, optimize=True)
        renew_page(PAGE, SUITE, block)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    default = Sampling()
    parser = argparse.ArgumentParser(prog="python -m bench.student_quality", description="Measure students.")
    parser.add_argument("runs", type=Path, help="folder with equal_steps/ and equal_time/, or one of them")
    parser.add_argument(
        "--work-dir", type=Path, required=True, help="of the demo's training: scenes and judge"
    )
    parser.add_argument("--experts", type=Path, default=experts_path(), help="pipeline folder; the demo's")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--guidance", type=float, default=default.guidance)
    parser.add_argument("--sol-weight", type=float, default=default.sol_weight)
    parser.add_argument("--lune-weight", type=float, default=default.lune_weight)
    parser.add_argument("--count", type=int, default=300, help="prompts")
    parser.add_argument("--batch-size", type=int, default=25, help="pictures painted at once")
    parser.add_argument("--paint", nargs="+", metavar="NAME", help="paint these students' pictures, no more")
    parser.add_argument("--dry", action="store_true", help="print the tables and write nothing")
    options = parser.parse_args(arguments)
    if not 2 <= options.count <= HELD_OUT_SCENES - 2:
        parser.error(
            f"--count must lie between 2 and {HELD_OUT_SCENES - 2}: the other scenes are the reference"
        )
    return options


if __name__ == "__main__":
    main()
