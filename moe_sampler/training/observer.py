"""What a run shows of itself: its log, validation, sheets of samples, trackers, the model and its card."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from ..errors import NonFiniteError
from ..publishing.card import Example
from ..publishing.upload import Address
from .model_card import model_card
from .noise_bins import NoiseBins
from .run import Run
from .run_folder import RunFolder, ships_config
from .settings import SettingsError, flat
from .task import Published
from .uploads import Uploads
from .window import StepNumbers

__all__ = ["Observer"]


class Observer:
    """Args:
    run: that is watched.
    record: all settings, plain values.

    Raises:
        SettingsError: the hub doesn't take the model.
    """

    def __init__(self, run: Run, record: dict[str, Any]) -> None:
        self.run, self.record = run, record
        self.validation: dict[str, float] = {}
        self._validated_at = -1
        self._bins = NoiseBins(run.settings.noise_bins)
        self._sums: dict[str, float] = {}
        self._count = 0
        self._seconds, self._since = 0.0, time.monotonic()
        self._repository = self._new_repository() if run.settings.push_to_hub else None
        self._sheets: list[str] = []
        published = getattr(run.task, "published", None)
        address = Address(self._repository or str(run.settings.output_dir))
        self._published = Published({}, [])
        if published is not None:
            self._published = published(address, run.settings.license)
        self.folder = RunFolder(run.settings.output_dir, run.task, self._published.header)
        names = ["config.json"] if ships_config(run.task) else []
        self._uploads = None
        if self._repository is not None:
            own = [*names, run.task.weights_name, "README.md", *self._published.files]
            self._uploads = Uploads(self._repository, own)

    def begin(self) -> None:
        """Open the trackers, and take back what the log says of steps that will be made again."""
        run = self.run
        if run.accelerator.is_main_process:
            self.folder.begin(run.step, self.record)
        if run.accelerator.log_with:
            plain = {k: v for k, v in flat(self.record).items() if isinstance(v, (int, float, str, bool))}
            purge = {"tensorboard": {"purge_step": run.step + 1}} if run.step else {}
            run.accelerator.init_trackers("training", config=plain, init_kwargs=purge)
        self._since = time.monotonic()

    # Training

    def add(self, numbers: StepNumbers) -> None:
        """A step's losses."""
        for losses, noise in zip(numbers.per_sample, numbers.noise, strict=True):
            self._bins.add(losses, noise)
        found = {"loss": numbers.loss, "grad_norm": numbers.grad_norm, **numbers.terms}
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1

    def log(self, rate: float) -> float:
        """A line of the log: means since the last one, over all processes. Returns the mean loss."""
        run = self.run
        self._seconds += time.monotonic() - self._since
        count = max(self._count, 1)
        means = {name: value / count for name, value in sorted(self._sums.items())}
        if run.plan.processes > 1 and means:
            own = torch.tensor([*means.values()], dtype=torch.float64, device=run.accelerator.device)
            reduced = run.accelerator.reduce(own, "mean")
            assert isinstance(reduced, torch.Tensor)
            means = dict(zip(means, reduced.tolist(), strict=True))
        by_noise = self._bins.take(run.accelerator)
        numbers = {**means, "learning_rate": rate, "skipped": run.skipped}
        if run.accelerator.is_main_process:
            line = {"step": run.step, "seconds": round(self._seconds, 3), **numbers, "by_noise": by_noise}
            self.folder.log(line)
        shown = {f"train/{name}": value for name, value in numbers.items()}
        shown |= {f"train_by_noise/{name}": value for name, value in by_noise.items()}
        run.accelerator.log(shown, step=run.step)
        self._sums, self._count, self._seconds = {}, 0, 0.0
        self._since = time.monotonic()
        return means.get("loss", math.nan)

    def pause(self) -> None:
        """What comes now is not training, until `resume`."""
        self._seconds += time.monotonic() - self._since

    def resume(self) -> None:
        self._since = time.monotonic()

    # Looking at what was learned

    def validate(self) -> bool:
        """Numbers on held-out data with the averaged weights; the best step's model is kept. Once a step.

        Returns:
            Whether the loss is finite, or there is none: one that isn't is never the best.
        """
        run = self.run
        if self._validated_at == run.step:
            return math.isfinite(self.validation.get("loss", 0.0))
        self._validated_at = run.step
        with run.evaluating():
            numbers = run.task.validate(run.task.model)
            finite = math.isfinite(numbers.get("loss", 0.0))
            better = "loss" in numbers and finite and (run.best is None or numbers["loss"] < run.best["loss"])
            tensors = run.tensors() if better else {}
        if not numbers:
            return True
        self.validation = numbers
        best = {"step": run.step, **numbers}
        if better:
            run.best = best
        if run.accelerator.is_main_process:
            self.folder.log({"step": run.step, "validation": numbers})
            if better:
                self.folder.save_best(tensors, best)
        run.accelerator.log({f"validation/{name}": value for name, value in numbers.items()}, step=run.step)
        return finite

    def sample(self) -> None:
        """A sheet of pictures from the averaged weights."""
        run = self.run
        try:
            with run.evaluating():
                images = run.task.samples(run.task.model)
        except NonFiniteError as error:  # the pictures are lost, not the run
            logging.getLogger(__name__).warning("no samples of step %d: %s", run.step, error)
            return
        if not images or not run.accelerator.is_main_process:
            return
        sheet = np.asarray(self.folder.save_samples(images, run.step))
        self._sheets = [self.folder.sheet(run.step)]
        for tracker in run.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                shape = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": sheet[None]}, step=run.step, **shape)

    def upload(self) -> None:
        """The averaged weights as they are now, in the background, if that was asked for. Where an upload is
        still on its way, this one is left out."""
        run = self.run
        if self._uploads is None or run.settings.hub_strategy == "end":
            return
        with run.evaluating():
            tensors = run.tensors()
        if run.accelerator.is_main_process and not self._uploads.busy:
            folder = self.folder.save_upload(tensors, self._card(), self._sheets)
            self._uploads.begin(folder, run.step, self._sheets)

    def finish(self) -> None:
        """Validate, draw samples, write the model and its card, and upload it if asked for."""
        run = self.run
        self.validate()
        self.sample()
        with run.evaluating():
            tensors = run.tensors()
        if run.accelerator.is_main_process:
            self.folder.save_final(tensors, self._card())
            if self._uploads is not None:
                self._uploads.finish(run.settings.output_dir, self._sheets)
            self.folder.remove_upload()

    def _card(self) -> str:
        run = self.run
        name = self._repository or run.settings.output_dir.resolve().name
        return model_card(
            name,
            run.task.describe(),
            self.record,
            self.validation,
            self.folder.records(),
            run.step,
            sections=self._published.sections,
            license=run.settings.license,
            examples=[Example("samples of the run's last sheet", sheet) for sheet in self._sheets],
        )

    def _new_repository(self) -> str:
        name = self.run.settings.hub_model_id or self.run.settings.output_dir.resolve().name
        try:
            return HfApi().create_repo(name, exist_ok=True).repo_id
        except (HTTPError, OSError, ValueError) as error:
            raise SettingsError(
                f"push_to_hub: {name} can't be made on the hub: {str(error).strip().splitlines()[0]}"
            ) from None
