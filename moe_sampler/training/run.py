"""A run of training: what it has, how far it is, and the same as a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from moe_sampler import __version__

from .._files import check_ours, claim, remove, sole_user
from ..errors import CheckpointError
from . import checkpoints, run_state
from .averages import WeightAverage
from .batches import BatchPlan
from .distribution import new_accelerator, prepare, sharded
from .run_folder import KIND, own_names
from .settings import to_tables
from .task import Task
from .training_settings import TrainingSettings

__all__ = ["Run"]

_MODEL, _AVERAGE, _OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"


class Run:
    """Everything of a run that lasts longer than a step.

    Args:
        task, settings: as `Trainer` takes them.

    Attributes:
        accelerator, plan, model (the one to call), its parameters, optimizer, average: what trains.
        step: the next one to be made. skipped: steps that were left out. best: the best validation's numbers.
        decay_start, resumed_total: of a run that ends at a time (`Pace`): the step that its decay began at,
            and the steps in all that the checkpoint it continues from knew of.
    """

    def __init__(self, task: Task, settings: TrainingSettings) -> None:
        self.task, self.settings = task, settings
        self.step, self.skipped = 0, 0
        self.best: dict[str, Any] | None = None
        self.decay_start: int | None = None
        self.resumed_total: int | None = None
        self._generators: tuple[dict[str, Tensor], str] | None = None
        check_ours(settings.output_dir, KIND, own_names(task.weights_name))
        folder = checkpoints.find_checkpoint(settings.output_dir, settings.resume_from_checkpoint)
        if folder is None and checkpoints.checkpoint_folders(settings.output_dir):
            raise CheckpointError(
                f"{settings.output_dir} has checkpoints of an earlier run: continue it "
                "(resume_from_checkpoint latest), or choose another output_dir"
            )
        state = {} if folder is None else checkpoints.read_state(folder)
        trained = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
        if not trained:
            raise ValueError("the model has nothing to train: no parameter requires a gradient")
        # Weights, average and two moments in float32, for the checkpoints kept and the one being written.
        checkpoints.check_space(settings.output_dir, 16 * trained * (settings.checkpoints_total_limit + 1))
        self.accelerator = new_accelerator(settings)
        self.plan = BatchPlan(
            len(cast(Sized, task.data)),
            settings.train_batch_size,
            settings.gradient_accumulation_steps,
            self.accelerator.num_processes,
            settings.seed,
        )
        if folder is not None:
            self._check(folder, state)
        self._shapes = {name: tensor.shape for name, tensor in task.model.state_dict().items()}
        if not sharded(self.accelerator):
            task.model.to(self.accelerator.device)
        self.model, self.optimizer = prepare(self.accelerator, task.model, settings)
        task.model.train()
        # To ask a model for its parameters takes longer than to clip small ones.
        self.parameters = list(self.model.parameters())
        self.average = WeightAverage(task.model, settings.ema_decay) if settings.use_ema else None
        if folder is not None:
            self._load(folder, state)

    def make_optimizer_step(self, made: Tensor) -> None:
        """Step the optimizer where `made`: bool [], on the device; else it changes nothing.

        A scaler of gradients finds that out by itself, and scales less. 8-bit AdamW and Adafactor can't be
        told on the device, so they wait.
        """
        own = self.optimizer.optimizer
        if self.accelerator.scaler is None:
            if not getattr(own, "_step_supports_amp_scaling", False):
                if made:
                    self.optimizer.step()
                return
            own.grad_scale, own.found_inf = None, (~made).float()
        self.optimizer.step()

    def restore_generators(self) -> None:
        """Put the global generators where the checkpoint had them; nothing in a run that begins."""
        if self._generators is not None:
            run_state.set_generators(*self._generators)

    def forked_generators(self) -> contextlib.AbstractContextManager:
        """Within the context the global generators of this process and its device may be drawn from; they are
        as they were afterwards."""
        device = self.accelerator.device
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The averaged weights in eval mode without gradients; everything is as it was afterwards."""
        model = self.task.model
        average = contextlib.nullcontext() if self.average is None else self.average.in_place()
        with torch.no_grad(), self.forked_generators(), average:
            model.eval()
            if isinstance(model, FSDPModule):
                model.unshard()  # a task may look at parameters
            try:
                yield
            finally:
                model.train()

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the model's tensors, whole, on the CPU; {} but on process 0 under FSDP."""
        found = run_state.model_tensors(self.task.model)
        return {name: tensor.reshape(self._shapes[name]).clone() for name, tensor in found.items()}

    @contextlib.contextmanager
    def sole_use(self) -> Iterator[None]:
        """Within the context no other run works in this one's folder, which has its mark."""
        folder = self.settings.output_dir
        with contextlib.ExitStack() as held:
            if self.accelerator.is_main_process:
                claim(folder, KIND, own_names(self.task.weights_name))
                held.enter_context(sole_user(folder, "trained in"))
            yield

    def close(self) -> None:
        """Close the trackers and leave the other processes; weights and numbers can still be read."""
        # The last to hold a process group destroys it. DDP's reducer would do so while it keeps the
        # interpreter's lock, which the group's threads may be waiting for: it has to go first.
        self.model = self.task.model
        self.accelerator.free_memory()
        self.accelerator.end_training()

    # Checkpoints

    def save(self) -> Path:
        """Write a checkpoint of this step, and remove old ones. All processes call it.

        Raises:
            CheckpointError: it can't be written; what was there before still is.
        """
        accelerator, settings = self.accelerator, self.settings
        partial = checkpoints.partial_folder(settings.output_dir, self.step)
        folder = settings.output_dir / f"checkpoint-{self.step}"
        problem = ""
        try:
            if accelerator.is_main_process:
                remove(partial)
                partial.mkdir(parents=True)
        except OSError as error:
            problem = str(error)
        self._agree(problem, partial)
        weights = self.tensors()
        moments = run_state.optimizer_tensors(self.task.model, self.optimizer.optimizer)
        averages = None
        if self.average is not None:
            with self.average.in_place():
                averages = self.tensors()
        try:
            if accelerator.is_main_process:
                checkpoints.write_tensors(partial / _MODEL, weights)
                checkpoints.write_tensors(partial / _OPTIMIZER, moments)
                if averages is not None:
                    checkpoints.write_tensors(partial / _AVERAGE, averages)
            tensors, rest = run_state.generator_tensors()
            checkpoints.write_tensors(partial / self._random(accelerator.process_index), tensors, rest)
        except OSError as error:
            problem = str(error)
        self._agree(problem, partial)
        try:
            if accelerator.is_main_process:
                checkpoints.finish_checkpoint(partial, folder, self._state())
                checkpoints.rotate(settings.output_dir, settings.checkpoints_total_limit)
        except OSError as error:
            problem = str(error)
        self._agree(problem, partial)
        return folder

    def _agree(self, problem: str, partial: Path) -> None:
        """Wait for all processes, and stop them all if one has a problem."""
        failed = torch.tensor(float(bool(problem)), device=self.accelerator.device)
        failed = self.accelerator.reduce(failed, "sum")
        assert isinstance(failed, Tensor)
        if failed.item():
            if self.accelerator.is_main_process:
                remove(partial)
            kept = checkpoints.checkpoint_folders(self.settings.output_dir)
            rest = f"; {kept[-1]} is whole" if kept else ""
            raise CheckpointError(
                f"no checkpoint of step {self.step} could be written to {partial.parent}: "
                f"{problem or 'another process failed'}{rest}"
            )

    @staticmethod
    def _random(process: int) -> str:
        return f"random-{process}.safetensors"

    def _state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "skipped": self.skipped,
            "best": self.best,
            "decay_start": self.decay_start,
            "average_updates": None if self.average is None else self.average.updates,
            "scaler": None if scaler is None else scaler.state_dict(),
            "samples_a_step": self.plan.total,
            "processes": self.plan.processes,
            "task": self.task.describe(),
            "settings": to_tables(self.settings),
            "version": __version__,
        }

    def _check(self, folder: Path, state: dict[str, Any]) -> None:
        """Refuse what would make another run of it, before anything is loaded."""
        now = _identity(self.plan.total, to_tables(self.settings), self.task.describe())
        was = _identity(state["samples_a_step"], state["settings"], state["task"])
        different = [name for name in now if now[name] != was[name]]
        if different:
            name = different[0]
            raise CheckpointError(
                f"{folder} is of a run with another {name}: {was[name]!r}, now {now[name]!r}. Choose another "
                "output_dir to begin anew"
            )

    def _load(self, folder: Path, state: dict[str, Any]) -> None:
        model, optimizer = self.task.model, self.optimizer.optimizer
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        moments, _ = checkpoints.read_tensors(folder, _OPTIMIZER, state)
        for name in [_AVERAGE, _MODEL] if self.average is not None else [_MODEL]:
            weights, _ = checkpoints.read_tensors(folder, name, state)
            run_state.set_tensors(model, optimizer, weights, moments, shapes)
            if name == _AVERAGE and self.average is not None:
                self.average.set(state["average_updates"])
        self.step, self.skipped, self.best = state["step"], state["skipped"], state["best"]
        self.decay_start = state.get("decay_start")
        self.resumed_total = state["settings"]["max_train_steps"]
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        # A run that goes on with more processes has no generators for the new ones: they begin with the seed.
        random = self._random(self.accelerator.process_index)
        if random in state["files"]:
            tensors, metadata = checkpoints.read_tensors(folder, random, state)
            self._generators = tensors, metadata["rest"]


def _identity(samples_a_step: int, settings: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
    """What makes it another run if it changes."""
    # Checkpoints from before the setting came have AdamW's moments.
    optimizer = "8-bit adamw" if settings["use_8bit_adam"] else settings.get("optimizer", "adamw")
    return {
        "samples a step": samples_a_step,
        "seed": settings["seed"],
        "use_ema": settings["use_ema"],
        "optimizer": optimizer,
        "task": task,
    }
