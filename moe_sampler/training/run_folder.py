"""What a run leaves in its folder, beside checkpoints: log, sheets of samples, the best and the final model.

config.json, model.safetensors   the trained model: its averaged weights
README.md                        the model card
best/                            the same for the step that validated best
samples/step-000500.png          from fixed seeds
settings.json                    all settings
log.jsonl                        a JSON object a line
logs/                            the tracker's
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor

from .checkpoints import write_tensors
from .task import Task

__all__ = ["RunFolder"]


class RunFolder:
    """Args:
    folder: of the run.
    task: whose model is written.
    """

    def __init__(self, folder: Path, task: Task) -> None:
        self.folder, self.task = folder, task
        self.log_file = folder / "log.jsonl"

    def begin(self, step: int, settings: Mapping[str, Any]) -> None:
        """Write settings.json, and forget what the log says of steps that are going to be made again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(settings), indent=1) + "\n"
        (self.folder / "settings.json").write_text(text, encoding="utf-8")
        if self.log_file.is_file():
            lines = self.log_file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if step and json.loads(line)["step"] <= step]
            partial = self.log_file.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            partial.replace(self.log_file)

    def log(self, record: Mapping[str, Any]) -> None:
        with open(self.log_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The log so far."""
        if not self.log_file.is_file():
            return []
        return [json.loads(line) for line in self.log_file.read_text(encoding="utf-8").splitlines()]

    def save_samples(self, images: list[Image.Image], step: int) -> Image.Image:
        """One sheet, about square."""
        columns = math.ceil(math.sqrt(len(images)))
        rows = math.ceil(len(images) / columns)
        blank = Image.new("RGB", images[0].size)
        sheet = make_image_grid([*images, *[blank] * (rows * columns - len(images))], rows, columns)
        path = self.folder / "samples" / f"step-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        sheet.save(path)
        return sheet

    def save_best(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Replace best/ as a whole."""
        best, partial = self.folder / "best", self.folder / ".best.partial"
        shutil.rmtree(partial, ignore_errors=True)
        self._write_model(partial, tensors)
        (partial / "validation.json").write_text(json.dumps(dict(numbers), indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(best, ignore_errors=True)
        partial.rename(best)

    def save_final(self, tensors: Mapping[str, Tensor], card: str) -> None:
        """The model in the run's own folder, file by file, each whole or not there."""
        partial = self.folder / ".final.partial"
        shutil.rmtree(partial, ignore_errors=True)
        self._write_model(partial, tensors)
        (partial / "README.md").write_text(card, encoding="utf-8")
        for path in partial.iterdir():
            os.replace(path, self.folder / path.name)
        partial.rmdir()

    def _write_model(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        folder.mkdir(parents=True)
        write_tensors(folder / self.task.weights_name, tensors, {"format": "pt"})
        save_config = getattr(self.task.model, "save_config", None)
        if save_config is not None:
            save_config(folder)
