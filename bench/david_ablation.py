"""Does David help? Sol trained with and without it, from the same weights, in equally many steps.

`python -m bench.david_ablation OUTPUT` trains both ways with every seed on the demo's scenes
and prints the held-out errors at each noise level. A seed is a start and an order of the data and the noise,
the same for both. Stopped, it continues when called again; what is finished is not computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_sampler.data.scenes import DemoScenes
from moe_sampler.demo import experts_path
from moe_sampler.expert_training.run import load_base, new_task, train_expert
from moe_sampler.expert_training.settings import DavidSettings, ExpertSettings, RunSettings
from moe_sampler.training.trainer import Interrupted
from moe_sampler.training.training_settings import TrainingSettings

__all__ = ["ablation_table", "fill_page", "run_ablation"]

ARMS = {"without David": False, "with David": True}
STRUCTURE_BELOW = 0.65
"""As the demo's Sol was trained."""
_BEGIN, _END = "<!-- measured: david -->", "<!-- end: david -->"

Results = dict[str, list[dict[str, float]]]
"""By arm, in the order of the seeds, what validation said."""


def run_ablation(
    output: Path,
    *,
    steps: int = 1500,
    seeds: tuple[int, ...] = (0, 1, 2),
    scenes: int = 4000,
    held_out: int = 256,
    batch: int = 24,
    quiet: bool = False,
) -> Results:
    """Train every arm with every seed in `output`, or continue, and return what validation said.

    Args:
        output: a folder a run, the encoded scenes, and results.json.
        steps: of every run.
        seeds: one pair of runs each.
        scenes: the demo's, the last `held_out` of which are for validation.
        held_out: scenes to measure on.
        batch: samples a step.
        quiet: no progress bars.

    Raises:
        Interrupted: after SIGTERM or Ctrl-C, with a checkpoint saved.
        ValueError: `output` holds an ablation of other sizes.
    """
    sizes = {"steps": steps, "scenes": scenes, "held_out": held_out, "batch": batch}
    file = output / "results.json"
    done = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"sizes": sizes, "runs": {}}
    if done["sizes"] != sizes:
        raise ValueError(f"{output} holds an ablation with {done['sizes']}: use another folder")
    output.mkdir(parents=True, exist_ok=True)
    results: Results = {arm: [] for arm in ARMS}
    for seed in seeds:
        for arm, enabled in ARMS.items():
            name = f"{arm.replace(' ', '-').lower()}-{seed}"
            if name not in done["runs"]:
                settings = _settings(output / name, steps, batch, seed, held_out, enabled)
                base = load_base(experts_path(), "new", "sol", seed)
                # diffusers' own `to` is a wrapper without a signature.
                base.unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
                task = new_task("sol", DemoScenes(scenes), base, settings, latents_dir=output)
                done["runs"][name] = train_expert(task, settings, quiet=quiet)["validation"]
                partial = file.with_suffix(".partial")
                partial.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
                partial.replace(file)
            results[arm].append(done["runs"][name])
    return results


def _settings(folder: Path, steps: int, batch: int, seed: int, held_out: int, enabled: bool) -> RunSettings:
    training = TrainingSettings(
        output_dir=folder,
        max_train_steps=steps,
        train_batch_size=batch,
        learning_rate=1.5e-3,
        lr_scheduler="warmup_stable_decay",
        lr_warmup_steps=min(100, steps // 4),
        lr_decay_steps=2 * steps // 5,
        lr_floor=0.02,
        ema_decay=0.998,
        seed=seed,
        checkpointing_steps=100,
        checkpoints_total_limit=1,
        validation_steps=0,
        sample_steps=0,
        report_to="none",
    )
    expert = ExpertSettings(held_out=held_out, structure_below=STRUCTURE_BELOW, num_validation_images=0)
    return RunSettings(training, expert=expert, david=DavidSettings(use_david=enabled))


def ablation_table(results: Results) -> str:
    """Markdown: a row a noise level, means over seeds ± standard deviation between them.

    The last column is the mean of the seeds' own differences, which share start, data and noise.
    """
    without, with_ = (np.array([list(run.values()) for run in results[arm]]) for arm in ARMS)
    names = [name.replace("x0_error/", "x0 error at s = ") for name in results[next(iter(ARMS))][0]]
    names = ["v error, mean over the levels" if name == "loss" else name for name in names]
    change = 100 * (with_ / without - 1)
    lines = [f"| | {' | '.join(ARMS)} | change |", "|---|---|---|---|"]
    for i, name in enumerate(names):
        cells = [_spread(values[:, i], "{:.5f}") for values in (without, with_)]
        lines.append(f"| {name} | {' | '.join(cells)} | {_spread(change[:, i], '{:+.2f}')} % |")
    return "\n".join(lines)


def _spread(values: np.ndarray, form: str) -> str:
    mean = form.format(values.mean())
    return mean if len(values) < 2 else f"{mean} ± {form.replace('+', '').format(values.std(ddof=1))}"


def fill_page(page: Path, text: str) -> None:
    """Put `text` between the page's markers.

    Raises:
        ValueError: the page has no such markers.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{page} has no {_BEGIN} ... {_END}")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def _summary(results: Results, steps: int, scenes: int, held_out: int, batch: int) -> str:
    runs = len(next(iter(results.values())))
    return (
        f"{steps} steps of {batch} samples each from the same new weights, {scenes - held_out} scenes to "
        f"train on, {held_out} held out; mean ± standard deviation of {runs} seeds. Below s = "
        f"{STRUCTURE_BELOW} on structure pictures, as Sol is trained.\n\n{ablation_table(results)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.david_ablation", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("output", type=Path, help="folder for the runs; kept for resuming")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--minutes", type=float, help="save and stop after so long; call again to continue")
    parser.add_argument("--page", type=Path, help="a page whose table is replaced, such as docs/EXPERTS.md")
    given: dict[str, Any] = vars(parser.parse_args())
    minutes, page, output = given.pop("minutes"), given.pop("page"), given.pop("output")
    if minutes is not None:
        timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
    try:
        results = run_ablation(output, **{**given, "seeds": tuple(given["seeds"])})
    except Interrupted as stopped:
        parser.exit(1, f"{stopped}\n")
    sizes = {name: given[name] for name in ("steps", "scenes", "held_out", "batch")}
    summary = _summary(results, **sizes)
    (output / "ablation.md").write_text(summary + "\n", encoding="utf-8")
    if page is not None:
        fill_page(page, summary)
    print(summary)


if __name__ == "__main__":
    main()
