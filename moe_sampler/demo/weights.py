"""A stage's result: the averaged weights of what it trained, `ema.<parameter>`, and the steps it took."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._files import write_whole

__all__ = ["fill", "read_average", "trained_steps", "write_average"]

M = TypeVar("M", bound=nn.Module)
_PREFIX = "ema."


def write_average(path: Path, tensors: Mapping[str, Tensor], steps: int) -> None:
    """Write so that `path` is either absent, the old file or the complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {f"{_PREFIX}{name}": tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda temporary: save_file(named, temporary, {"step": str(steps)}))


def read_average(path: Path, part: str = "") -> dict[str, Tensor]:
    """The averaged weights whose names start with `part`, without it."""
    prefix = _PREFIX + part
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name[len(prefix) :]: file.get_tensor(name) for name in names}


def trained_steps(path: Path) -> int:
    """How long it was trained; 0 where there is no file."""
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["step"])


def fill(model: M, path: Path) -> M:
    """Give a model its averaged weights; what wasn't trained stays as it is.

    Raises:
        ValueError: weights that the model lacks.
    """
    averaged, state = read_average(path), model.state_dict()
    unknown = sorted(set(averaged) - set(state))
    if unknown:
        raise ValueError(f"{path} has tensors the model lacks, such as {unknown[0]}")
    model.load_state_dict({**state, **averaged})
    return model.eval()
