"""Measure the student that ships, beside the experts that taught it, as docs/DEMO.md measures those.

`python -m bench.demo.student WORK_DIR`, with the work folder of a training run as for `bench.demo.evaluate`,
prints the table, and writes it and docs/images/student.png for docs/TINYFLUX.md. Pictures are kept under
WORK_DIR/evaluation, and painted again where they are missing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from bench.demo.evaluate import STEPS, Referee, generate, kept, to_bytes
from bench.demo.report import MEASURES, markdown_table, measured
from bench.pages import renew_page
from moe_sampler import HybridPipeline
from moe_sampler.demo import experts_path, student_path
from moe_sampler.demo.captions import EXAMPLE_PROMPTS
from moe_sampler.tinyflux import StudentPipeline
from moe_sampler.viewing.sheets import Sheet

DOCS = Path(__file__).parents[2] / "docs"
SEEDS = (0, 1, 2)


def paint(pipe: StudentPipeline, prompts: list[str], seed: int, batch: int = 50) -> np.ndarray:
    """uint8 [N, 64, 64, 3]; image i of `seed` starts from the noise that the experts' does."""
    made = pipe(
        prompts,
        num_inference_steps=STEPS,
        seed=[1_000_000 * seed + i for i in range(len(prompts))],
        batch_size=batch,
        output_type="np",
    )
    return to_bytes(made.images)


def table(student: StudentPipeline, work_dir: Path, count: int) -> str:
    """Markdown: what could be reached, the student, and its teachers."""
    experts = HybridPipeline.from_pretrained(experts_path())
    experts.set_progress_bar_config(disable=True)
    referee = Referee.prepare(work_dir, experts.vae, count)
    prompts, folder = referee.prompts, work_dir / "evaluation"
    folder.mkdir(exist_ok=True)
    sets = {"the prompts' own scenes, through the autoencoder": [referee.real["reconstructions"]]}
    sets["the student"] = [
        kept(folder / f"student-{seed}-{count}.npy", lambda seed=seed: paint(student, prompts, seed))
        for seed in SEEDS
    ]
    sets["Sol and Lune"] = [
        kept(
            folder / f"hybrid-{seed}-{count}.npy",
            lambda seed=seed: generate(experts, "hybrid", prompts, seed),
        )
        for seed in SEEDS
    ]
    rows = ([title, *measured([referee.measure(own) for own in made])] for title, made in sets.items())
    return markdown_table(MEASURES, rows)


def sheet(student: StudentPipeline, columns: int = 6, rows: int = 3) -> Image.Image:
    """The example prompts in turn, each from another seed, without captions."""
    count = columns * rows
    prompts = [EXAMPLE_PROMPTS[i % len(EXAMPLE_PROMPTS)] for i in range(count)]
    pictures = paint(student, prompts, 0)
    made = Sheet(columns, rows, (128, 128), gap=4, margins=(4, 4, 4, 4), background="white")
    for i, picture in enumerate(pictures):
        made.paste(Image.fromarray(picture), i % columns, i // columns, smooth=True)
    return made.image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--count", type=int, default=300, help="prompts")
    options = parser.parse_args()
    student = StudentPipeline.from_pretrained(student_path(), encoders=experts_path())
    student.set_progress_bar_config(disable=True)
    sheet(student).save(DOCS / "images" / "student.png", optimize=True)
    text = (
        f"{options.count} held-out prompts, {len(SEEDS)} seeds, mean ± standard deviation between seeds; "
        f"{STEPS} steps, each model's own guidance.\n\n{table(student, options.work_dir, options.count)}"
    )
    print(text)
    renew_page(DOCS / "TINYFLUX.md", "shipped student", text)


if __name__ == "__main__":
    main()
