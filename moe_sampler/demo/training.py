"""The training loop every stage shares: resumable to the bit, EMA, atomic checkpoints, a log.

Step k's batch and noise follow from (seed, stage name, k) alone, so a run that was killed and continued makes
the same weights as one that was not (on the same machine with the same number of threads).
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage learns: warm-up, then constant, then a cosine over the last share."""

    steps: int
    learning_rate: float
    warmup: int = 100
    decay_share: float = 0.4
    floor: float = 0.02
    weight_decay: float = 0.01
    ema: float = 0.998
    save_every: int = 200

    def rate(self, step: int) -> float:
        """Learning rate of step `step` (0-based)."""
        rate = self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup))
        start = self.steps * (1 - self.decay_share)
        if step > start:
            progress = (step - start) / max(1.0, self.steps - start)
            rate *= self.floor + (1 - self.floor) * 0.5 * (1 + np.cos(np.pi * progress))
        return float(rate)


LOG_EVERY = 20

LossFunction = Callable[[np.random.Generator, torch.Generator, int], tuple[Tensor, dict[str, float]]]
"""(NumPy generator, torch generator, step) -> (loss, numbers to log)."""


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Save as safetensors so that `path` is either absent, the old file or the complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    os.replace(temporary, path)


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    with safe_open(path, framework="pt") as file:
        return {name[len(prefix) :]: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


class Stage:
    """One training stage and its checkpoint `<folder>/<name>.safetensors`.

    Args:
        name: names the checkpoint, the log and the random streams.
        folder: where the checkpoint and `<name>.log` (JSON lines) live.
        model: what is trained; parameters with requires_grad only.
        schedule: length and learning rate.
        seed: seed of everything random.
    """

    def __init__(self, name: str, folder: Path, model: nn.Module, schedule: Schedule, seed: int) -> None:
        self.name, self.folder, self.model, self.schedule, self.seed = (
            name,
            Path(folder),
            model,
            schedule,
            seed,
        )
        self.path = self.folder / f"{name}.safetensors"
        self.trained = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [p for _, p in self.trained], lr=0.0, betas=(0.9, 0.99), weight_decay=schedule.weight_decay
        )
        self.average = {key: p.detach().clone() for key, p in self.trained}
        self.step = 0

    @staticmethod
    def finished(folder: Path, name: str, steps: int) -> bool:
        """Whether the stage's checkpoint exists and has reached `steps`."""
        path = Path(folder) / f"{name}.safetensors"
        if not path.exists():
            return False
        with safe_open(path, framework="pt") as file:
            return int(file.metadata()["step"]) >= steps

    def load(self) -> None:
        """Continue from the checkpoint when there is one."""
        if not self.path.exists():
            return
        with safe_open(self.path, framework="pt") as file:
            self.step = int(file.metadata()["step"])
        weights, self.average = read_tensors(self.path, "model."), read_tensors(self.path, "ema.")
        first, second = read_tensors(self.path, "first."), read_tensors(self.path, "second.")
        if set(weights) != {key for key, _ in self.trained}:
            raise ValueError(
                f"{self.path} belongs to another architecture: delete it or use another work folder"
            )
        with torch.no_grad():
            for key, parameter in self.trained:
                parameter.copy_(weights[key])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": first[key],
                    "exp_avg_sq": second[key],
                }

    def save(self) -> None:
        tensors = {}
        for key, parameter in self.trained:
            tensors[f"model.{key}"], tensors[f"ema.{key}"] = parameter, self.average[key]
            state = self.optimizer.state[parameter]
            tensors[f"first.{key}"], tensors[f"second.{key}"] = state["exp_avg"], state["exp_avg_sq"]
        write_tensors(self.path, tensors, {"step": str(self.step)})

    def load_average(self) -> nn.Module:
        """The model with its averaged weights, for use after training."""
        with torch.no_grad():
            for key, parameter in self.trained:
                parameter.copy_(self.average[key])
        return self.model.eval()

    def run(
        self, loss: LossFunction, stop_at: int | None = None, each_step: Callable[[], None] = lambda: None
    ) -> nn.Module:
        """Train to the schedule's end (or to step `stop_at`) and return the averaged model.

        Args:
            loss: computes one step's loss from that step's generators.
            stop_at: end early, as an interruption would; the checkpoint then holds that step.
            each_step: called before every step; may raise to stop.
        """
        self.load()
        end = self.schedule.steps if stop_at is None else min(stop_at, self.schedule.steps)
        self.model.train()
        recent: list[dict[str, float]] = []
        started = time.monotonic()
        while self.step < end:
            each_step()
            recent.append(self._one_step(loss))
            if self.step % LOG_EVERY == 0 or self.step == end:
                mean = {key: float(np.mean([record[key] for record in recent])) for key in recent[-1]}
                self._log(mean, time.monotonic() - started)
                recent.clear()
            if self.step % self.schedule.save_every == 0 or self.step == end:
                self.save()
        return self.load_average()

    def _one_step(self, loss: LossFunction) -> dict[str, float]:
        rng = np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), self.step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        value, numbers = loss(rng, generator, self.step)
        if not torch.isfinite(value):
            raise FloatingPointError(f"stage {self.name}: the loss is {value.item()} at step {self.step}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_([p for _, p in self.trained], 1.0)
        self.optimizer.step()
        self.step += 1
        # Warm-up of the average: early weights are forgotten quickly.
        decay = min(self.schedule.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                [self.average[key] for key, _ in self.trained], [p for _, p in self.trained], 1 - decay
            )
        return {"loss": float(value.detach()), **numbers}

    def _log(self, numbers: dict[str, float], seconds: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {
            "step": self.step,
            "seconds": round(seconds, 1),
            **{k: round(v, 5) for k, v in numbers.items()},
        }
        with open(self.folder / f"{self.name}.log", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
