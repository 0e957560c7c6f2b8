"""Reading students from wherever their tensors lie: folders, the hub, single files, trainers' checkpoints.

Loading is strict: missing, unexpected or misshapen tensors are an error that names them, and `.pt` files are
read with `weights_only=True`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_sampler._readers import parse_json
from moe_sampler.errors import CheckpointError, listed
from moe_sampler.loading.folders import INDEX, load_strictly, read_config
from moe_sampler.loading.hub import Hub, Place
from moe_sampler.loading.state_dicts import check_fit, read_safetensors, read_torch
from moe_sampler.tinyflux.model.config import TinyFluxConfig
from moe_sampler.tinyflux.model.tinyflux import TinyFlux

__all__ = [
    "STUDENT_FOLDER",
    "config_from_state_dict",
    "holds_pipeline",
    "load_config",
    "load_tinyflux",
    "read_state_dict",
    "within_pipeline",
]

STUDENT_FOLDER = "transformer"
"""Of a whole pipeline, as diffusers calls it."""

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
LAST_WEIGHTS = ("final.safetensors", "final.pt")
BEST_WEIGHTS = ("best.safetensors", "best.pt")
EMA_WEIGHTS = (
    "ema.safetensors",
    "model_ema.safetensors",
    "ema_weights.safetensors",
    "ema.pt",
    "model_ema.pt",
)
CONFIGS = ("config.json", "model_config.json")
"""File names in the order in which they are looked for; of a trainer's folder the last weights come first,
`final` or the highest `step_N` or `epoch_N`, then `best`."""

_NUMBERED = re.compile(r"(?:step|epoch)_(\d+)\.(?:safetensors|pt)")

_NESTED = ("model", "state_dict", "model_state_dict", "student", "module")
_NESTED_EMA = ("ema", "ema_model", "ema_state_dict", "model_ema", "shadow", "shadow_params", *_NESTED)
_CONFIGS_OF_TRAINERS = ("model_config", "config", "cfg")


def load_tinyflux(
    source: str | os.PathLike,
    *,
    config: TinyFluxConfig | None = None,
    ema: bool | str = False,
    subfolder: str | None = None,
    revision: str | None = None,
    torch_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    model_class: type[TinyFlux] = TinyFlux,
    **hub: Any,
) -> TinyFlux:
    """A trained student in eval mode.

    Args:
        source: a folder, a hub id `owner/name`, a hub file `owner/name:file`, or a `.safetensors` or `.pt`
            file; of a whole pipeline the student is taken. In folders and repositories the first of `WEIGHTS`
            counts, then a trainer's `final`, its last `step_N` or `epoch_N` (on this machine alone), and its
            `best`.
        config: what the model is; else what config.json beside the weights says, else what the file says of
            itself, else, for published checkpoints, what its tensors' shapes say.
        ema: True for averaged weights: the first of `EMA_WEIGHTS` or the only `*_ema` file, or those within a
            trainer's `.pt`; or the name of their file.
        subfolder: of the folder or hub repository.
        revision: of the hub repository.
        torch_dtype: of the model, float32 by default.
        device: to load to. Peak memory there is one copy.
        model_class: what to build.
        hub: how to ask the hub, as `moe_sampler.loading.hub.Hub` (`token`, `cache_dir`, `local_files_only`,
            `force_download`).

    Raises:
        CheckpointError: nothing there, unreadable, or not this model's tensors, up to five named a kind.
    """
    place = within_pipeline(Hub(**hub).look(os.fspath(source), revision=revision, subfolder=subfolder))
    file, averaged = _weights_file(place, ema)
    state, embedded = read_state_dict(file, ema=averaged)
    if config is None:
        beside = _config_file(place)
        with _describing(file):
            config = _config(read_config(beside) if beside is not None else embedded, state)
    with torch.device("meta"):
        model = model_class(config)
    model = model.to(torch.float32 if torch_dtype is None else torch_dtype)
    own = model.state_dict()
    known = {name: tensor for name, tensor in state.items() if name in own or not model.ignores(name)}
    check_fit(known, own, file, model_class.__name__)
    model = model.to_empty(device=device)
    model.load_state_dict(state)
    return model.eval()


def load_config(source: str | os.PathLike, *, ema: bool | str = False, **hub: Any) -> TinyFluxConfig:
    """The config of what `load_tinyflux` would load; the weights are read where nothing else says it.

    Raises:
        CheckpointError: as `load_tinyflux`.
    """
    place = within_pipeline(Hub(**hub).look(os.fspath(source)))
    beside = _config_file(place)
    if beside is not None:
        with _describing(beside):
            return TinyFluxConfig.from_dict(read_config(beside))
    file, averaged = _weights_file(place, ema)
    state, embedded = read_state_dict(file, ema=averaged)
    with _describing(file):
        return _config(embedded, state)


def holds_pipeline(place: Place) -> bool:
    """Whether it is a whole pipeline's folder or repository, with the student's encoders beside it."""
    if place.is_file:
        return False
    index = place.first([INDEX])
    return index is not None and STUDENT_FOLDER in read_config(index)


def within_pipeline(place: Place) -> Place:
    """Where the student is, of a whole pipeline or alone."""
    if not holds_pipeline(place):
        return place
    if place.path is not None:
        return replace(place, path=place.path / STUDENT_FOLDER)
    return replace(place, subfolder="/".join(filter(None, (place.subfolder, STUDENT_FOLDER))))


def _config_file(place: Place) -> Path | None:
    """The config beside the weights, or at the top of the hub repository whose file they are."""
    found = place.first(CONFIGS)
    if found is None and "/" in place.file:
        found = replace(place, file="").first(CONFIGS)
    return found


@contextmanager
def _describing(file: Path) -> Iterator[None]:
    """What is wrong with a config, as a CheckpointError."""
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the config of {file} does not describe a TinyFlux: {error}") from error


def from_diffusers(load: Callable[..., Any], source: str | os.PathLike, **kwargs: Any) -> Any:
    """diffusers' `from_pretrained`, strict; with `output_loading_info` the caller judges what it says."""
    if kwargs.get("output_loading_info"):
        return load(source, **kwargs)
    return load_strictly(load, source, TinyFlux.__name__, **kwargs)


def _weights_file(place: Place, ema: bool | str) -> tuple[Path, bool]:
    """(The file of weights, whether the averaged weights are within it)."""
    if isinstance(ema, str):
        return place.need([ema]), False
    if not ema:
        return place.local() if place.is_file else place.need([*WEIGHTS, *_trainers(place)]), False
    if place.is_file:
        name = Path(place.name)
        own = [f"{name.stem}_ema.safetensors", f"{name.stem}_ema.pt"]
        if name.suffix == ".safetensors":
            return place.need(own), False
        beside = place.first(own)
        return (place.local(), True) if beside is None else (beside, False)
    others = [] if place.path is None else sorted(place.path.glob("*_ema.*"))
    others = [file.name for file in others if file.suffix in (".safetensors", ".pt")]
    if others and place.first(EMA_WEIGHTS) is None:
        trained = place.first([*_trainers(place), *WEIGHTS])
        own = () if trained is None else (f"{trained.stem}_ema.safetensors", f"{trained.stem}_ema.pt")
        if (beside := place.first(own)) is not None:
            return beside, False
        if len(others) > 1:
            raise CheckpointError(f"{place.path} has several averages, name one: {listed(others)}")
    return place.need([*EMA_WEIGHTS, *others]), False


def _trainers(place: Place) -> list[str]:
    """File names of a trainer's weights, in the order in which they count."""
    found = [] if place.path is None else list(place.path.iterdir())
    numbers = {file.name: match for file in found if (match := _NUMBERED.fullmatch(file.name))}
    ordered = sorted(numbers, key=lambda name: (-int(numbers[name][1]), name.endswith(".pt")))
    return [*LAST_WEIGHTS, *ordered, *BEST_WEIGHTS]


# What is in a file


def read_state_dict(
    file: str | os.PathLike, *, ema: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(Tensors by their names in the model, the config that the file holds, or None).

    Trainers nest them, as `model`, `state_dict` and the like, and wrappers prefix `module.` and `_orig_mod.`;
    upstream's v3 called Lune's predictor `expert_predictor`.

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
        state, config = _read_torch(file, ema)
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    while prefix := next((p for p in ("module.", "model.") if all(n.startswith(p) for n in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return {_name_now(name): _shape_now(name, tensor) for name, tensor in state.items()}, config


def _name_now(name: str) -> str:
    return re.sub("^expert_predictor", "lune_predictor", name)


def _shape_now(name: str, tensor: Tensor) -> Tensor:
    return tensor.reshape(()) if name == "expert_predictor.expert_gate" and tensor.numel() == 1 else tensor


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    state, metadata = read_safetensors(file)
    if not state:
        raise CheckpointError(f"{file} holds no tensors")
    return state, parse_json(metadata["config"], f"{file}'s config") if "config" in metadata else None


def _read_torch(file: Path, ema: bool) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    content = read_torch(file)
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
            f"these are not a TinyFlux's tensors: no {listed(absent or ['rope.freqs_0..2'])}"
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
