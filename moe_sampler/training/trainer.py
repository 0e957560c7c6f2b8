"""The loop that trains whatever a `Task` says: on Accelerate, resumable to the bit."""

from __future__ import annotations

import contextlib
import json
import math
import signal
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import send_to_device, set_seed
from torch.utils.data import DataLoader, default_collate
from tqdm.auto import tqdm

from ..errors import CheckpointError
from .draws import Draws
from .interrupts import Interrupts, interrupts
from .observer import Observer
from .optimization import learning_rate
from .run import Run
from .settings import to_tables
from .task import Losses, Task
from .training_settings import TrainingSettings

__all__ = ["Interrupted", "NonFiniteError", "Trainer"]


class Interrupted(Exception):
    """SIGTERM or Ctrl-C: the run saved a checkpoint and stopped.

    signal: which it was. step: of the checkpoint.
    """

    def __init__(self, number: signal.Signals, step: int) -> None:
        super().__init__(f"stopped by {number.name} after step {step}; the same command continues")
        self.signal, self.step = number, step


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is NaN or infinite; the message names the file with the step's samples."""


class Trainer:
    """Trains a task; call `train`.

    Everything is checked here, before any work, and a checkpoint is loaded if there is one.

    Args:
        task: model, data and loss.
        settings: how.
        record: all settings as plain values, for the model card and settings.json; by default those of
            `settings`.
        quiet: no progress bar.

    Raises:
        SettingsError: what is not installed or not possible here.
        CheckpointError: a folder that can't be written to, a disk that is too small, a checkpoint that is
            damaged or of another run.
    """

    def __init__(
        self,
        task: Task,
        settings: TrainingSettings,
        *,
        record: dict[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        self.task, self.settings, self.quiet = task, settings, quiet
        self.run = Run(task, settings)
        self.observer = Observer(self.run, to_tables(settings) if record is None else record)
        self.rate = learning_rate(settings)
        self._skipped_in_a_row = 0

    def train(self) -> dict[str, Any]:
        """Train to `max_train_steps`, validate, and write the model and its card.

        Returns:
            step, skipped (steps), validation (numbers), best (step and numbers, or None).

        Raises:
            Interrupted: after SIGTERM or Ctrl-C, with a checkpoint saved.
            NonFiniteError: a loss or gradient that isn't finite, where settings say to stop.
            CheckpointError: a checkpoint couldn't be written; earlier ones are as they were.
        """
        run = self.run
        self.observer.begin()
        # Dropout draws from the global generators, which are the caller's again afterwards.
        with run.forked_generators(), interrupts() as noted:
            set_seed(self.settings.seed, device_specific=True)
            run.restore_generators()
            try:
                with tqdm(
                    total=self.settings.max_train_steps,
                    initial=run.step,
                    desc=self.task.name,
                    disable=self.quiet or not run.accelerator.is_local_main_process,
                    dynamic_ncols=True,
                ) as bar:
                    self._loop(bar, noted)
                self.observer.finish()
            except (Interrupted, NonFiniteError, CheckpointError):
                run.close()  # all processes come here at once
                raise
            run.close()
        return {
            "step": run.step,
            "skipped": run.skipped,
            "validation": self.observer.validation,
            "best": run.best,
        }

    def _loop(self, bar: tqdm, noted: Interrupts) -> None:
        settings, run, observer = self.settings, self.run, self.observer
        batches = iter(self.loader())
        while run.step < settings.max_train_steps:
            rate = self.rate(run.step)
            loss, stop = self.make_step(batches, rate, noted)
            bar.update(1)
            bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.2g}", refresh=False)
            last = run.step == settings.max_train_steps
            if run.step % settings.logging_steps == 0 or last or stop:
                observer.log(rate)
            observer.pause()
            if settings.validation_steps and run.step % settings.validation_steps == 0:
                observer.validate()
            if settings.sample_steps and run.step % settings.sample_steps == 0 and not last:
                observer.sample()
            if run.step % settings.checkpointing_steps == 0 or last or stop:
                run.save()
            observer.resume()
            if stop and not last:
                raise Interrupted(noted.signal or signal.SIGTERM, run.step)

    def make_step(self, batches: Iterator[Any], rate: float, noted: Interrupts) -> tuple[float, bool]:
        """One optimizer step: (its loss, whether any process was told to stop).

        batches: of `loader`. rate: the learning rate. noted: signals that came.
        """
        run, plan, accelerator = self.run, self.run.plan, self.run.accelerator
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        found: list[Losses] = []
        for micro in range(plan.accumulation):
            batch = send_to_device(next(batches), accelerator.device)
            places = plan.places(micro, accelerator.process_index)
            draws = Draws(self.settings.seed, run.step, places, plan.total, accelerator.device)
            last = micro + 1 == plan.accumulation
            with contextlib.nullcontext() if last else accelerator.no_sync(run.model):
                losses = self.task.loss(run.model, batch, draws)
                accelerator.backward(losses.loss / plan.accumulation)
            found.append(losses)
        norm = accelerator.clip_grad_norm_(run.parameters, self.settings.max_grad_norm or math.inf)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        own = torch.stack([losses.loss.detach().float() for losses in found]).mean()
        sums = accelerator.reduce(
            torch.stack([own, own.new_tensor(float(noted.signal is not None))]), "sum"
        ).tolist()
        loss, stopping = sums[0] / plan.processes, sums[1] > 0
        made = math.isfinite(loss) and math.isfinite(norm)
        if made or (math.isfinite(loss) and accelerator.scaler is not None):
            # Scaled gradients may overflow: the scaler leaves such a step out by itself, and scales less.
            run.optimizer.step()
            self._skipped_in_a_row = 0
        else:
            self._not_finite(found, loss, norm)
        if made:
            self.observer.add(found, loss, norm)
        run.optimizer.zero_grad(set_to_none=True)
        if made and run.average is not None:
            run.average.update()
        run.skipped += not made
        run.step += 1
        return loss, stopping

    def _not_finite(self, found: list[Losses], loss: float, norm: float) -> None:
        """Keep what the step was made of, and stop the run unless it may be skipped."""
        run, rank = self.run, self.run.accelerator.process_index
        micro = [
            {
                "samples": run.plan.indices(run.step, index, rank),
                "losses": [str(value) for value in losses.per_sample.tolist()],
                "noise": losses.noise.tolist(),
                "terms": {name: str(float(value)) for name, value in losses.terms.items()},
            }
            for index, losses in enumerate(found)
        ]
        record = {"step": run.step, "loss": str(loss), "grad_norm": str(norm), "micro_batches": micro}
        path = self.settings.output_dir / f"nonfinite-step-{run.step}-process-{rank}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        self._skipped_in_a_row += 1
        if self.settings.on_nonfinite == "stop" or self._skipped_in_a_row >= self.settings.max_skipped:
            raise NonFiniteError(
                f"at step {run.step} the loss is {loss} and its gradient's norm {norm}, "
                f"{self._skipped_in_a_row} such step(s) in a row: {path} has the samples. Lower "
                "learning_rate, or set on_nonfinite to skip"
            )

    def loader(self) -> DataLoader:
        """This process's micro-batches from the next step to the last."""
        run = self.run
        rank, last = run.accelerator.process_index, self.settings.max_train_steps
        return DataLoader(
            self.task.data,
            batch_sampler=run.plan.micro_batches(rank, run.step, last),
            num_workers=self.settings.dataloader_num_workers,
            collate_fn=getattr(self.task, "collate", default_collate),
            pin_memory=run.accelerator.device.type == "cuda",
            generator=torch.Generator(),  # the global one is dropout's
        )
