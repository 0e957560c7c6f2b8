"""AdamW or Muon, for the demo's trunk: trained from nothing for the same time.

`python -m bench.demo.optimizers WORK_DIR` renders scenes (or takes those of a training run's work folder),
puts them through the shipped VAE and text encoder, and trains a UNet of the demo's size with each optimizer,
the same learning rate, data and noise, for some minutes. It writes bench/results/optimizers.json and renews
the table of docs/EXPERTS.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import ModelMixin

from bench.demo.controls import Model, Study
from bench.demo.errors import HeldOutLatents
from bench.demo.held_out import HeldOut
from bench.demo.report import markdown_table
from bench.measure import environment
from bench.pages import DOCS, renew_page
from bench.report import RESULTS
from moe_sampler import HybridPipeline
from moe_sampler.demo import experts_path
from moe_sampler.demo.data import HELD_OUT_FIRST, SceneSet
from moe_sampler.demo.experts import expert_task, latent_images
from moe_sampler.demo.scene_task import run_stage
from moe_sampler.demo.stages import SHIPPED, default_recipe
from moe_sampler.demo.weights import fill, trained_steps
from moe_sampler.expert_training import ExpertTask

OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.85, 0.95)


def measure(
    study: Study,
    learner: Callable[[ModelMixin], ExpertTask],
    held: HeldOutLatents,
    optimizer: str,
    minutes: float,
) -> dict[str, Any]:
    """Train, if it wasn't before, and measure: steps, and held-out x0 errors at LEVELS."""
    unet = study.unet(Model("trunk", 1), seed=0)
    folder = study.folder / "optimizers" / f"{optimizer}-{minutes:g}"
    path = folder / "trunk.safetensors"
    if not path.exists():
        settings = study.workshop.settings("trunk") | {"optimizer": optimizer}
        run_stage(learner(unet), folder, 0, settings, time.time() + 60 * minutes)
    errors = [held.lune_error(fill(unet, path), s) for s in LEVELS]
    return {"steps": trained_steps(path), "errors": errors}


def block(content: Mapping[str, Any]) -> str:
    """What docs/EXPERTS.md shows."""
    found, batch = content["found"], content["batch"]
    steps = " and ".join(f"{own['steps']:,} of {OPTIMIZERS[name]}" for name, own in found.items())
    adamw, muon = (np.array(found[name]["errors"]) for name in OPTIMIZERS)
    rows = [
        [f"s = {s:g}", f"{a:.4f}", f"{b:.4f}", f"{b / a:.2f}"]
        for s, a, b in zip(LEVELS, adamw, muon, strict=True)
    ]
    mean = float(np.exp(np.log(muon / adamw).mean()))
    return "\n\n".join(
        [
            f"{content['minutes']:g} minutes each on {content['machine']}, the demo's trunk from the same "
            f"random weights: steps of {batch} samples, {steps}. Held-out x0 errors, one seed:",
            markdown_table(
                [*OPTIMIZERS.values(), "ratio"], [*rows, ["geometric mean", "", "", f"{mean:.2f}"]]
            ),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0, help="of each training")
    parser.add_argument("--scenes", type=int, default=SHIPPED.scenes)
    parser.add_argument("--channels", type=int, nargs=3, default=SHIPPED.channels)
    parser.add_argument("--errors-of", type=int, default=300, help="held-out scenes")
    options = parser.parse_args(arguments)
    pipe = HybridPipeline.from_pretrained(experts_path())
    recipe = dataclasses.replace(
        default_recipe(large=False), scenes=options.scenes, channels=tuple(options.channels)
    )
    study = Study(options.work_dir, recipe, pipe, steps=1)
    scenes = SceneSet(options.work_dir / "scenes", options.errors_of, HELD_OUT_FIRST)
    scenes.render()
    held = HeldOutLatents(pipe, HeldOut(scenes, options.errors_of), options.errors_of)
    drawn, latents, states, text = study.data()
    images = latent_images("trunk", drawn, latents)

    def learner(unet: ModelMixin) -> ExpertTask:
        return expert_task("trunk", unet, images, states, text)

    found = {name: measure(study, learner, held, name, options.minutes) for name in OPTIMIZERS}
    content = {"machine": environment()["machine"], "minutes": options.minutes, "found": found}
    content |= {"levels": LEVELS, "batch": study.workshop.settings("trunk")["train_batch_size"]}
    (RESULTS / "optimizers.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    made = block(content)
    renew_page(DOCS / "EXPERTS.md", "optimizers", made)
    print(made)


if __name__ == "__main__":
    main()
