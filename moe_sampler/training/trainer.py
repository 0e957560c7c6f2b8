"""The loop that trains whatever a `Task` says: on Accelerate, resumable to the bit."""

from __future__ import annotations

import contextlib
import json
import math
import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device, set_seed
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, default_collate
from tqdm.auto import tqdm

from .._files import write_text
from ..errors import CheckpointError, NonFiniteError
from .agreement import StopAgreement
from .captured import CapturedStep, check_capture
from .draws import Draws
from .interrupts import Interrupts, interrupts
from .observer import Observer
from .optimization import learning_rate
from .pace import Pace
from .run import Run
from .settings import SettingsError, to_tables
from .task import Losses, Task
from .training_settings import TrainingSettings
from .window import StepNumbers, Window

__all__ = ["Interrupted", "NonFiniteError", "Trainer"]


class Interrupted(Exception):
    """SIGTERM or Ctrl-C: the run saved a checkpoint and stopped.

    signal: which it was. step: of the checkpoint.
    """

    def __init__(self, number: signal.Signals, step: int) -> None:
        super().__init__(f"stopped by {number.name} after step {step}; the same command continues")
        self.signal, self.step = number, step


class Trainer:
    """Trains a task; call `train`.

    Everything is checked here, before any work, and a checkpoint is loaded if there is one.

    Args:
        task: model, data and loss.
        settings: how.
        record: all settings as plain values, for the model card and settings.json; by default those of
            `settings`.
        quiet: no progress bar.
        deadline: end at this time, as `time.time` counts, rather than after max_train_steps, with a decay
            that has the share of the steps which lr_decay_steps has of max_train_steps (see `Pace`).

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
        deadline: float | None = None,
    ) -> None:
        self.task, self.quiet = task, quiet
        self.pace = None if deadline is None else Pace(settings, deadline)
        self.run = Run(task, settings)
        if deadline is not None and self.run.plan.processes > 1:
            raise SettingsError(
                "a run that ends at a time has one process: several would see different clocks"
            )
        self.observer = Observer(self.run, to_tables(settings) if record is None else record)
        if settings.num_train_epochs is not None:
            if deadline is not None:
                raise SettingsError("num_train_epochs: a run that ends at a time has as many as fit into it")
            settings = settings.in_steps(self.run.plan.length, self.run.plan.total)
        self._go_on_with(settings)
        self.window = Window()
        self._agreement = StopAgreement(self.run.accelerator)
        self._captured: CapturedStep | None = None
        if settings.cuda_graph:
            check_capture(task, settings, self.run.accelerator)
            self._captured = CapturedStep(self._one_batch, self.run.optimizer, self.run.accelerator.device)
        self._skipped_in_a_row = 0

    def _go_on_with(self, settings: TrainingSettings) -> None:
        self.settings = self.run.settings = settings
        self.rate = learning_rate(settings)

    def train(self) -> dict[str, Any]:
        """Train to `max_train_steps`, validate, and write the model and its card.

        Returns:
            step, skipped (steps), validation (numbers), best (step and numbers, or None).

        Raises:
            Interrupted: after SIGTERM or Ctrl-C, with a checkpoint saved.
            NonFiniteError: a loss or gradient that isn't finite, where settings say to stop.
            CheckpointError: another run works in the folder; a checkpoint couldn't be written, and earlier
                ones are as they were.
        """
        run = self.run
        if self.pace is not None:
            self._go_on_with(self.pace.begin(run.step, run.resumed_total, run.decay_start))
        # Dropout draws from the global generators, which are the caller's again afterwards.
        with run.sole_use(), run.forked_generators(), interrupts() as noted:
            self.observer.begin()
            set_seed(self.settings.seed, device_specific=True)
            run.restore_generators()
            try:
                with tqdm(
                    total=self.settings.max_train_steps if self.pace is None else None,
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
        run, observer = self.run, self.observer
        batches = iter(self.loader())
        while run.step < self.settings.max_train_steps:
            rate = self.rate(run.step)
            stop = self.make_step(batches, rate, noted)
            bar.update(1)
            self._keep_pace()
            settings = self.settings
            last = run.step >= settings.max_train_steps
            logs = run.step % settings.logging_steps == 0 or last or stop
            saves = run.step % settings.checkpointing_steps == 0 or last or stop
            finite = not (logs or saves) or self.read_window()
            if logs:
                bar.set_postfix(loss=f"{observer.log(rate):.4f}", lr=f"{rate:.2g}", refresh=False)
            observer.pause()
            if settings.validation_steps and run.step % settings.validation_steps == 0:
                finite &= observer.validate()
            if settings.sample_steps and run.step % settings.sample_steps == 0 and not last:
                observer.sample()
            if saves and (finite or stop):
                run.save()  # a step that came to nothing is no place to go on from, unless the run ends there
                if not last and not stop:
                    observer.upload()
            observer.resume()
            if stop and not last:
                raise Interrupted(noted.signal or signal.SIGTERM, run.step)

    def _keep_pace(self) -> None:
        """Settle how many steps there are, when the time has come."""
        if self.pace is None:
            return
        settled = self.pace.look(self.run.step, self.settings.max_train_steps)
        if settled is not None:
            self._go_on_with(settled)
            self.run.decay_start = self.pace.decay_start

    def make_step(self, batches: Iterator[Any], rate: float, noted: Interrupts) -> bool:
        """One optimizer step, without a wait for the device. Returns whether any process was told to stop.

        What came of it is in `window`. A step whose gradient isn't finite changes neither weights nor moments
        nor average: the device decides that by itself.

        batches: of `loader`. rate: the learning rate. noted: signals that came.
        """
        run, plan, accelerator = self.run, self.run.plan, self.run.accelerator
        draws = [
            Draws(self.settings.seed, run.step, places, plan.total, accelerator.device)
            for places in (
                plan.places(micro, accelerator.process_index) for micro in range(plan.accumulation)
            )
        ]
        own = [next(batches) for _ in draws]
        if self._captured is not None:
            losses, norm = self._captured(own[0], draws[0], rate)
            found = [losses]
        else:
            own = (send_to_device(batch, accelerator.device, non_blocking=True) for batch in own)
            found, norm = self._work(own, draws, rate)
        self.window.add(run.step, found, norm)
        run.step += 1
        return self._agreement.ask(noted.signal is not None)

    def _one_batch(self, batch: Any, draws: Draws, rate: Tensor) -> tuple[Losses, Tensor]:
        (losses,), norm = self._work([batch], [draws], rate)
        return losses, norm

    def _work(
        self, batches: Iterable[Any], draws: Sequence[Draws], rate: float | Tensor
    ) -> tuple[list[Losses], Tensor]:
        """What the device does in a step. Returns its micro-batches' losses and the gradient's norm."""
        run, accelerator = self.run, self.run.accelerator
        if self.settings.torch_compile:
            torch.compiler.cudagraph_mark_step_begin()
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        found: list[Losses] = []
        for batch, drawn in zip(batches, draws, strict=True):
            last = len(found) + 1 == len(draws)
            with contextlib.nullcontext() if last else accelerator.no_sync(run.model):
                losses = self.task.loss(run.model, batch, drawn)
                accelerator.backward(_telling(losses.loss) / len(draws))
            found.append(
                losses.kept(copy=self.settings.torch_compile)
            )  # a compiled model uses its memory again
        norm = accelerator.clip_grad_norm_(run.parameters, self.settings.max_grad_norm or math.inf)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        assert isinstance(norm, Tensor)
        made = norm.isfinite()
        run.make_optimizer_step(made)
        if run.average is not None:
            run.average.update(made)
        run.optimizer.zero_grad(set_to_none=True)
        return found, norm

    def read_window(self) -> bool:
        """Read what the steps since the last time came to, which waits for the device.

        Returns:
            Whether the last of them had a finite loss.

        Raises:
            NonFiniteError: one of them wasn't finite, and settings say to stop, or too many weren't.
        """
        run, finite = self.run, True
        for numbers in self.window.read(run.accelerator):
            finite = numbers.losses_finite
            if numbers.finite:
                self._skipped_in_a_row = 0
                self.observer.add(numbers)
                continue
            run.skipped += 1
            if numbers.losses_finite and run.accelerator.scaler is not None:
                # Scaled gradients may overflow: the scaler leaves such a step out by itself, and scales less.
                self._skipped_in_a_row = 0
            else:
                self._not_finite(numbers)
        return finite

    def _not_finite(self, numbers: StepNumbers) -> None:
        """Keep what the step was made of, and stop the run unless it may be skipped."""
        run, rank = self.run, self.run.accelerator.process_index
        micro = [
            {
                "samples": run.plan.indices(numbers.step, index, rank),
                "losses": [str(value) for value in losses.tolist()],
                "noise": noise.tolist(),
            }
            for index, (losses, noise) in enumerate(zip(numbers.per_sample, numbers.noise, strict=True))
        ]
        record = {
            "step": numbers.step,
            "loss": str(numbers.loss),
            "grad_norm": str(numbers.grad_norm),
            "terms": {name: str(value) for name, value in numbers.terms.items()},
            "micro_batches": micro,
        }
        path = self.settings.output_dir / f"nonfinite-step-{numbers.step}-process-{rank}.json"
        write_text(path, json.dumps(record, indent=1) + "\n")
        self._skipped_in_a_row += 1
        if self.settings.on_nonfinite == "stop" or self._skipped_in_a_row >= self.settings.max_skipped:
            raise NonFiniteError(
                f"at step {numbers.step} the loss is {numbers.loss} and its gradient's norm "
                f"{numbers.grad_norm}, {self._skipped_in_a_row} such step(s) in a row: {path} has the "
                "samples. Lower learning_rate, or set on_nonfinite to skip"
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


def _telling(loss: Tensor) -> Tensor:
    """The loss, whose gradient isn't finite where itself isn't, so that the gradient alone tells."""
    return loss * (1 + 0 * loss.detach())
