"""Measure the demo experts: Sol alone, Lune alone, naive handoff and hybrid, on the same prompts and seeds.

`python -m bench.demo.evaluate WORK_DIR` with the work folder of a training run (for its scenes and the
judge, which is trained there when missing) prints the tables of docs/DEMO.md and saves what it generated.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.demo.errors import HeldOutLatents, crossing, x0_errors
from bench.demo.evaluator import Tally, attributes_right, read, share_right, train_evaluator
from bench.demo.held_out import HELD_OUT_SCENES, HeldOut
from bench.demo.metrics import frechet_distance, high_frequency_ratio, patch_distance
from bench.demo.report import attributes_table, errors_table, measures_table
from moe_sampler import HybridPipeline, plan, sample
from moe_sampler.data.digests import content, fingerprint
from moe_sampler.demo import experts_path
from moe_sampler.demo.attributes import GROUPS, AttributeReader
from moe_sampler.demo.autoencoder import to_model
from moe_sampler.demo.data import HELD_OUT_FIRST, SceneSet, write_array
from moe_sampler.demo.record import RunRecord
from moe_sampler.demo.stages import SHIPPED
from moe_sampler.sampling.paths import VPPath

METHODS = ("sol", "lune", "naive", "hybrid")
STEPS = 20
LEVELS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98)


@torch.no_grad()
def generate(
    pipe: HybridPipeline,
    method: str,
    prompts: list[str],
    seed: int,
    steps: int = STEPS,
    batch: int = 50,
    **settings,
) -> np.ndarray:
    """uint8 [N, 64, 64, 3]; image i of `seed` starts from the same noise whatever the method.

    Args:
        method: one of METHODS. "naive" is the hybrid with the mistake it is often built with: the VP latent
            goes on unscaled, with s = t / 1000.
        settings: as `HybridPipeline.__call__` takes them; every call is full unless they have `reuse`.
    """
    settings = {"reuse": 1, **settings}
    parts = []
    for start in range(0, len(prompts), batch):
        texts = prompts[start : start + batch]
        seeds = [1_000_000 * seed + start + i for i in range(len(texts))]
        if method == "naive":
            latents = _naive(pipe, texts, seeds, steps, **settings)
            images = pipe.decode_latents(latents, "np")
        else:
            images = pipe(
                texts, expert=method, num_inference_steps=steps, seed=seeds, output_type="np", **settings
            ).images
        parts.append(to_bytes(images))
    return np.concatenate(parts)


def _naive(pipe: HybridPipeline, prompts: list[str], seeds: list[int], steps: int, handoff=None, **settings):
    sol, lune = pipe.experts(settings.get("sol_guidance"), settings.get("lune_guidance"), reuse=1)
    right = pipe.plan("hybrid", steps, handoff=handoff, experts=(sol, lune))
    first = next(i for i, step in enumerate(right.steps) if step.calls[0].name == "lune")
    level = right.steps[first].level.noise
    vp = VPPath.linear()
    timestep = vp.nearest_timestep(level)
    early = plan(
        sol, noise_levels=[step.level.noise for step in right.steps[:first]], end=vp.level(timestep).noise
    )
    late = plan(lune, steps=steps - first, start=timestep / 1000)
    cond = {"prompt_embeds": pipe.encode_texts(prompts)}
    uncond = {"prompt_embeds": pipe.encode_texts([""] * len(prompts))}
    side = pipe.unet_sol.config.sample_size
    shape = (len(prompts), pipe.unet_sol.config.in_channels, side, side)
    x = sample(early, sol, shape=shape, seeds=seeds, cond=cond, uncond=uncond)
    return sample(late, lune, x, seeds=seeds, cond=cond, uncond=uncond)


@torch.no_grad()
def reconstruct(vae, pictures: np.ndarray, batch: int = 100) -> np.ndarray:
    """Pictures through the autoencoder and back, uint8."""
    parts = []
    for i in range(0, len(pictures), batch):
        output = vae.decode(vae.encode(to_model(pictures[i : i + batch])).latents).sample
        parts.append(((output.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


@dataclass(frozen=True)
class Referee:
    """What pictures of the held-out prompts are measured by.

    Args:
        judge: reads attributes and gives features.
        test: the prompts' scenes, and the others, whose pictures are the reference.
        reconstructions: uint8 [scenes, 64, 64, 3], all held-out pictures through the autoencoder.
    """

    judge: AttributeReader
    test: HeldOut
    reconstructions: np.ndarray

    @classmethod
    def prepare(
        cls,
        work_dir: Path,
        vae,
        count: int = 300,
        scenes: int = HELD_OUT_SCENES,
        trained: int | None = None,
    ) -> Referee:
        """Render the held-out scenes and train the judge, or load both from a training run's work folder.

        trained: scenes that the judge is trained on; default: those of the run.
        """
        held_out = SceneSet(work_dir / "scenes", scenes, HELD_OUT_FIRST)
        held_out.render()
        if trained is None:
            record = RunRecord.read(work_dir)
            trained = SHIPPED.scenes if record is None or record.scenes is None else record.scenes
        judge = train_evaluator(SceneSet(work_dir / "scenes", trained), work_dir / "checkpoints")
        return cls(judge, HeldOut(held_out, count), reconstruct(vae, held_out.pictures[:, 0]))

    @cached_property
    def prompts(self) -> list[str]:
        return self.test.prompts()[0]

    @property
    def real(self) -> dict[str, np.ndarray]:
        """The prompts' own pictures, as drawn and through the autoencoder: what could be reached."""
        count = self.test.count
        return {
            "renders": self.test.scenes.pictures[:count, 0],
            "reconstructions": self.reconstructions[:count],
        }

    @cached_property
    def _features(self) -> np.ndarray:
        return read(self.judge, self._reference)[0]

    @property
    def _reference(self) -> np.ndarray:
        return self.reconstructions[self.test.count :]

    def measure(self, images: np.ndarray) -> dict[str, float]:
        """All numbers of one set of pictures, uint8 [count, 64, 64, 3], one a prompt."""
        own, classes = read(self.judge, images)
        tally = self._tally(classes)
        return {
            "attributes": share_right(tally),
            **{group: share_right(tally, group) for group in GROUPS},
            "frechet": frechet_distance(own, self._features),
            "high_frequencies": high_frequency_ratio(images, self._reference),
            "patches": patch_distance(images, self._reference),
        }

    def by_attribute(self, images: np.ndarray) -> Tally:
        """What of each attribute that the prompts mention the pictures show, uint8 [count, 64, 64, 3]."""
        return self._tally(read(self.judge, images)[1])

    def _tally(self, classes: dict[str, np.ndarray]) -> Tally:
        scenes = [self.test.scenes.scene(i) for i in range(self.test.count)]
        return attributes_right(classes, scenes, self.test.prompts()[1])


def kept(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array of the file, made and written where it isn't there."""
    if not path.exists():
        write_array(path, make())
    return np.load(path)


def to_bytes(images: Any) -> np.ndarray:
    """uint8 of the same shape, from a pipeline's arrays in [0, 1]."""
    return (np.asarray(images) * 255).round().astype(np.uint8)


def painter(experts: Path) -> HybridPipeline:
    """A quick pipeline that shows no bars."""
    pipe = HybridPipeline.from_pretrained(experts, speed="fast")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(
    work_dir: Path,
    experts: Path,
    prompts: list[str],
    methods: tuple[str, ...] = METHODS,
    seeds: tuple[int, ...] = (0, 1, 2),
) -> dict[str, list[np.ndarray]]:
    """By method the pictures of each seed, as `generate` makes them.

    They are kept below `work_dir`/evaluation, in a folder of these experts, and read from there again.
    """
    files = sorted(path for path in experts.rglob("*") if path.is_file())
    own = fingerprint([[str(path.relative_to(experts)), content(path)] for path in files])
    folder = work_dir / "evaluation" / own[:16]
    folder.mkdir(parents=True, exist_ok=True)
    pipe = painter(experts)
    return {
        method: [
            kept(
                folder / f"{method}-{seed}.npy",
                lambda method=method, seed=seed: generate(pipe, method, prompts, seed),
            )
            for seed in seeds
        ]
        for method in methods
    }


def evaluate(
    work_dir: Path, experts: Path, methods: tuple[str, ...] = METHODS, seeds: tuple[int, ...] = (0, 1, 2)
) -> dict:
    """Everything in docs/DEMO.md's tables."""
    pipe = HybridPipeline.from_pretrained(experts)
    referee = Referee.prepare(work_dir, pipe.vae)
    pictures = {name: [images] for name, images in referee.real.items()}
    pictures |= paint(work_dir, experts, referee.prompts, methods, seeds)
    table = {method: [referee.measure(images) for images in sets] for method, sets in pictures.items()}
    tallies = {method: [referee.by_attribute(images) for images in sets] for method, sets in pictures.items()}
    errors = x0_errors(pipe, HeldOutLatents(pipe, referee.test), LEVELS)
    return {"table": table, "by_attribute": tallies, "x0_errors": errors, "crossing": crossing(errors)}


def main(work_dir: Path, experts: Path) -> None:
    """Print the tables, and keep the numbers as evaluation/result.json in the work folder."""
    result = evaluate(work_dir, experts)
    (work_dir / "evaluation" / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    tables = measures_table(result["table"]), attributes_table(result["by_attribute"])
    print(*tables, errors_table(result["x0_errors"]), sep="\n\n")
    print(f"\nThe errors cross at s = {result['crossing']}.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else experts_path())
