"""How a run trains, whatever it trains. Names are those of diffusers' training scripts where it has one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

__all__ = ["Scheduler", "TrainingSettings"]

Scheduler = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "warmup_stable_decay",
]


@dataclass(frozen=True)
class TrainingSettings:
    """Everything but the model, the data and the loss.

    Raises:
        ValueError: values out of range, or that contradict each other.
    """

    output_dir: Annotated[Path, "Folder of the run: checkpoints, logs, pictures, and the trained model."]
    max_train_steps: Annotated[int, "Optimizer steps in all."] = 10_000
    num_train_epochs: Annotated[
        float | None,
        "In place of max_train_steps: how often every sample is seen, rounded up to whole steps.",
    ] = None
    train_batch_size: Annotated[int, "Samples a process computes at once."] = 16
    gradient_accumulation_steps: Annotated[int, "Such batches that make one step."] = 1
    learning_rate: Annotated[float, "Peak learning rate."] = 1e-4
    lr_scheduler: Annotated[Scheduler, "diffusers' schedules, or transformers' warmup_stable_decay."] = (
        "cosine"
    )
    lr_warmup_steps: Annotated[int, "Steps of linear warm-up."] = 500
    lr_decay_steps: Annotated[int, "warmup_stable_decay: how many of the last steps decay."] = 0
    lr_num_cycles: Annotated[int, "cosine_with_restarts: how often."] = 1
    lr_power: Annotated[float, "polynomial: the exponent."] = 1.0
    lr_floor: Annotated[float, "Share of learning_rate that it never falls below."] = 0.0
    optimizer: Annotated[
        Literal["adamw", "adafactor", "muon"],
        "AdamW; Adafactor (arXiv:1804.04235), whose moments take next to no memory; or Muon "
        "(arXiv:2502.16982) for hidden layers and AdamW for the rest, which learns more in a step. "
        "learning_rate counts for each as it is.",
    ] = "adamw"
    use_8bit_adam: Annotated[bool, "AdamW with 8-bit moments; needs bitsandbytes."] = False
    adam_beta1: Annotated[float, "AdamW's decay of the mean."] = 0.9
    adam_beta2: Annotated[float, "AdamW's decay of the square."] = 0.99
    adam_weight_decay: Annotated[float, "AdamW's weight decay."] = 0.01
    adam_epsilon: Annotated[float, "AdamW's epsilon."] = 1e-8
    max_grad_norm: Annotated[float, "Gradients are clipped to this norm; 0 leaves them."] = 1.0
    mixed_precision: Annotated[
        Literal["no", "fp16", "bf16"] | None, "Default: what `accelerate launch` was told, or no."
    ] = None
    gradient_checkpointing: Annotated[bool, "Compute activations twice to save memory."] = False
    torch_compile: Annotated[bool, "Compile the model."] = False
    torch_compile_mode: Annotated[
        Literal["default", "reduce-overhead", "max-autotune"],
        "How: reduce-overhead replays CUDA graphs, for small models that the host can't keep busy.",
    ] = "default"
    cuda_graph: Annotated[
        bool,
        "Record the whole step as one CUDA graph and replay it: for models so small that a GPU is done with "
        "each operation before the host has launched the next.",
    ] = False
    use_ema: Annotated[bool, "Average the weights; the average is what is validated and saved."] = True
    ema_decay: Annotated[float, "Largest decay of the average; it warms up to it."] = 0.9995
    seed: Annotated[int, "Of the order of samples, noise, times and dropout."] = 0
    dataloader_num_workers: Annotated[int, "Processes that read data; 0 reads in the training process."] = 0
    checkpointing_steps: Annotated[int, "Steps between checkpoints."] = 500
    checkpoints_total_limit: Annotated[int, "How many are kept."] = 2
    resume_from_checkpoint: Annotated[
        str | None, 'Folder of a checkpoint, "latest" (the default: continue if there is one), or "no".'
    ] = "latest"
    validation_steps: Annotated[int, "Steps between validations; 0 validates at the end only."] = 500
    sample_steps: Annotated[int, "Steps between sheets of samples; 0 makes one at the end only."] = 500
    logging_steps: Annotated[int, "Steps between lines of the log; their losses are averaged."] = 20
    noise_bins: Annotated[int, "The loss is logged in so many parts of the noise axis."] = 5
    report_to: Annotated[str, "Tracker: tensorboard, wandb ... as Accelerate knows them, or none."] = (
        "tensorboard"
    )
    on_nonfinite: Annotated[
        Literal["stop", "skip"], "A loss or gradient that isn't finite: stop and keep its samples, or skip."
    ] = "stop"
    max_skipped: Annotated[int, "skip: so many skipped steps in a row stop the run after all."] = 50
    push_to_hub: Annotated[bool, "Upload the trained model at the end."] = False
    hub_strategy: Annotated[
        Literal["end", "every_save"],
        "push_to_hub: when; every_save also uploads the averaged model with every checkpoint, in the "
        "background.",
    ] = "end"
    hub_model_id: Annotated[str | None, "Repository on the hub; default: the folder's name."] = None
    license: Annotated[str | None, "The trained model's, as the hub calls it (mit ...), for its card."] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_dir", Path(self.output_dir))
        positive = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "noise_bins")
        positive += ("checkpointing_steps", "checkpoints_total_limit", "logging_steps", "max_skipped")
        for name in (*positive, "lr_num_cycles"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        counts = ("lr_warmup_steps", "lr_decay_steps", "dataloader_num_workers", "validation_steps", "seed")
        for name in (*counts, "sample_steps", "max_grad_norm", "adam_weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.num_train_epochs is not None and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"num_train_epochs must be positive, got {self.num_train_epochs}")
        if self.optimizer != "adamw" and self.use_8bit_adam:
            raise ValueError(f"use_8bit_adam is for optimizer adamw, which is {self.optimizer}")
        for name in ("learning_rate", "adam_epsilon", "lr_power"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.lr_floor <= 1:
            raise ValueError(f"lr_floor must lie between 0 and 1, got {self.lr_floor}")
        known = self.num_train_epochs is None  # else a run tells how many steps that is
        if known and self.lr_warmup_steps + self.lr_decay_steps > self.max_train_steps:
            raise ValueError(
                f"lr_warmup_steps ({self.lr_warmup_steps}) and lr_decay_steps ({self.lr_decay_steps}) are "
                f"more than max_train_steps ({self.max_train_steps}): lower them"
            )
        if self.lr_decay_steps and self.lr_scheduler != "warmup_stable_decay":
            raise ValueError("lr_decay_steps is for lr_scheduler warmup_stable_decay alone")
        if self.cuda_graph and self.torch_compile and self.torch_compile_mode != "default":
            raise ValueError(
                f"torch_compile_mode {self.torch_compile_mode} makes CUDA graphs of its own; beside ours "
                "use default"
            )

    def in_steps(self, samples: int, per_step: int) -> TrainingSettings:
        """The same with the steps that num_train_epochs come to.

        Raises:
            ValueError: warm-up and decay are more.
        """
        assert self.num_train_epochs is not None
        steps = math.ceil(self.num_train_epochs * samples / per_step)
        return replace(self, max_train_steps=steps, num_train_epochs=None)
