"""The optimizer and the learning rate of each step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from transformers.optimization import get_wsd_schedule

from .muon import Muon
from .settings import SettingsError
from .training_settings import TrainingSettings

__all__ = ["learning_rate", "new_optimizer"]


def new_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Of what requires a gradient: AdamW, with 8-bit moments if asked for, Adafactor, or Muon.

    Raises:
        SettingsError: 8-bit moments without bitsandbytes or CUDA.
    """
    arguments = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "weight_decay": settings.adam_weight_decay,
        "eps": settings.adam_epsilon,
    }
    if settings.optimizer == "muon":
        return Muon(model, **arguments)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if settings.optimizer == "adafactor":
        # Fixed steps: its own schedule would come on top of ours.
        return torch.optim.Adafactor(
            parameters, lr=settings.learning_rate, weight_decay=settings.adam_weight_decay
        )
    if not settings.use_8bit_adam:
        return torch.optim.AdamW(
            parameters, **arguments, fused=True
        )  # in one pass: on a CPU a fifth of the time
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SettingsError("use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from None
    if not torch.cuda.is_available():
        raise SettingsError("use_8bit_adam needs a CUDA device")
    return bitsandbytes.optim.AdamW8bit(parameters, **arguments)


def learning_rate(settings: TrainingSettings) -> Callable[[int], float]:
    """The rate of step 0, 1 ...: the named schedule, never below the floor, and staying at the last step's
    from there on, where a cosine would rise again."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)  # the schedules want one
    steps = settings.max_train_steps
    if settings.lr_scheduler == "warmup_stable_decay":
        schedule = get_wsd_schedule(
            optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_decay_steps=settings.lr_decay_steps,
            num_training_steps=steps,
            min_lr_ratio=settings.lr_floor,
        )
    else:
        schedule = get_scheduler(
            settings.lr_scheduler,
            optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=steps,
            num_cycles=settings.lr_num_cycles,
            power=settings.lr_power,
        )
    (share,) = schedule.lr_lambdas

    # transformers' warm-up begins at the floor where diffusers' begin at nothing.
    ramps = settings.lr_scheduler == "warmup_stable_decay"

    def rate(step: int) -> float:
        # The step that is about to be made: a warm-up's first step learns too.
        here = share(min(step + 1, steps))
        if step + 1 < settings.lr_warmup_steps:
            return settings.learning_rate * ((step + 1) / settings.lr_warmup_steps if ramps else here)
        return settings.learning_rate * max(here, settings.lr_floor)

    return rate
