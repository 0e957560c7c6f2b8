"""What computes: the device, the number format, and a quiet terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .._numbers import whole
from ..pipelines.choices import DTYPES, MAX_IMAGES, OFFLOADS, SPEEDS, Offload, Speed, check_choice
from .imports import without_collecting
from .options import MachineOptions, SpeedOptions

__all__ = ["Machine", "check_device", "quiet"]

_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def check_device(name: str) -> Any:
    """The `torch.device` of that name, if it is here."""
    import torch

    try:
        device = torch.device(name)
    except (RuntimeError, ValueError, OverflowError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise ValueError(f'"{name}" is not a device: use cpu, cuda or cuda:N')
    if device.type in ("mps", "xpu") and not getattr(torch, device.type).is_available():
        raise ValueError(f"{device.type} is not available here: use --device cpu")
    if (
        device.type == "cuda"
        and torch.cuda.is_available()
        and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise ValueError(f"there is no {device}: this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("CUDA is not available here: use --device cpu")
    return device


@dataclass(frozen=True)
class Machine:
    """What computes.

    Args:
        device: as torch calls it.
        dtype: of the models, as torch calls it.
        offload, speed: as the pipeline takes them.
        chosen: whether the speed was asked for now, and not by an image that is made again.
    """

    device: str
    dtype: str
    offload: Offload
    speed: Speed = "none"
    chosen: bool = False

    @classmethod
    def read(cls, options: MachineOptions, previous: Mapping[str, Any]) -> Machine:
        """From the options, checked against this machine; an image's dtype counts before the default, but not
        before what a speed that is asked for chooses."""
        with without_collecting():
            import torch

        offload = check_choice("offload", options.offload, OFFLOADS)
        own_device = "cuda" if torch.cuda.is_available() else "cpu"
        device = own_device if options.device is None else options.device
        wanted = check_device(device)
        if options.offload == "model" and wanted.type == "cpu":
            raise ValueError("--offload model moves components to a GPU: on a CPU use --offload expert")
        if options.batch_size is not None:
            whole("--batch-size", options.batch_size, MAX_IMAGES)
        asked = options.speed if isinstance(options, SpeedOptions) else None
        speed = check_choice("speed", asked or previous.get("speed", "none"), SPEEDS)
        own = "auto" if speed != "none" else "float16" if wanted.type == "cuda" else "float32"
        kept = None if asked and asked != "none" else previous.get("dtype")
        given = options.dtype or kept or own
        if given == "auto":
            from ..pipelines.speed import fast_dtype

            given = str(fast_dtype(wanted)).removeprefix("torch.")
        dtype = check_choice("dtype", _SHORT.get(given, given), DTYPES)
        return cls(device, dtype, offload, speed, chosen=asked is not None)

    @property
    def settings(self) -> dict[str, str]:
        """What an image remembers of it."""
        return {"dtype": self.dtype} | ({} if self.speed == "none" else {"speed": self.speed})

    @property
    def torch_dtype(self) -> Any:
        """A `torch.dtype`."""
        import torch

        return getattr(torch, self.dtype)


def quiet() -> None:
    """Leave the terminal to our own progress bar."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
