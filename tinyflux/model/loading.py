"""Reading students from wherever their tensors lie: folders, the hub, single files, trainers' checkpoints.

Loading is strict: missing, unexpected or misshapen tensors are an error that names them, and `.pt` files are
read with `weights_only=True`.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_sampler.loading.folders import CheckpointError, read_config
from moe_sampler.tinyflux.model.config import TinyFluxConfig
from moe_sampler.tinyflux.model.tinyflux import TinyFlux

__all__ = ["config_from_state_dict", "load_tinyflux", "read_state_dict"]

WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "pytorch_model.safetensors",
    "weights.safetensors",
    "model.pt",
    "pytorch_model.pt",
    "weights.pt",
    "checkpoint.pt",
)
EMA_WEIGHTS = (
    "ema.safetensors",
    "model_ema.safetensors",
    "ema_weights.safetensors",
    "ema.pt",
    "model_ema.pt",
)
CONFIGS = ("config.json", "model_config.json")
"""File names in the order in which they are looked for."""

_NESTED = ("model", "state_dict", "model_state_dict", "student", "module")
_NESTED_EMA = ("ema", "ema_model", "ema_state_dict", "model_ema", "shadow", "shadow_params", *_NESTED)
_CONFIGS_OF_TRAINERS = ("model_config", "config", "cfg")
_Locate = Callable[[Sequence[str]], Path | None]


def load_tinyflux(
    source: str | os.PathLike,
    *,
    config: TinyFluxConfig | None = None,
    ema: bool | str = False,
    subfolder: str | None = None,
    torch_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    model_class: type[TinyFlux] = TinyFlux,
    **hub: Any,
) -> TinyFlux:
    """A trained student in eval mode.

    Args:
        source: a folder, a hub id ("owner/name"), or a `.safetensors` or `.pt` file. In folders and on the
            hub the first of `WEIGHTS` counts.
        config: what the model is; else what config.json beside the weights says, else what the file says of
            itself, else, for published checkpoints, what its tensors' shapes say.
        ema: True for averaged weights: the first of `EMA_WEIGHTS` or the only `*_ema` file, or those within a
            trainer's `.pt`; or the name of their file.
        subfolder: of the folder or hub repository.
        torch_dtype: of the model, float32 by default.
        device: to load to. Peak memory there is one copy.
        model_class: what to build.
        hub: for `huggingface_hub.hf_hub_download` (`revision`, `token`, `cache_dir`, `local_files_only` ...).

    Raises:
        CheckpointError: nothing there, unreadable, or not this model's tensors, up to five named a kind.
    """
    file, locate, averaged = _weights_file(os.fspath(source), ema, subfolder, hub)
    state, embedded = read_state_dict(file, ema=averaged)
    if config is None:
        beside = locate(CONFIGS)
        try:
            config = _config(read_config(beside) if beside is not None else embedded, state)
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"the config of {file} does not describe a TinyFlux: {error}") from error
    with torch.device("meta"):
        model = model_class(config)
    model = model.to(torch.float32 if torch_dtype is None else torch_dtype)
    own = model.state_dict()
    misshapen = [
        f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own and not model.ignores(name)]
    _refuse(file, {"missing": missing, "unexpected": unexpected, "misshapen": misshapen})
    model = model.to_empty(device=device)
    model.load_state_dict(state)
    return model.eval()


def from_diffusers(load: Callable[..., Any], source: str | os.PathLike, **kwargs: Any) -> Any:
    """diffusers' `from_pretrained`, strict; with `output_loading_info` the caller judges what it says."""
    if kwargs.get("output_loading_info"):
        return load(source, **kwargs)
    try:
        model, info = load(source, output_loading_info=True, **kwargs)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{source} cannot be loaded as a TinyFlux: {reason[0]}") from error
    _refuse(source, {kind: info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")})
    return model


def _refuse(source: str | os.PathLike, problems: Mapping[str, Sequence[Any]]) -> None:
    found = [f"{kind}: {_first([str(n) for n in names])}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{source} does not hold the tensors of its TinyFlux; {'; '.join(found)}")


def _first(names: Sequence[str]) -> str:
    shown = ", ".join(list(names)[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


# Where things are


def _weights_file(
    source: str, ema: bool | str, subfolder: str | None, hub: Mapping[str, Any]
) -> tuple[Path, _Locate, bool]:
    """(The file of weights, how to find files beside it, whether the averaged weights are within it)."""
    path = Path(source)
    if path.is_file():
        locate = _in_folder(path.parent)
        if not ema:
            return path, locate, False
        if isinstance(ema, str):
            return _found(locate((ema,)), f"{ema} beside {path}"), locate, False
        beside = locate([f"{path.stem}_ema.safetensors", f"{path.stem}_ema.pt"])
        if path.suffix == ".safetensors" or beside is not None:
            return _found(beside, f"{path.stem}_ema.safetensors beside {path}"), locate, False
        return path, locate, True
    if path.is_dir():
        folder = path / (subfolder or "")
        locate = _in_folder(folder)
        if ema is True:
            return _ema_in_folder(folder, locate), locate, False
        place = str(folder)
    else:
        locate = _on_hub(source, subfolder, hub)
        place = f"{source}, or the hub cannot be reached"
    wanted = (ema,) if isinstance(ema, str) else EMA_WEIGHTS if ema else WEIGHTS
    return _found(locate(wanted), f"{' or '.join(wanted)} in {place}"), locate, False


def _found(file: Path | None, what: str) -> Path:
    if file is None:
        raise CheckpointError(f"there is no {what}")
    return file


def _in_folder(folder: Path) -> _Locate:
    return lambda names: next((folder / name for name in names if (folder / name).is_file()), None)


def _ema_in_folder(folder: Path, locate: _Locate) -> Path:
    named = locate(EMA_WEIGHTS)
    if named is not None:
        return named
    others = sorted({*folder.glob("*_ema.safetensors"), *folder.glob("*_ema.pt")})
    if len(others) > 1:
        raise CheckpointError(f"{folder} has several averages, name one: {_first([f.name for f in others])}")
    return _found(others[0] if others else None, f"{EMA_WEIGHTS[0]} or *_ema.safetensors in {folder}")


def _on_hub(repository: str, subfolder: str | None, hub: Mapping[str, Any]) -> _Locate:
    def locate(names: Sequence[str]) -> Path | None:
        for name in names:
            try:
                return Path(hf_hub_download(repository, name, subfolder=subfolder, **hub))
            except EntryNotFoundError:
                continue
            except (HFValidationError, RepositoryNotFoundError, OSError) as error:
                reason = str(error).strip().splitlines()[0]
                raise CheckpointError(
                    f"{repository} is neither a file, a folder nor on the hub: {reason}"
                ) from error
        return None

    return locate


# What is in a file


def read_state_dict(
    file: str | os.PathLike, *, ema: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(Tensors by their names in the model, the config that the file holds, or None).

    Trainers nest them, as `model`, `state_dict` and the like, and wrappers prefix `module.` and `_orig_mod.`.

    Args:
        file: `.safetensors`, else a checkpoint of `torch.save`.
        ema: the averaged weights of a trainer's checkpoint (`ema`, upstream's `ema.shadow`).

    Raises:
        CheckpointError: unreadable, or without tensors where they should be.
    """
    file = Path(file)
    if file.suffix == ".safetensors":
        state, config = _read_safetensors(file)
    else:
        state, config = _read_pickle(file, ema)
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    while prefix := next((p for p in ("module.", "model.") if all(n.startswith(p) for n in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state, config


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get("config")
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        config = None if text is None else json.loads(text)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not state:
        raise CheckpointError(f"{file} holds no tensors")
    return state, config


def _read_pickle(file: Path, ema: bool) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{file} cannot be read with weights_only=True: {reason[0]}") from error
    config = None
    if isinstance(content, Mapping):
        config = next((content[k] for k in _CONFIGS_OF_TRAINERS if isinstance(content.get(k), Mapping)), None)
    state, needed = content, ema
    while not _is_state(state):
        names = _NESTED_EMA if ema else _NESTED
        inner = next(
            (n for n in names if isinstance(state, Mapping) and isinstance(state.get(n), Mapping)), None
        )
        if inner is None or (needed and inner in _NESTED):
            what = "averaged weights" if ema else "weights"
            raise CheckpointError(f"{file} holds no {what}: looked for {', '.join(names)}")
        state, needed = state[inner], False
    if needed:
        raise CheckpointError(f"{file} holds one set of weights, no averaged ones beside it")
    return dict(state), config


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(v, Tensor) for v in content.values())
    )


# What the tensors belong to


def _config(given: Mapping[str, Any] | None, state: Mapping[str, Tensor]) -> TinyFluxConfig:
    if given is None:
        return config_from_state_dict(state)
    config = TinyFluxConfig.from_dict(given)
    # Upstream's own configs don't say whether the two unused tensors are there.
    return config if "sol_qk_scale" in given else config.replace(sol_qk_scale=_has_qk_scale(state))


def _has_qk_scale(state: Mapping[str, Tensor]) -> bool:
    return "sol_prior.spatial_to_qk_scale.weight" in state


def config_from_state_dict(state: Mapping[str, Tensor]) -> TinyFluxConfig:
    """The config of a published checkpoint, from its tensors' names and shapes.

    state: tensors by their names in the model.

    Raises:
        CheckpointError: not such a checkpoint; a new model's, whose config.json is needed.
    """
    if "null_text" in state or any("norm_q" in name for name in state):
        raise CheckpointError("these tensors are of a new model: give its config, or config.json beside them")
    frequencies = [state[f"rope.freqs_{i}"] for i in range(3) if f"rope.freqs_{i}" in state]
    required = ("img_in.weight", "txt_in.weight", "vector_in.1.weight")
    absent = [name for name in required if name not in state]
    if absent or len(frequencies) < 3:
        raise CheckpointError(
            f"these are not a TinyFlux's tensors: no {_first(absent or ['rope.freqs_0..2'])}"
        )
    width, channels = state["img_in.weight"].shape
    axes = tuple(2 * len(f) for f in frequencies)
    found = {
        "hidden_size": width,
        "attention_head_dim": sum(axes),
        "num_attention_heads": width // sum(axes),
        "in_channels": channels,
        "joint_attention_dim": state["txt_in.weight"].shape[1],
        "pooled_projection_dim": state["vector_in.1.weight"].shape[1],
        "num_double_layers": _count(state, "double_blocks"),
        "num_single_layers": _count(state, "single_blocks"),
        "axes_dims_rope": axes,
        "use_t5_vec": "text_balance" in state,
        "use_lune_expert": "lune_predictor.expert_gate" in state,
        "use_sol_prior": "sol_prior.blend_gate" in state,
        "sol_qk_scale": _has_qk_scale(state),
    }
    inner = next((t for name, t in state.items() if name.endswith("mlp.fc1.weight")), None)
    if inner is not None:
        found["mlp_ratio"] = inner.shape[0] / width
    if found["use_lune_expert"]:
        found["lune_hidden_dim"] = state["lune_predictor.input_proj.weight"].shape[0]
        found["lune_expert_dim"] = state["lune_predictor.output_proj.0.weight"].shape[0]
    if found["use_sol_prior"]:
        found["sol_hidden_dim"] = state["sol_prior.stat_predictor.0.weight"].shape[0]
        found["sol_spatial_size"] = round(state["sol_prior.spatial_predictor.4.weight"].shape[0] ** 0.5)
    return TinyFluxConfig.deep_v4(**found)


def _count(state: Mapping[str, Tensor], blocks: str) -> int:
    matches = (re.match(rf"{blocks}\.(\d+)\.", name) for name in state)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)
