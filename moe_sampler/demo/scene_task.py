"""What the demo's autoencoder, text encoder and judge are to the trainer: a loss over some of the scenes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..training.draws import Draws
from ..training.task import Losses
from ..training.trainer import Trainer
from ..training.training_settings import TrainingSettings
from .weights import fill, write_average

__all__ = ["SceneLoss", "SceneTask", "run_stage", "stage_settings"]

SceneLoss = Callable[[Tensor, Draws], tuple[Tensor, dict[str, Tensor]]]
"""(which scenes: int64 [B], what is random) -> (loss, numbers to log), on the device of `which`."""


class _Numbers(Dataset):
    """The scenes' numbers: losses look the pictures up."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index

    def __getitems__(self, indices: list[int]) -> Tensor:
        """A batch."""
        return torch.tensor(indices)


class SceneTask:
    """A `Task` for one process: the loss reaches into the model, which is then not wrapped.

    Args:
        name: of the stage.
        model: trained where it requires gradients.
        loss: of a batch.
        scenes: how many there are.
    """

    weights_name = "model.safetensors"
    steps_alike = True

    def __init__(self, name: str, model: nn.Module, loss: SceneLoss, scenes: int) -> None:
        self.name, self.model, self.data, self._loss = name, model, _Numbers(scenes), loss

    @staticmethod
    def collate(batch: Tensor) -> Tensor:
        return batch

    def loss(self, model: nn.Module, batch: Tensor, draws: Draws) -> Losses:
        # The loss calls parts of the model, so it is here that they learn of the precision.
        kind = batch.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            value, terms = self._loss(batch, draws)
        per_sample = value.detach().expand(len(batch))
        return Losses(value, terms, per_sample, torch.zeros_like(per_sample))

    def validate(self, model: nn.Module) -> dict[str, float]:
        return {}

    def samples(self, model: nn.Module) -> list[Image.Image]:
        return []

    def describe(self) -> dict[str, Any]:
        return {"stage": self.name, "scenes": len(self.data)}


def stage_settings(
    steps: int,
    learning_rate: float,
    batch: int,
    *,
    warmup: int = 100,
    decay_share: float = 0.4,
    floor: float = 0.02,
    ema: float = 0.998,
) -> dict[str, Any]:
    """Training settings of a stage: warm-up, constant, then a cosine over the last share of the steps."""
    return {
        "max_train_steps": steps,
        "learning_rate": learning_rate,
        "train_batch_size": batch,
        "lr_scheduler": "warmup_stable_decay",
        "lr_warmup_steps": warmup,
        "lr_decay_steps": round(decay_share * steps),
        "lr_floor": floor,
        "ema_decay": ema,
        "adam_beta2": 0.99,
        "adam_weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "checkpointing_steps": 200,
        "checkpoints_total_limit": 1,
        "validation_steps": 0,
        "sample_steps": 0,
        "report_to": "none",
    }


def run_stage(
    task: Any, folder: Path, seed: int, settings: Mapping[str, Any], deadline: float | None = None
) -> nn.Module:
    """Train, or continue, in `folder`/<name>/, and leave `folder`/<name>.safetensors.

    deadline: end at this time, as `time.time` counts, whatever the settings say of steps.

    Returns the model with its averaged weights.
    """
    arguments = TrainingSettings(output_dir=folder / task.name, seed=seed, **settings)
    made = Trainer(task, arguments, quiet=True, deadline=deadline).train()
    averaged = load_file(arguments.output_dir / task.weights_name)
    trained = {name for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    path = folder / f"{task.name}.safetensors"
    write_average(path, {name: averaged[name] for name in trained}, made["step"])
    return fill(task.model, path)
