"""Two specialists, or one model for all noise levels? Trained side by side from nothing, with several seeds.

`python -m bench.demo.controls WORK_DIR` renders scenes (or takes those of a training run's work folder), puts
them through the shipped VAE and text encoder, and trains for every seed

    Sol and Lune     as the demo's, each for as many steps
    another Sol      that learns nothing but full pictures where there is most noise: two thirds of its time
                     above s = 0.8
    one model        of their size, on all levels, for as long as both together; pictures also of half-way
    a large model    of twice the parameters, likewise; a call of it costs about twice as much

all from random weights, at a constant learning rate with averaged weights, and measures them several times on
the way: held-out x0 errors over the noise levels, and at the end pictures, at equal model calls, by the judge
of `bench.demo.evaluate`. The hybrid hands over where its two errors cross. It writes
bench/results/<name>.json and .png and renews the tables of docs/DEMO.md by that name. It can be stopped and
run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import ModelMixin

from bench.demo.errors import HeldOutLatents, crossing
from bench.demo.evaluate import Referee, generate, kept
from bench.demo.report import MEASURES, markdown_table, measured
from bench.pages import DOCS, renew_page
from bench.report import RESULTS
from moe_sampler import HybridPipeline
from moe_sampler.demo import experts_path
from moe_sampler.demo.autoencoder import encode_all
from moe_sampler.demo.data import SceneSet
from moe_sampler.demo.experts import (
    OBJECTIVES,
    StageObjective,
    encode_texts,
    expert_task,
    latent_images,
    new_unet,
)
from moe_sampler.demo.scene_task import run_stage
from moe_sampler.demo.stages import SHIPPED, Recipe, Workshop, default_recipe
from moe_sampler.demo.weights import fill
from moe_sampler.expert_training import LevelSettings, TextStates

NOISY = 0.8
"""From this level on a run decides where things are; about there two experts hand over."""
LEVELS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)


@dataclass(frozen=True)
class Model:
    """What is trained.

    stage: of the demo's training, whose pictures it sees. share: of the steps, in those of one specialist.
    width: of its layers, over the demo's. learns: what, if not what that stage does.
    """

    stage: str
    share: int
    width: float = 1.0
    learns: StageObjective | None = None

    @property
    def predicts_v(self) -> bool:
        return (self.learns or OBJECTIVES[self.stage])[0] == "sol"


MODELS = {
    "sol": Model("sol", 1),
    "noisy": Model("trunk", 1, learns=("sol", LevelSettings(density="shifted", shift=8.0), 0.0)),
    "lune": Model("lune", 1),
    "one": Model("trunk", 2),
    "large": Model("trunk", 2, math.sqrt(2)),
}


class Contender(NamedTuple):
    """early, late: of MODELS, who works above the handoff and below it."""

    title: str
    early: str
    late: str


CONTENDERS = {
    "hybrid": Contender("Sol and Lune", "sol", "lune"),
    "levels": Contender("two by level alone", "noisy", "lune"),
    "one": Contender("one model", "one", "one"),
    "large": Contender("a large model", "large", "large"),
}
OTHERS = [name for name in CONTENDERS if name != "one"]
"""What is set beside one model."""


@dataclass(frozen=True)
class Study:
    """Where it lies, how long it is, and what is trained on.

    steps: of a specialist. parts: how often it is measured on the way.
    """

    folder: Path
    recipe: Recipe
    pipe: HybridPipeline
    steps: int
    parts: int = 4
    device: str = "cpu"

    @property
    def workshop(self) -> Workshop:
        return Workshop(self.folder, recipe=self.recipe, device=self.device)

    def lengths(self, model: Model) -> list[int]:
        """Steps after which a model is measured."""
        return [self.steps * model.share * part // self.parts for part in range(1, self.parts + 1)]

    def unet(self, model: Model, seed: int) -> ModelMixin:
        """Untrained; widths are whole groups of the normalisation."""
        channels = tuple(8 * round(width * model.width / 8) for width in self.recipe.channels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return new_unet(channels)  # pyright: ignore[reportArgumentType] - three of them

    def data(self) -> tuple[SceneSet, np.ndarray, np.ndarray, TextStates]:
        """Scenes, their latents and texts' states, by the shipped VAE and text encoder, and the latter."""
        shop, pipe, device = self.workshop, self.pipe, self.device
        own = self.folder / "controls"
        own.mkdir(parents=True, exist_ok=True)
        self._claim(own / "study.json")
        scenes, text = shop.scenes(), TextStates(pipe.text_encoder, shop.tokenizer())
        scenes.render()
        factor = np.float32(pipe.vae.config["scaling_factor"])
        latents = kept(
            own / "latents.npy", lambda: encode_all(pipe.vae, scenes.pictures, device=device) * factor
        )
        states = kept(own / "states.npy", lambda: encode_texts(scenes, text, device=device))
        pipe.vae.to("cpu")
        pipe.text_encoder.to("cpu")
        return scenes, latents, states, text

    def _claim(self, path: Path) -> None:
        """Raises a ValueError where another study lies."""
        sizes = {"scenes": self.recipe.scenes, "channels": list(self.recipe.channels)}
        if not path.exists():
            path.write_text(json.dumps(sizes), encoding="utf-8")
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != sizes:
            raise ValueError(
                f"{path.parent} holds a study with {found}, not {sizes}: use another work folder"
            )

    def weights(self, name: str, seed: int, steps: int) -> Path:
        return self.folder / "controls" / f"{name}-{seed}" / f"{steps}.safetensors"

    def train(self, seeds: Sequence[int]) -> None:
        """Everything that isn't there."""
        scenes, latents, states, text = self.data()
        for seed in seeds:
            for name, model in MODELS.items():
                data = latent_images(model.stage, scenes, latents)
                for steps in self.lengths(model):
                    path = self.weights(name, seed, steps)
                    if path.exists():
                        continue
                    unet = self.unet(model, seed)
                    task = expert_task(model.stage, unet, data, states, text, model.learns)
                    run_stage(task, path.parent, seed, self._settings(model, steps))
                    shutil.move(path.parent / f"{model.stage}.safetensors", path)
                    print(f"{name}, seed {seed}: {steps} steps", flush=True)

    def _settings(self, model: Model, steps: int) -> dict[str, Any]:
        found = self.workshop.settings("trunk") | {"optimizer": "adamw"}  # one learning rate for all
        constant = {"lr_scheduler": "constant_with_warmup", "lr_decay_steps": 0, "lr_floor": 0.0}
        return found | constant | {"max_train_steps": steps}

    def trained(self, name: str, seed: int, part: int) -> ModelMixin:
        """A model as it was at a measurement, from 0."""
        model = MODELS[name]
        path = self.weights(name, seed, self.lengths(model)[part])
        return fill(self.unet(model, seed), path)

    def contender(self, name: str, seed: int, part: int) -> HybridPipeline:
        """One of CONTENDERS as it was at a measurement, from 0."""
        _, early, late = CONTENDERS[name]
        models = {model: self.trained(model, seed, part) for model in {early, late}}
        made = HybridPipeline.from_pipe(self.pipe, unet_sol=models[early], unet_lune=models[late])
        made.set_progress_bar_config(disable=True)
        return made


def own_errors(sol: Sequence[float], lune: Sequence[float]) -> tuple[list[float], float | None]:
    """By level the error of whichever of the two works there, and where they hand over."""
    rows = [{"s": s, "sol": a, "lune": b} for s, a, b in zip(LEVELS, sol, lune, strict=True)]
    handoff = crossing(rows)
    early = [handoff is not None and s > handoff for s in LEVELS]
    return [a if first else b for first, a, b in zip(early, sol, lune, strict=True)], handoff


def measure_errors(study: Study, held: HeldOutLatents, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A row a seed, measurement and contender: errors by level and, of two models, where they hand over."""
    rows = []
    for seed in seeds:
        for part, steps in enumerate(study.lengths(Model("", 2))):
            of = {}
            for name, model in MODELS.items():
                unet = study.trained(name, seed, part)
                error = held.sol_error if model.predicts_v else held.lune_error
                of[name] = [error(unet, s) for s in LEVELS]
            for name, (_, early, late) in CONTENDERS.items():
                errors, handoff = (of[late], None) if early == late else own_errors(of[early], of[late])
                row = {"seed": seed, "steps": steps, "part": part, "contender": name}
                rows.append(row | {"errors": errors, "handoff": handoff})
    return rows


def measure_pictures(
    study: Study, referee: Referee, seeds: Sequence[int], rows: Sequence[dict[str, Any]], steps: int
) -> dict[str, list[dict[str, float]]]:
    """By contender, a mapping a seed, of the fully trained ones and of one model about half-way."""
    found: dict[str, list[dict[str, float]]] = {}
    handoffs = {(row["contender"], row["seed"]): row["handoff"] for row in rows}  # of the last measurement
    for seed in seeds:
        shown = {own.title: (name, study.parts - 1) for name, own in CONTENDERS.items()}
        half = (study.parts - 1) // 2
        shown[f"one model after {study.lengths(MODELS['one'])[half]:,} steps"] = ("one", half)
        for title, (name, part) in shown.items():
            handoff = handoffs[name, seed]
            two: dict[str, Any] = {} if handoff is None else {"handoff": handoff}
            trained = study.lengths(MODELS["one"])[part]
            images = kept(
                study.folder / "controls" / f"{name}-{seed}-{trained}-{len(referee.prompts)}-{steps}.npy",
                lambda name=name, part=part, two=two, seed=seed: generate(
                    study.contender(name, seed, part),
                    "hybrid" if two else "lune",
                    referee.prompts,
                    seed,
                    steps,
                    **two,
                ),
            )
            found.setdefault(title, []).append(referee.measure(images))
    return found


def _errors(rows: Sequence[dict[str, Any]], name: str, part: int) -> np.ndarray:
    """[seeds, levels], of a contender at a measurement."""
    return np.array([row["errors"] for row in rows if (row["contender"], row["part"]) == (name, part)])


def _ratios(rows: Sequence[dict[str, Any]], name: str, part: int, of: slice) -> np.ndarray:
    """[seeds]: geometric means over the levels of a contender's errors, over those of one model."""
    return np.exp(np.log(_errors(rows, name, part) / _errors(rows, "one", part))[:, of].mean(1))


def _ranges() -> dict[str, slice]:
    """Of LEVELS."""
    first = next(i for i, s in enumerate(LEVELS) if s >= NOISY)
    return {f"s ≥ {NOISY}": slice(first, None), f"s < {NOISY}": slice(0, first)}


def errors_over_time(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: the held-out errors over one model's, by the steps that both have had together."""
    lines = []
    for part, steps in sorted({(row["part"], row["steps"]) for row in rows}):
        cells = [_spread(_ratios(rows, name, part, own)) for name in OTHERS for own in _ranges().values()]
        lines.append([f"{steps:,} steps", *cells])
    return markdown_table(
        [f"{CONTENDERS[name].title}, {where}" for name in OTHERS for where in _ranges()], lines
    )


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The ratios over the steps, at noisy levels and at others, and by level at the end; PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    *over_time, by_level = figure.subplots(1, 3)
    parts = sorted({(row["part"], row["steps"]) for row in rows})
    for axes, (where, own) in zip(over_time, _ranges().items(), strict=True):
        for name in OTHERS:
            values = [_ratios(rows, name, part, own) for part, _ in parts]
            spread = [found.std(ddof=1) if len(found) > 1 else 0.0 for found in values]
            means, steps = [found.mean() for found in values], [steps for _, steps in parts]
            axes.errorbar(
                steps, means, spread, marker="o", markersize=4, capsize=2, label=CONTENDERS[name].title
            )
        axes.set_title(f"held-out x0 error over one model's, {where}")
        axes.set_xlabel("training steps, of all models together")
    for name in OTHERS:
        found, one = (_errors(rows, which, parts[-1][0]).mean(0) for which in (name, "one"))
        by_level.plot(LEVELS, found / one, marker="o", markersize=4)
    by_level.set_title("at the end, by noise level")
    by_level.set_xlabel("share of noise")
    for axes in figure.axes:
        axes.axhline(1.0, color="#333333", linewidth=1, label=CONTENDERS["one"].title)
        axes.grid(alpha=0.3)
    over_time[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def block(
    study: Study,
    settings: Mapping[str, Any],
    rows: Sequence[dict[str, Any]],
    pictures: Mapping[str, Sequence[dict[str, float]]],
) -> str:
    """What docs/DEMO.md shows."""
    one, large = (
        sum(parameter.numel() for parameter in study.unet(MODELS[name], 0).parameters()) / 1e6
        for name in ("one", "large")
    )
    batch = study.workshop.settings("trunk")["train_batch_size"]
    last = max(row["part"] for row in rows)
    end = [row for row in rows if row["part"] == last and row["handoff"] is not None]
    found = {name: [row["handoff"] for row in end if row["contender"] == name] for name in CONTENDERS}
    at = " and ".join(f"{np.mean(own):.2f} ({CONTENDERS[name].title})" for name, own in found.items() if own)
    return "\n\n".join(
        [
            f"Sol, Lune and the one model have {one:.2f} million parameters each, the large one {large:.2f}; "
            f"{study.steps:,} steps for each of the two, {2 * study.steps:,} for the others, of {batch} of "
            f"{study.recipe.scenes:,} scenes; {settings['seeds']} training seeds, mean ± standard deviation.",
            "Held-out x0 errors over those of one model, geometric means over noise levels, by the steps of "
            "all of a contender's models together:",
            errors_over_time(rows),
            f"Pictures of {settings['count']} held-out prompts at the end, {settings['sampling_steps']} "
            f"steps{at and f', with handoffs at {at}'}, measured as above but by a judge of their own:",
            markdown_table(MEASURES, ([title, *measured(runs)] for title, runs in pictures.items())),
        ]
    )


def report(study: Study, content: Mapping[str, Any]) -> None:
    """bench/results/<name>.json and .png, and the part of docs/DEMO.md by this name."""
    name = content["settings"]["name"]
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draw(content["errors"], RESULTS / f"{name}.png")
    made = block(study, content["settings"], content["errors"], content["pictures"])
    renew_page(DOCS / "DEMO.md", name.replace("_", " "), made)
    print(made)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    pipe = HybridPipeline.from_pretrained(experts_path())
    channels: Any = tuple(options.channels)
    own = default_recipe(large=options.device == "cuda")
    recipe = dataclasses.replace(own, scenes=options.scenes, channels=channels)
    study = Study(options.work_dir, recipe, pipe, options.steps, options.parts, options.device)
    seeds = range(options.seeds)
    study.train(seeds)
    referee = Referee.prepare(options.work_dir, pipe.vae, options.count, trained=options.scenes)
    rows = measure_errors(study, HeldOutLatents(pipe, referee.test, options.errors_of), seeds)
    pictures = measure_pictures(study, referee, seeds, rows, options.sampling_steps)
    settings = {key: value for key, value in vars(options).items() if key != "work_dir"}
    report(study, {"settings": settings, "levels": LEVELS, "errors": rows, "pictures": pictures})


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--name", default="controls", help="of the results; controls_... for another study")
    parser.add_argument("--steps", type=int, default=1000, help="of a specialist")
    parser.add_argument("--parts", type=int, default=4, help="measurements on the way")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=SHIPPED.scenes)
    parser.add_argument("--channels", type=int, nargs=3, default=SHIPPED.channels, help="of a specialist")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="that trains")
    parser.add_argument("--count", type=int, default=300, help="prompts")
    parser.add_argument("--errors-of", type=int, default=300, help="held-out scenes for the x0 errors")
    parser.add_argument("--sampling-steps", type=int, default=20)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
