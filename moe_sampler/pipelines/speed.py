"""What makes models faster without changing what is sampled: number format, memory layout, compilation.
`projections` has what attentions do with theirs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .choices import SPEEDS, Speed, check_choice

__all__ = [
    "SPEEDS",
    "Speed",
    "check_speed",
    "compile_blocks",
    "experts_read_channels_last",
    "fast_dtype",
    "lay_out",
    "run_uncompiled",
]

_DECODERS_BLOCKS = ("ResnetBlock2D", "AutoencoderTinyBlock")
"""What decoders repeat: diffusers names no blocks of theirs."""

KINDS_OF_A_BLOCK = 64
"""Shapes, batches and number formats that one class of blocks is compiled for. torch's own limit, 8, is that
of Stable Diffusion 1.5's blocks in two sizes; beyond it blocks would run as they are, unasked."""


def check_speed(speed: str) -> None:
    check_choice("speed", speed, SPEEDS)


def fast_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """The number format that a device computes fastest in without scaling: bfloat16 where it is in silicon
    (CUDA from compute capability 8, CPUs with AVX-512 BF16 or AMX), float16 on older CUDA devices, float32
    elsewhere.

    device: by default CUDA where it is, else the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu" and _cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def experts_read_channels_last(device: torch.device) -> bool:
    """Whether that layout makes a UNet faster. Matrix units read it; on a CPU without them, an AMD EPYC, a
    pass of Stable Diffusion 1.5's in bfloat16 took 5 % longer with it, and the VAE's decoder 7 % less."""
    return device.type != "cpu" or _cpu_has("amx_tile")


def _cpu_has_bfloat16() -> bool:
    return _cpu_has("avx512_bf16") or _cpu_has("amx_tile")


def _cpu_has(what: str) -> bool:
    # torch has no public name for it.
    return getattr(torch.cpu, f"_is_{what}_supported", lambda: False)()


def lay_out(models: Iterable[torch.nn.Module], channels_last: bool) -> None:
    """Keep the weights of convolutions in the order that they are read in, or in torch's own; in place."""
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    for model in models:
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=wanted)


def compile_blocks(models: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    """Compile models' repeated blocks, as diffusers names them, each for the sizes it meets; what is compiled
    already stays so.

    models: experts', and a VAE's decoder.

    Returns:
        The blocks that were not compiled before.

    Raises:
        ValueError: a model that has none; nothing is compiled.
    """
    blocks = [block for model in models for block in _repeated_blocks(model)]
    new = [block for block in blocks if block._compiled_call_impl is None]
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, KINDS_OF_A_BLOCK)
    for block in new:
        block.compile(dynamic=False)
    return new


def _repeated_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    names: Any = getattr(model, "_repeated_blocks", None) or _DECODERS_BLOCKS
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(f'a {type(model).__name__} has no repeated blocks to compile: use speed="fast"')
    return blocks


def run_uncompiled(blocks: Iterable[torch.nn.Module]) -> None:
    """Take back what `compile_blocks` did to the blocks that it returned."""
    for block in blocks:
        block._compiled_call_impl = None
