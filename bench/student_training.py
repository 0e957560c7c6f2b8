"""Training the student: the trainer's steps beside a plain PyTorch loop with the same model.

The plain loop is what one writes for a student of this kind: corrupt, call the model, add up the losses, step
the optimizer, average the weights. It has no noise by sample, no checkpoints, no log.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import CLIPTextModel

from bench.measure import DEVICE, OURS, TURNS, Call, environment, interleave
from moe_sampler import DemoScenes, HybridPipeline
from moe_sampler.demo import experts_path
from moe_sampler.tinyflux import (
    ExpertFeatures,
    StudentEncoders,
    Teachers,
    TextEncoder,
    at_time,
    build_cache,
)
from moe_sampler.tinyflux.training.run import new_task
from moe_sampler.tinyflux.training.settings import (
    DataSettings,
    ModelSettings,
    StudentSettings,
    TeacherSettings,
)
from moe_sampler.tinyflux.training.task import StudentTask
from moe_sampler.training import Trainer, TrainingSettings
from moe_sampler.training.interrupts import Interrupts

SUITE = "student training"
BATCH, SAMPLES, STEPS = 16, 64, 1000


def _settings(folder: Path, cache: Path, teachers: Literal["cached", "live"], batch: int) -> StudentSettings:
    return StudentSettings(
        training=TrainingSettings(
            output_dir=folder, max_train_steps=STEPS, train_batch_size=batch, report_to="none"
        ),
        data=DataSettings((cache,), held_out=0),
        model=ModelSettings(preset="demo"),
        teachers=TeacherSettings(features=teachers),
    )


def _ours(settings: StudentSettings) -> tuple[StudentTask, Call]:
    task = new_task(settings)
    trainer = Trainer(task, settings.training, quiet=True)
    batches, noted = iter(trainer.loader()), Interrupts()
    return task, lambda: trainer.make_step(batches, 1e-4, noted)


def _plain(settings: StudentSettings) -> tuple[StudentTask, Call]:
    task = new_task(settings)
    model, objective = task.model.to(DEVICE).train(), settings.objective
    count = settings.training.train_batch_size
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, betas=(0.9, 0.99), weight_decay=0.01)
    averages = [p.detach().clone() for p in model.parameters()]
    batches = itertools.chain.from_iterable(
        DataLoader(task.data, count, shuffle=True) for _ in itertools.count()
    )
    experts = None
    if settings.teachers.features == "live":
        pipe = HybridPipeline.from_pretrained(experts_path(), dtype=torch.float32).to(DEVICE)
        experts = ExpertFeatures.from_pipeline(pipe)
    prior = model.sol_prior
    assert prior is not None  # the demo's student has one
    buckets = torch.tensor([(5 + 10 * i) / 100 for i in range(10)], device=DEVICE)

    def taught(batch: dict[str, Any], t: torch.Tensor) -> list[torch.Tensor]:
        if experts is None:
            return [at_time(batch[name], buckets, t).float() for name in ("lune", "sol_stats", "sol_maps")]
        seeds = torch.randint(2**31, (count,))
        found = experts(batch["latents"].float(), list(batch["caption"]), seeds=seeds, t=t[:, None])
        return [part[:, 0] for part in found if part is not None]

    def step() -> None:
        batch = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in next(batches).items()}
        x0 = batch["latents"].float()
        t = torch.sigmoid(torch.randn(count, device=DEVICE))
        noise = torch.randn_like(x0)
        x = torch.lerp(noise, x0, t[:, None, None, None])
        lune, stats, maps = taught(batch, t)
        fed = torch.rand(count, device=DEVICE) < objective.feature_input
        out = model(
            x.flatten(2).transpose(1, 2),
            batch["prompt_embeds"],
            batch["pooled_prompt_embeds"],
            t,
            encoder_attention_mask=batch["prompt_mask"],
            drop_text=torch.rand(count, device=DEVICE) < 0.1,
            lune_features=lune,
            lune_mask=fed,
            sol_stats=stats,
            sol_spatial=maps,
            sol_mask=fed,
        )
        loss = F.mse_loss(out.sample, (x0 - noise).flatten(2).transpose(1, 2))
        loss = loss + objective.lune_weight * (1 - F.cosine_similarity(out.lune_pred, lune).mean())
        loss = loss + objective.sol_stats_weight * F.mse_loss(out.pred_stats, stats)
        scaled = prior.scaled(maps)
        loss = loss + objective.sol_map_weight * F.mse_loss(out.pred_spatial, scaled)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages, list(model.parameters()), 1e-3)
        if not torch.isfinite(loss).item():
            raise ArithmeticError("the loss is not finite")

    return task, step


@contextmanager
def _inside(task: StudentTask) -> Iterator[list[float]]:
    """Seconds within passes, of one within another the outer counts: from the student's input through the
    losses to its last gradient, and of the experts and their text encoder."""
    taken: list[float] = []
    depth = 0
    entered = 0.0

    def enter() -> None:
        nonlocal depth, entered
        _wait()
        if depth == 0:
            entered = time.perf_counter()
        depth += 1

    def leave() -> None:
        nonlocal depth
        _wait()
        depth -= 1
        if depth == 0:
            taken.append(time.perf_counter() - entered)

    def passing(call: Callable[..., Any], begins: bool = True, ends: bool = True) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if begins:
                enter()
            result = call(*args, **kwargs)
            if ends:
                leave()
            return result

        return wrapper

    places = [
        (task.model, "forward", {"ends": False}),
        (torch.Tensor, "backward", {"begins": False}),
        (ExpertFeatures, "__call__", {}),
        (CLIPTextModel, "forward", {}),
    ]
    own = [(place, name, getattr(place, name)) for place, name, _ in places]
    for place, name, part in places:
        setattr(place, name, passing(getattr(place, name), **part))
    try:
        yield taken
    finally:
        for place, name, call in own:
            setattr(place, name, call)


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _outside(task: StudentTask, step: Call, steps: int) -> float:
    """Share of a step outside all passes, the median of several steps."""
    shares = []
    for _ in range(steps):
        with _inside(task) as taken:
            start = time.perf_counter()
            step()
            _wait()
            shares.append(1 - sum(taken) / (time.perf_counter() - start))
    return float(np.median(shares))


def rows(
    kinds: Sequence[Literal["cached", "live"]] = ("cached", "live"),
    seconds: float = 40.0,
    turns: tuple[int, int] = TURNS,
    batch: int = BATCH,
    samples: int = SAMPLES,
) -> list[dict[str, object]]:
    """A row a loop, with cached and with live teachers. seconds, turns: of each kind."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipe = HybridPipeline.from_pretrained(experts_path(), dtype=torch.float32).to(DEVICE)
        encoders = StudentEncoders(pipe.vae, TextEncoder(pipe.text_encoder, pipe.tokenizer))
        teachers = Teachers.from_pipeline(pipe)
        build_cache(folder / "cache", DemoScenes(samples), encoders, teachers, height=64, width=64)
        for kind in kinds:
            loops = {
                OURS: _ours(_settings(folder / kind, folder / "cache", kind, batch)),
                "plain loop": _plain(_settings(folder / f"plain-{kind}", folder / "cache", kind, batch)),
            }
            taken = interleave({name: step for name, (_, step) in loops.items()}, seconds, turns)
            for provider, (task, step) in loops.items():
                median = np.median(taken[provider])
                found.append(
                    {
                        "suite": SUITE,
                        "teachers": kind,
                        "batch": batch,
                        "provider": provider,
                        "steps_per_s": f"{1 / median:.2f}",
                        "times_ours": f"{median / np.median(taken[OURS]):.2f}",
                        "outside_passes": f"{_outside(task, step, turns[0] + 2):.2%}",
                        "rounds": len(taken[provider]),
                        **environment(),
                    }
                )
    return found
