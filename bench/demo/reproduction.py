"""Experts that `moe-sampler experts demo` made here, beside those that ship, by one judge.

`python -m bench.demo.reproduction WORK_DIR EXPERTS` takes a training run's work folder and what it wrote. It
writes bench/results/reproduction.json and docs/images/demo_reproduction.png, and renews the table of
docs/DEMO.md. What is measured in units of reference pictures has those of the shipped autoencoder for both.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from bench.demo.evaluate import Referee, generate, paint, painter, reconstruct
from bench.demo.report import MEASURES, TITLES, markdown_table, measured
from bench.demo.sheet import contact_sheet
from bench.measure import environment
from bench.pages import DOCS, renew_page
from bench.report import RESULTS
from moe_sampler import HybridPipeline
from moe_sampler.demo import experts_path
from moe_sampler.demo.captions import EXAMPLE_PROMPTS
from moe_sampler.demo.record import RunRecord
from moe_sampler.demo.stages import TRAINED, Workshop, default_recipe
from moe_sampler.demo.weights import trained_steps

SHIPPED, HERE = "as shipped", "made here"
METHODS = ("lune", "hybrid")
_NOUNS = {"autoencoder": "the autoencoder", "text": "the text encoder", "trunk": "the trunk"}
_NOUNS |= {"decoder": "the decoder", "sol": "Sol", "lune": "Lune"}


def trained(work_dir: Path) -> dict[str, Any]:
    """Minutes, scenes, and steps and batch by stage, of a run that is finished."""
    record = RunRecord.read(work_dir)
    if record is None or record.scenes is None:
        raise ValueError(f"{work_dir} is no training run's work folder: give that of `experts demo`")
    shop = Workshop(work_dir, record.seed, default_recipe(record.large))
    steps = {name: trained_steps(shop.checkpoints / f"{name}.safetensors") for name in TRAINED}
    missing = [name for name, count in steps.items() if not count]
    if missing:
        raise ValueError(f"{work_dir} isn't finished: it lacks {', '.join(missing)}")
    batches = {name: shop.settings(name)["train_batch_size"] for name in TRAINED}
    return {"minutes": record.spent / 60, "scenes": record.scenes, "steps": steps, "batches": batches}


def measure(
    work_dir: Path, folders: Mapping[str, Path], referee: Referee
) -> dict[str, list[dict[str, float]]]:
    """By row of the table a mapping a seed; one for what an autoencoder makes of the drawn scenes."""
    drawn = referee.test.scenes.pictures[: referee.test.count, 0]
    found = {}
    for title, folder in folders.items():
        vae = HybridPipeline.from_pretrained(folder).vae
        found[f"{title}: scenes through the autoencoder"] = [referee.measure(reconstruct(vae, drawn))]
        for method, pictures in paint(work_dir, folder, referee.prompts, METHODS).items():
            found[f"{title}: {TITLES[method]}"] = [referee.measure(images) for images in pictures]
    return found


def sheet(folders: Mapping[str, Path]) -> Image.Image:
    """A row of hybrid pictures for each, of EXAMPLE_PROMPTS."""
    rows = [(t, list(generate(painter(f), "hybrid", list(EXAMPLE_PROMPTS), 0))) for t, f in folders.items()]
    return contact_sheet([""] * len(EXAMPLE_PROMPTS), rows)


def block(content: Mapping[str, Any]) -> str:
    """What docs/DEMO.md shows."""
    run, table = content["run"], content["table"]
    seeds = len(table[f"{HERE}: {TITLES['hybrid']}"])
    listed = ", ".join(
        f"{count:,} of {_NOUNS[name]} ({run['batches'][name]})" for name, count in run["steps"].items()
    )
    return "\n\n".join(
        [
            f"It took {run['minutes']:.0f} minutes on {content['machine']}: {run['scenes']:,} scenes; steps, "
            f"with their batches: {listed}.",
            f"{content['prompts']} held-out prompts, {seeds} seeds, as above but by a judge of their own:",
            markdown_table(MEASURES, ([title, *measured(runs)] for title, runs in table.items())),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("experts", type=Path)
    options = parser.parse_args(arguments)
    run = trained(options.work_dir)
    folders = {SHIPPED: experts_path(), HERE: options.experts}
    referee = Referee.prepare(options.work_dir, HybridPipeline.from_pretrained(experts_path()).vae)
    table = measure(options.work_dir, folders, referee)
    machine, prompts = environment()["machine"], referee.test.count
    content = {"machine": machine, "run": run, "prompts": prompts, "table": table}
    (RESULTS / "reproduction.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sheet(folders).save(DOCS / "images" / "demo_reproduction.png", optimize=True)
    made = block(content)
    renew_page(DOCS / "DEMO.md", "reproduction", made)
    print(made)


if __name__ == "__main__":
    main()
