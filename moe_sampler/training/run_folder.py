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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor

from .._files import remove, replace_folder, sweep, write_text, write_whole, writing
from .._readers import parse_json
from ..errors import CheckpointError
from ..publishing.modelspec import stamp
from .checkpoints import write_tensors
from .task import Task

__all__ = ["KIND", "RunFolder", "own_names"]


KIND = "training run"
UPLOAD = ".upload.partial"
"""What is on its way to the hub."""


def own_names(weights: str) -> tuple[str, ...]:
    """What a run writes into its folder, as patterns; `weights` is the model's file."""
    names = (
        "README.md",
        "config.json",
        "tinyflux.py",
        "assessor.safetensors",
        "scheduler_config.json",
        weights,
    )
    names += ("best", "samples", "logs", "settings.json", "log.jsonl")
    return (*names, "checkpoint-*", "nonfinite-step-*")


class RunFolder:
    """Args:
    folder: of the run.
    task: whose model is written.
    header: of its weights, beside what the writer puts there.
    """

    def __init__(self, folder: Path, task: Task, header: Mapping[str, str] | None = None) -> None:
        self.folder, self.task, self.header = folder, task, dict(header or {})
        self.log_file = folder / "log.jsonl"
        self._logged: set[tuple[int, bool]] = set()

    def begin(self, step: int, settings: Mapping[str, Any]) -> None:
        """Write settings.json, and forget what the log says of steps that are going to be made again, and
        lines that a crash tore."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder, (*own_names(self.task.weights_name), "final", "upload"))
        write_text(self.folder / "settings.json", json.dumps(dict(settings), indent=1) + "\n")
        if self.log_file.is_file():
            kept = {_kind(record): record for record in self.records() if step and record["step"] <= step}
            self._logged = set(kept)
            write_text(self.log_file, "".join(json.dumps(record) + "\n" for record in kept.values()))

    def log(self, record: Mapping[str, Any]) -> None:
        """Add a line; none where the log has it from before the run was continued."""
        if _kind(record) in self._logged:
            return
        try:
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(f"{self.log_file} cannot be written: {error.strerror or error}") from error

    def records(self) -> list[dict[str, Any]]:
        """The log so far, without lines that a crash tore."""
        if not self.log_file.is_file():
            return []
        return list(_records(self.log_file.read_bytes().decode("utf-8", "replace")))

    def sheet(self, step: int) -> str:
        """The name in the folder of a step's sheet of samples."""
        return f"samples/step-{step:06d}.png"

    def save_samples(self, images: list[Image.Image], step: int) -> Image.Image:
        """One sheet, about square."""
        columns = math.ceil(math.sqrt(len(images)))
        rows = math.ceil(len(images) / columns)
        blank = Image.new("RGB", images[0].size)
        sheet = make_image_grid([*images, *[blank] * (rows * columns - len(images))], rows, columns)
        path = self.folder / self.sheet(step)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, lambda temporary: sheet.save(temporary, format="PNG"))
        return sheet

    def save_best(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Replace best/ as a whole."""
        with self._written("best", tensors) as partial:
            write_text(partial / "validation.json", json.dumps(dict(numbers), indent=1) + "\n")
            replace_folder(partial, self.folder / "best")

    def save_final(self, tensors: Mapping[str, Tensor], card: str) -> None:
        """The model in the run's own folder, file by file, each whole or not there."""
        with self._written("final", tensors) as partial:
            write_text(partial / "README.md", card)
            for path in partial.iterdir():
                os.replace(path, self.folder / path.name)

    def save_upload(self, tensors: Mapping[str, Tensor], card: str, shown: Sequence[str] = ()) -> Path:
        """The model and its card in a hidden folder, which lasts until `remove_upload`.

        shown: pictures of the run's folder that the card shows.
        """
        folder = self.folder / UPLOAD
        remove(folder)
        with writing(folder):
            self._write_model(folder, tensors)
            write_text(folder / "README.md", card)
            for name in shown:
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copy(self.folder / name, folder / name)
        return folder

    def remove_upload(self) -> None:
        remove(self.folder / UPLOAD)

    @contextmanager
    def _written(self, name: str, tensors: Mapping[str, Tensor]) -> Iterator[Path]:
        """A hidden folder with the model, which is gone afterwards, or has another name."""
        partial = self.folder / f".{name}.partial"
        remove(partial)
        try:
            with writing(self.folder if name == "final" else self.folder / name):
                self._write_model(partial, tensors)
                yield partial
        finally:
            remove(partial)

    def _write_model(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        folder.mkdir(parents=True)
        shipped = getattr(self.task, "shipped", dict)
        weights = folder / self.task.weights_name
        write_tensors(weights, shipped(tensors), {"format": "pt"})
        for name, own in getattr(self.task, "beside", lambda _: {})(tensors).items():
            write_tensors(folder / name, own, {"format": "pt"})
        if self.header:
            stamp([weights], self.header)
        if ships_config(self.task):
            owner: Any = self.task if hasattr(self.task, "save_config") else self.task.model
            getattr(owner, "save_config", lambda _: None)(folder)


def ships_config(task: Task) -> bool:
    """Whether the model's config lies beside its tensors: adapters are no model."""
    return getattr(task, "ships_config", True)


def _records(text: str) -> Iterator[dict[str, Any]]:
    for line in text.split("\n"):
        try:
            record = parse_json(line, "a line")
        except CheckpointError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def _kind(record: Mapping[str, Any]) -> tuple[int, bool]:
    """A step has one line of training and one of validation."""
    return record["step"], "validation" in record
