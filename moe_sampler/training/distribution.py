"""Accelerate's part: processes, precision, and the model as each process holds it."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, ProjectConfiguration
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from .optimization import new_optimizer
from .settings import SettingsError
from .training_settings import TrainingSettings

__all__ = ["new_accelerator", "prepare", "sharded"]

_WHOLE = "NO_WRAP"


def new_accelerator(settings: TrainingSettings) -> Accelerator:
    """What `accelerate launch` and the settings say.

    Raises:
        SettingsError: a tracker that isn't installed, a precision that this machine can't do.
    """
    trackers = [] if settings.report_to == "none" else [settings.report_to]
    known = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    if trackers and trackers[0] not in known:
        raise SettingsError(
            f"report_to: {trackers[0]} is not installed or not known (pip install {trackers[0]}); here are: "
            f"{', '.join(known) or 'none'}. report_to none does without"
        )
    try:
        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            log_with=[*trackers] or None,
            project_config=ProjectConfiguration(
                project_dir=str(settings.output_dir), logging_dir=str(settings.output_dir / "logs")
            ),
            # What an objective that is switched off would have trained gets no gradient.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except ValueError as error:
        raise SettingsError(f"mixed_precision: {error}") from None
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise SettingsError(
            f"mixed_precision fp16 has no gradient scaling on {accelerator.device.type}, and small gradients "
            "would be lost: use bf16 or no"
        )
    return accelerator


def sharded(accelerator: Accelerator) -> bool:
    """Whether the launcher asked for FSDP. Accelerate itself leaves it out on CPUs."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return accelerator.distributed_type == DistributedType.FSDP or (asked and accelerator.num_processes > 1)


def prepare(
    accelerator: Accelerator, model: nn.Module, settings: TrainingSettings
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """(The model to call, its optimizer), wrapped for DDP or FSDP as the launcher asked.

    Raises:
        SettingsError: FSDP's first version, parameters that aren't float32.
    """
    wrong = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if wrong:
        raise SettingsError(
            f"{wrong[0]} is {model.get_parameter(wrong[0]).dtype}: what is trained must be float32; "
            "mixed_precision does the work in less"
        )
    if settings.gradient_checkpointing:
        enable = getattr(model, "enable_gradient_checkpointing", None)
        if enable is None:
            raise SettingsError(f"{type(model).__name__} has no gradient checkpointing")
        enable()
    shard = sharded(accelerator)
    if shard:
        if settings.optimizer != "adamw":
            raise SettingsError(
                f"{settings.optimizer} needs whole matrices, which FSDP shards: use optimizer adamw with it"
            )
        version = os.environ.get("FSDP_VERSION", "2")
        if version != "2":
            raise SettingsError(f"FSDP version {version} is not supported: launch with --fsdp_version 2")
        if os.environ.get("FSDP_AUTO_WRAP_POLICY", _WHOLE) != _WHOLE:
            raise SettingsError(
                "the model is sharded as one, since what all its blocks share is computed from parameters of "
                f"each: launch with --fsdp_auto_wrap_policy {_WHOLE}"
            )
        _scalars_to_vectors(model)
    if shard and accelerator.distributed_type != DistributedType.FSDP:
        _shard_on_cpu(model, accelerator)
        return model, accelerator.prepare(new_optimizer(model, settings))
    if settings.torch_compile:
        model.compile(mode=settings.torch_compile_mode)
    return accelerator.prepare(model, new_optimizer(model, settings))


def _scalars_to_vectors(model: nn.Module) -> None:
    """FSDP has no place for parameters without dimensions; one of size 1 computes the same."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                vector = nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad)
                setattr(module, name, vector)


def _shard_on_cpu(model: nn.Module, accelerator: Accelerator) -> None:
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, output_dtype=None if dtype is None else torch.float32)
    mesh = torch.distributed.init_device_mesh("cpu", (accelerator.num_processes,))
    fully_shard(model, mesh=mesh, mp_policy=policy)
