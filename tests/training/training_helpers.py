"""A task that trains in milliseconds and exercises the whole trainer."""

from __future__ import annotations

import os
import signal
import zlib
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from moe_sampler.kernels import flow_training_pair
from moe_sampler.training import Losses, Trainer, TrainingSettings


class Tiny(ModelMixin, ConfigMixin):
    """A denoiser of points in the plane, with dropout and a scalar parameter."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, width: int = 16, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, 2))
        self.gain = nn.Parameter(torch.ones(()))
        self.unused = nn.Parameter(torch.zeros(2))
        self.register_buffer("offset", torch.zeros(2))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.gain * self.layers(torch.cat([x, sigma[:, None]], 1)) + self.offset


class Points:
    """Learns the flow velocity of points on a circle.

    Args:
        poison: samples whose loss is NaN.
        hook: called with the step before its loss.
    """

    name = "points"
    weights_name = "model.safetensors"

    def __init__(self, count: int = 50, dropout: float = 0.1, poison=(), hook=lambda step: None) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.model = Tiny(dropout=dropout)
        angle = torch.arange(count) * 2.399
        self.data = TensorDataset(torch.stack([angle.cos(), angle.sin()], 1), torch.arange(count))
        self.poison, self.hook = set(poison), hook
        self.seen: list[list[int]] = []

    def loss(self, model, batch, draws) -> Losses:
        self.hook(draws.step)
        x0, index = batch
        self.seen.append(index.tolist())
        sigma = draws.stratified("time").float()
        pair = flow_training_pair(x0, sigma, seeds=draws.seeds("noise"))
        per_sample = (model(pair.noisy, sigma) - pair.target).square().mean(1)
        poisoned = torch.tensor([int(i) in self.poison for i in index], device=x0.device)
        per_sample = torch.where(poisoned, torch.nan, per_sample)
        loss = per_sample.mean()
        return Losses(loss, {"velocity": loss.detach()}, per_sample.detach(), sigma)

    def validate(self, model) -> dict[str, float]:
        x = torch.ones(4, 2, device=next(model.parameters()).device)
        return {"loss": float(model(x, 0.5 * x[:, 0]).square().mean())}

    def samples(self, model) -> list[Image.Image]:
        torch.rand(3)  # must not disturb the run
        return [Image.new("RGB", (8, 8), (10 * i, 0, 0)) for i in range(3)]

    def describe(self) -> dict:
        return {"data": "points on a circle", "count": len(self.data), "tags": ["toy"]}


class Late(Points):
    """One of whose parameters is trained from the tenth step on."""

    def loss(self, model, batch, draws):
        found = super().loss(model, batch, draws)
        more = (self.model.unused - 1).square().sum() if draws.step >= 9 else 0.0
        return found._replace(loss=found.loss + more)


def with_hidden_layers(task: Points) -> Points:
    """The task, of a model with layers that are wide enough for Muon, one of which never has a gradient."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        layers = nn.Linear(3, 24), nn.SiLU(), nn.Linear(24, 32), nn.SiLU(), nn.Linear(32, 2)
        task.model.layers = nn.Sequential(*layers)
        task.model.idle = nn.Linear(24, 24)
    return task


class PowerCut(BaseException):
    """What no one catches."""


def cut(at: int):
    def hook(step: int) -> None:
        if step == at:
            raise PowerCut

    return hook


def settings(folder: Path, **changes) -> TrainingSettings:
    values = {
        "max_train_steps": 12,
        "train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_warmup_steps": 2,
        "checkpointing_steps": 4,
        "validation_steps": 3,
        "sample_steps": 5,
        "logging_steps": 2,
        "report_to": "none",
    }
    return TrainingSettings(output_dir=folder, **{**values, **changes})


def train(folder: Path, task: Points | None = None, **changes) -> dict:
    return Trainer(task or Points(), settings(folder, **changes), quiet=True).train()


def digest(folder: Path) -> int:
    """Of everything a checkpoint holds but its state.json."""
    files = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    return zlib.crc32(b"".join(path.name.encode() + path.read_bytes() for path in files))


def refuse_late_reducers() -> None:
    """Make leaving the process group an error while a DDP model is alive, whose end may then hang."""
    import gc

    leave = torch.distributed.destroy_process_group

    def checked(*groups) -> None:
        left = [o for o in gc.get_objects() if issubclass(type(o), nn.parallel.DistributedDataParallel)]
        assert not left, "the DDP model outlives its process group"
        leave(*groups)

    torch.distributed.destroy_process_group = checked


def alone(folder: Path, changes: dict, stop_at: int | None = None, stop: int = signal.SIGKILL) -> None:
    """A run in a process of its own, which sends itself a signal before the loss of a step."""

    def hook(step: int) -> None:
        if step == stop_at:
            os.kill(os.getpid(), stop)

    refuse_late_reducers()
    given = dict(changes)
    try:
        train(folder, Points(dropout=given.pop("dropout", 0.1), hook=hook), **given)
    finally:
        assert not torch.distributed.is_initialized(), "the process group outlives the run"
