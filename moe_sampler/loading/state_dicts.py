"""Tensors out of any file they are kept in: memory-mapped, strict, and never executed."""

from __future__ import annotations

import difflib
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from .._readers import check_regular
from ..errors import CheckpointError, first_line, listed
from .hub import SUFFIXES

if TYPE_CHECKING:
    import torch

__all__ = [
    "check_fit",
    "header",
    "read_safetensors",
    "read_tensors",
    "read_torch",
    "refuse",
    "torch_header",
    "without_wrappers",
]

_STATE_DICTS = ("student", "model", "state_dict")
"""Where trainers put the weights among everything else they save."""

_SETTINGS = (
    *("metadata", "__metadata__", "hyper_parameters", "hparams", "cfg", "config", "args"),
    *("model_config", "scheduler", "scheduler_config", "noise_scheduler", "params"),
)
"""Where they put what they were told, and what is to be known of the weights."""

_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of DistributedDataParallel and of torch.compile."""


def read_safetensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(A file's tensors by key, as views of the mapped file; its metadata).

    Raises:
        CheckpointError: damaged, truncated or of another format.
    """
    check_regular(file)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            return tensors, opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _no_safetensors(file, error) from None


def header(file: Path) -> tuple[dict[str, str], list[str]]:
    """(A safetensors file's metadata; its tensors' keys), without its tensors.

    Raises:
        CheckpointError: damaged, truncated or of another format.
    """
    check_regular(file)
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}, list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise _no_safetensors(file, error) from None


def _no_safetensors(file: Path, error: Exception) -> CheckpointError:
    kind = "; it looks like a pickle" if _looks_pickled(file) else ""
    return CheckpointError(f"{file} cannot be read as safetensors: {first_line(error)}{kind}")


def read_torch(file: Path) -> Any:
    """What `torch.save` wrote, on the CPU, its tensors mapped; data alone.

    Raises:
        CheckpointError: damaged, of another format, or with anything in it but data.
    """
    import torch  # reading configs and headers of safetensors needs none

    check_regular(file)
    _refuse_disguised(file)
    try:
        # Only the zip format, torch's since 1.6, can be mapped.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if not _looks_pickled(file):
            raise CheckpointError(f"{file} is damaged or not a torch file") from None
        raise CheckpointError(
            f"{file} holds more than tensors, and loading it could run code, so it isn't loaded: "
            f"weights_only=True refuses {_refused(error)}. Save its state dict as .safetensors"
        ) from None
    except Exception as error:  # what a damaged pickle tells its reader to do may fail in any way
        raise CheckpointError(f"{file} is damaged or not a torch file: {first_line(error)}") from None


def _levels(saved: Any, file: Path) -> list[Any]:
    """What a trainer saved, what it saved the weights in, and so on down to the weights themselves."""
    levels = [saved]
    while isinstance(levels[-1], Mapping):
        inner = [key for key in _STATE_DICTS if isinstance(levels[-1].get(key), Mapping)]
        if len(inner) > 1:
            raise CheckpointError(f"{file} holds several state dicts ({listed(inner)}): keep one of them")
        if not inner:
            break
        levels.append(levels[-1][inner[0]])
    return levels


def torch_header(file: Path) -> tuple[dict[str, str], list[str]]:
    """(What a torch file says beside its weights, as text by key; its tensors' keys).

    That is every string, number and flag beside the state dict, and in the mappings among them under a
    name of `_SETTINGS`; on a key that is in several, those further out count.

    Raises:
        CheckpointError: as `read_torch`, or several state dicts.
    """
    import torch

    metadata: dict[str, str] = {}
    keys: dict[str, None] = {}
    waiting = [(level, 0) for level in _levels(read_torch(file), file) if isinstance(level, Mapping)]
    while waiting:
        level, depth = waiting.pop(0)
        for key, value in level.items():
            if torch.is_tensor(value) and not depth:
                keys[str(key)] = None
            elif isinstance(value, str | bool | int | float):
                metadata.setdefault(str(key), str(value))
            elif isinstance(value, Mapping) and key in _SETTINGS and depth < 3:
                waiting.append((value, depth + 1))
    return metadata, list(keys)


def _state_dict(saved: Any, file: Path) -> dict[str, torch.Tensor]:
    """The weights among what a trainer saved."""
    import torch

    saved = _levels(saved, file)[-1]
    if not isinstance(saved, Mapping) or not saved or not all(torch.is_tensor(v) for v in saved.values()):
        found = listed(list(saved)) if isinstance(saved, Mapping) else type(saved).__name__
        raise CheckpointError(
            f"{file} holds no state dict: expected tensors, or one under {', '.join(_STATE_DICTS)}; "
            f"found {found or 'nothing'}"
        )
    return dict(saved)


def read_tensors(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """All tensors of some files, by key, as views of the mapped files: read from disk when they are used.

    Raises:
        CheckpointError: damaged, truncated, of another format, or with anything in it but data.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        if file.suffix not in SUFFIXES:
            _refuse_disguised(file)
            raise CheckpointError(f"{file} is none of {', '.join(SUFFIXES)}")
        if file.suffix == ".safetensors":
            tensors |= read_safetensors(file)[0]
        else:
            tensors |= _state_dict(read_torch(file), file)
    return tensors


def without_wrappers(
    tensors: Mapping[str, torch.Tensor], prefixes: Sequence[str], where: str
) -> dict[str, torch.Tensor]:
    """Tensors without the prefixes that wrappers put before their names.

    Args:
        tensors: by name.
        prefixes: beside those of torch's own wrappers.
        where: for the message.

    Raises:
        CheckpointError: two tensors of the same name under different prefixes.
    """
    prefixes = (*prefixes, *_WRAPPERS)
    stripped: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        short = key
        while prefix := next((p for p in prefixes if short.startswith(p)), ""):
            short = short.removeprefix(prefix)
        if short in stripped:
            raise CheckpointError(f"{where} holds {short} twice, under different prefixes")
        stripped[short] = value
    return stripped


def refuse(where: str | Path, model: str, problems: Mapping[str, Sequence[Any]], hint: str = "") -> None:
    """Raise CheckpointError if a model's tensors have any problem.

    Args:
        where, model: for the message.
        problems: the names of tensors, by what is the matter with them; five of each are shown.
        hint: what was probably meant, as a sentence.
    """
    found = [f"{kind}: {listed(names)}" for kind, names in problems.items() if names]
    if found:
        text = f"{where} does not hold the tensors of its {model}; {'; '.join(found)}"
        raise CheckpointError(f"{text}. {hint}" if hint else text)


Guess = Callable[[Mapping[str, "torch.Tensor"], Mapping[str, "torch.Tensor"], Collection[str]], str]


def check_fit(
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    where: str | Path,
    model: str,
    guess: Guess = lambda tensors, expected, unexpected: "",
) -> None:
    """Whether the tensors are a model's, one for one.

    Args:
        tensors: by key.
        expected: the model's own, by key; on the meta device will do.
        where, model: for the message.
        guess: says what tensors that don't fit probably are, as `Architecture.guess`.

    Raises:
        CheckpointError: missing, unexpected or misshapen tensors, up to five named of each, and what was
            probably meant.
    """
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    common = sorted(expected.keys() & tensors.keys())
    misshapen = [
        f"{key} ({_shape(tensors[key])} instead of {_shape(expected[key])})"
        for key in common
        if tensors[key].shape != expected[key].shape
    ]
    integers = [f"{key} ({tensors[key].dtype})" for key in common if not tensors[key].is_floating_point()]
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "misshapen": misshapen,
        "not floats": integers,
    }
    if any(problems.values()):
        hint = guess(tensors, expected, unexpected) or _near_name(tensors, expected, missing, unexpected)
        refuse(where, model, problems, hint)


def _near_name(
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    missing: Sequence[str],
    unexpected: Sequence[str],
) -> str:
    if not missing or not unexpected:
        return ""
    for key in expected:
        longer = next((k for k in unexpected if k.endswith(f".{key}")), None)
        if longer is not None:
            prefix = longer.removesuffix(key)
            if sum(k.startswith(prefix) for k in tensors) > len(tensors) / 2:
                return f'The keys have the prefix "{prefix}": save the model without it'
            break
    near = difflib.get_close_matches(unexpected[0], missing, n=1, cutoff=0.8)
    return f"Was {unexpected[0]} meant to be {near[0]}?" if near else ""


def _shape(tensor: torch.Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


def _refused(error: pickle.UnpicklingError) -> str:
    """What torch refused to build, out of its long message."""
    said = str(error)
    found = re.search(r"GLOBAL (\S+)", said) or re.search(r"WeightsUnpickler error: (.+)", said)
    return found[1] if found else first_line(error)


def _refuse_disguised(file: Path) -> None:
    """Raise if it is a safetensors file: its header's length in 8 bytes, then that header, a JSON object."""
    try:
        with file.open("rb") as opened:
            start = opened.read(9)
        size = file.stat().st_size
    except OSError:
        return  # whoever reads it says why it can't be read
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        raise CheckpointError(f"{file} is a safetensors file: rename it to {file.stem}.safetensors")


def _looks_pickled(file: Path) -> bool:
    """A pickle of protocol 2 or later, or torch's zip with one inside."""
    try:
        with file.open("rb") as opened:
            return opened.read(1) == b"\x80" or zipfile.is_zipfile(file)
    except OSError:
        return False
