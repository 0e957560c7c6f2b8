"""A UNet's tensors out of any file they are kept in: memory-mapped, strict, and never executed."""

from __future__ import annotations

import difflib
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .folders import CheckpointError, names

__all__ = ["check_fit", "read_tensors", "unet_tensors"]

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)

_STATE_DICTS = ("student", "model", "state_dict")
"""Where trainers put the weights among everything else they save."""

_WRAPPERS = ("unet.", "module.", "_orig_mod.")
"""Prefixes of trainers, of DistributedDataParallel and of torch.compile."""

_ORIGINAL = "model.diffusion_model."
_ORIGINAL_BLOCKS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.")

_FOREIGN = (
    (("lora_A", "lora_B", "lora_down", "lora_up", "lora.down", "lora.up"), "a LoRA: use load_lora_weights"),
    (("controlnet_cond_embedding", "controlnet_"), "a ControlNet"),
    (("add_embedding.", "label_emb."), "an SDXL UNet"),
    (("double_blocks.", "single_blocks.", "transformer_blocks.0.attn."), "a transformer, not a UNet"),
    (("down_blocks.0.motion_modules",), "a video UNet"),
    (("text_model.encoder.", "token_embedding."), "a text encoder"),
    (("quant_conv.", "encoder.mid_block.", "decoder.mid_block.", "decoder.conv_in."), "a VAE"),
)
"""Parts of keys by which other models are known; the first that fits counts."""


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        kind = "; it looks like a pickle" if _head(file)[:1] == b"\x80" or _is_zip(file) else ""
        raise CheckpointError(f"{file} cannot be read as safetensors: {_first_line(error)}{kind}") from None


def _read_torch(file: Path) -> dict[str, torch.Tensor]:
    try:
        # Only the zip format, torch's since 1.6, can be mapped.
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors, and loading it could run code, so it isn't loaded: "
            f"{_refused(error)}. Save its state dict as .safetensors"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged or not a torch file: {_first_line(error)}") from None
    return _state_dict(saved, file)


def _state_dict(saved: Any, file: Path) -> dict[str, torch.Tensor]:
    """The weights among what a trainer saved."""
    while isinstance(saved, Mapping):
        inner = [key for key in _STATE_DICTS if isinstance(saved.get(key), Mapping)]
        if len(inner) > 1:
            raise CheckpointError(f"{file} holds several state dicts ({names(inner)}): keep one of them")
        if not inner:
            break
        saved = saved[inner[0]]
    if not isinstance(saved, Mapping) or not saved or not all(torch.is_tensor(v) for v in saved.values()):
        found = names([str(key) for key in saved]) if isinstance(saved, Mapping) else type(saved).__name__
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
            raise CheckpointError(f"{file} is none of {', '.join(SUFFIXES)}")
        read = _read_safetensors if file.suffix == ".safetensors" else _read_torch
        tensors |= read(file)
    return tensors


def unet_tensors(files: Sequence[Path], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A UNet's tensors under diffusers' names: without wrappers' prefixes, converted from the original names.

    Args:
        files: of one UNet; several when it is sharded.
        config: of the UNet.
    """
    tensors = _without_wrappers(read_tensors(files), files[0])
    bare = any(key.startswith(_ORIGINAL_BLOCKS) for key in tensors)
    if not bare and not any(key.startswith(_ORIGINAL) for key in tensors):
        return tensors
    return _converted({_ORIGINAL + key: value for key, value in tensors.items()} if bare else tensors, config)


def _without_wrappers(tensors: Mapping[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    stripped: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        short = key
        while short.startswith(_WRAPPERS):
            short = short[next(len(prefix) for prefix in _WRAPPERS if short.startswith(prefix)) :]
        if short in stripped:
            raise CheckpointError(f"{file} holds {short} twice, under different prefixes")
        stripped[short] = value
    return stripped


def _converted(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """From the original Stable Diffusion names, by diffusers' own converter."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    converted = convert_ldm_unet_checkpoint(dict(tensors), dict(config))
    # It leaves out what it doesn't know; that must not go unnoticed.
    used = {value.data_ptr() for value in converted.values()}
    for key, value in tensors.items():
        if key.startswith(_ORIGINAL) and value.data_ptr() not in used:
            converted[key] = value
    return converted


def check_fit(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], where: str, model: str
) -> None:
    """Whether the tensors are a model's, one for one.

    Args:
        tensors: by key.
        expected: the model's own, by key; on the meta device will do.
        where, model: for the message.

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
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen, "not floats": integers}
    found = [f"{kind}: {names(keys)}" for kind, keys in kinds.items() if keys]
    if not found:
        return
    hint = _hint(tensors, expected, missing, unexpected)
    raise CheckpointError(
        f"{where} does not hold the tensors of its {model}; {'; '.join(found)}{hint and f'. {hint}'}"
    )


def _hint(
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    missing: Sequence[str],
    unexpected: Sequence[str],
) -> str:
    """What was probably meant, or nothing."""
    for parts, meaning in _FOREIGN:
        strange = [key for key in unexpected if any(part in key for part in parts)]
        if strange and not any(any(part in key for part in parts) for key in expected):
            return f"This looks like {meaning}"
    if any(key.startswith((_ORIGINAL, *_ORIGINAL_BLOCKS, "first_stage_model.")) for key in unexpected):
        return "These look like original-format keys of another architecture than the config's"
    if "conv_in.weight" in tensors and "conv_in.weight" in expected:
        channels, own = tensors["conv_in.weight"].shape[1], expected["conv_in.weight"].shape[1]
        if channels != own:
            return f"Its latents have {channels} channels, not {own}: an inpainting or other special UNet"
    cross = next((key for key in expected if key.endswith("attn2.to_k.weight")), None)
    if cross in tensors and tensors[cross].shape[-1:] != expected[cross].shape[-1:]:
        return f"It was trained on text features of {tensors[cross].shape[-1]} channels, as another base has"
    if missing and unexpected:
        return _near_name(tensors, expected, missing, unexpected)
    return ""


def _near_name(
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    missing: Sequence[str],
    unexpected: Sequence[str],
) -> str:
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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _refused(error: pickle.UnpicklingError) -> str:
    """What torch refused to build, out of its long message."""
    text = str(error)
    at = text.find("GLOBAL ")
    return text[at + len("GLOBAL ") :].split()[0] if at >= 0 else _first_line(error)


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(4)
    except OSError:
        return b""


def _is_zip(file: Path) -> bool:
    return zipfile.is_zipfile(file)
