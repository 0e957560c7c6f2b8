"""A pipeline's parts from where they are, checked against each other before any weights are read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ConfigMixin, SchedulerMixin
from transformers import CLIPTextModel, CLIPTokenizer

from ..architectures import ModelShape
from ..errors import CheckpointError
from .expert_files import ExpertFiles, find_base, find_expert
from .folders import SHARED, expert_names, load_component, load_tokenizer, read_config, read_model_index
from .hub import Hub, component_variant
from .presets import TRAINING, ExpertSource, training_config
from .weights import ExpertWeights, empty_model, file_tensors

__all__ = [
    "VAES",
    "Loaded",
    "check_experts_fit",
    "check_names",
    "load_parts",
    "load_shared",
    "scheduler_from_config",
]

VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
_CLASSES = {"text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer}
_NAME = re.compile(r"^[a-z][a-z0-9_]*$")

Dtypes = torch.dtype | Mapping[str, torch.dtype]


@dataclass(frozen=True)
class Loaded:
    """What a pipeline is made of.

    Args:
        components: by name, as the pipeline's constructor takes them.
        experts: names, from noise to data.
        weights: of the experts that were found in files.
        index: the base's `model_index.json`.
        folder: the base's, on this machine.
    """

    components: dict[str, Any]
    experts: tuple[str, ...]
    weights: dict[str, ExpertWeights]
    index: dict[str, Any]
    folder: Path


def check_names(experts: Any) -> tuple[str, ...]:
    """Experts' names, which become attributes and folders."""
    names = tuple(experts)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"give at least one expert, each with a name of its own; got {names}")
    for name in names:
        if not isinstance(name, str) or not _NAME.match(name) or name == "hybrid":
            raise ValueError(
                f"an expert's name is a lower-case word like sol or my_expert (but not hybrid), got {name!r}"
            )
    return names


def check_experts_fit(
    shapes: Mapping[str, ModelShape], vae: Mapping[str, Any], text: Mapping[str, Any]
) -> None:
    """Whether the experts work on this VAE's latents and this text encoder's features.

    Args:
        shapes: of the experts' models.
        vae, text: configs.

    Raises:
        ValueError: channels that don't fit, with both numbers.
    """
    latents, features = vae["latent_channels"], text["hidden_size"]
    for name, shape in shapes.items():
        for end, channels in (("in_channels", shape.in_channels), ("out_channels", shape.out_channels)):
            if channels != latents:
                raise ValueError(
                    f"{name} has {end} {channels}, but the VAE's latents have {latents} channels: "
                    "the experts and the base don't belong together"
                )
        if shape.cross_attention_dim != features:
            raise ValueError(
                f"{name} has cross_attention_dim {shape.cross_attention_dim}, but the text encoder's "
                f"features have {features} channels: the expert was trained on another text encoder"
            )


def scheduler_from_config(config: Mapping[str, Any]) -> SchedulerMixin:
    """The diffusers scheduler of a config with `_class_name`.

    Raises:
        CheckpointError: no such class.
    """
    name = str(config.get("_class_name"))
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin) and issubclass(cls, ConfigMixin)):
        raise CheckpointError(f'"{name}" is no scheduler of diffusers')
    made = cls.from_config({key: value for key, value in config.items() if key != "_class_name"})
    assert isinstance(made, SchedulerMixin)  # no tuple: nobody asked for unused settings
    return made


def _dtype(dtypes: Dtypes, component: str) -> torch.dtype:
    if isinstance(dtypes, Mapping):
        return dtypes.get(component, dtypes.get("default", torch.float32))
    return dtypes


def _class_of(index: Mapping[str, Any], component: str, folder: Path) -> type:
    """The class of a shared component, as the index names it."""
    entry = index.get(component)
    named = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    known = VAES if component == "vae" else {_CLASSES[component].__name__: _CLASSES[component]}
    if component == "tokenizer":
        known["CLIPTokenizerFast"] = CLIPTokenizer
    if named is None or named not in known:
        raise CheckpointError(f"{folder}: {component} is a {named}, use one of {', '.join(known)}")
    return known[named]


def load_shared(
    component: str, folder: Path, index: Mapping[str, Any], dtypes: Dtypes, variant: str | None
) -> Any:
    """The VAE, text encoder or tokenizer of a pipeline's folder, as its index names its class.

    Raises:
        CheckpointError: another class than can be used, or not strictly loadable.
    """
    cls = _class_of(index, component, folder)
    if component != "tokenizer":
        return load_component(
            cls,
            folder / component,
            dtype=_dtype(dtypes, component),
            variant=component_variant(folder / component, variant),
        )
    return load_tokenizer(cls, folder / component)


def _find_experts(
    given: Mapping[str, ExpertSource | str | Path],
    index: Mapping[str, Any],
    base: Path,
    passed: Mapping[str, Any],
    hub: Hub,
    variant: str | None,
) -> dict[str, ExpertFiles | None]:
    """Every expert's files, from noise to data; None for a UNet that was passed as it is."""
    names = tuple(dict.fromkeys([*expert_names(dict(index)), *given, *_passed_experts(passed)]))
    if not names:
        raise CheckpointError(
            f"{base} has no experts of its own: say where they are (sol=, lune=, sd15= or experts=), or give "
            'preset="sd15"'
        )
    found: dict[str, ExpertFiles | None] = {}
    for name in check_names(names):
        if f"unet_{name}" in passed:
            found[name] = None
        elif name in given:
            found[name] = find_expert(name, given[name], base, hub, variant)
        else:
            found[name] = find_expert(name, ExpertSource(base), base, hub, variant)
    return found


def _passed_experts(passed: Mapping[str, Any]) -> list[str]:
    return [key.removeprefix("unet_") for key in passed if key.startswith("unet_")]


def _passed_training(name: str, folder: Path) -> dict[str, Any]:
    """What a UNet that was passed without its scheduler was trained on."""
    file = folder / f"scheduler_{name}" / "scheduler_config.json"
    if not file.is_file() and name not in TRAINING:
        raise CheckpointError(f"nothing says what {name} was trained on: pass scheduler_{name} too")
    return training_config(read_config(file) if file.is_file() else name)


def _check_variant(folders: list[Path], variant: str | None) -> None:
    if variant and not any(component_variant(folder, variant) for folder in folders):
        raise CheckpointError(f'no file of variant "{variant}" is there: leave variant out, or see what is')


def load_parts(
    base: str | os.PathLike,
    experts: Mapping[str, ExpertSource | str | Path],
    *,
    dtypes: Dtypes,
    hub: Hub,
    revision: str | None = None,
    variant: str | None = None,
    passed: Mapping[str, Any] | None = None,
    resident: bool = True,
    subfolder: str | None = None,
) -> Loaded:
    """A pipeline's parts. Configs and the headers of all weights are read and checked before any weights are.

    Args:
        base: folder or hub id of what the experts share, and of experts.
        experts: where further experts are, or others in place of the base's, by name.
        dtypes: for everything, or by component with "default" for the others.
        hub, revision, variant: for what comes from the hub and from diffusers folders.
        passed: components to use instead of loading them.
        resident: whether the experts get their weights now.
        subfolder: of the base.

    Raises:
        CheckpointError: anything missing, unreadable, unexpected or misshapen, by name.
        ValueError: parts that don't fit each other.
    """
    passed = dict(passed or {})
    replaced = [*experts, *_passed_experts(passed)]
    folder, index = find_base(base, hub, revision, variant, replaced, subfolder)
    own = [name for name in expert_names(index) if name not in experts]
    local = [*SHARED, *(f"{part}_{name}" for name in own for part in ("unet", "scheduler"))]
    read_model_index(folder, [name for name in local if name not in passed])
    files = _find_experts(experts, index, folder, passed, hub, variant)
    found = {name: own for name, own in files.items() if own is not None}
    _check_variant(
        [folder / name for name in SHARED] + [own.weights[0].parent for own in found.values()], variant
    )
    _check_configs(found, folder, passed)

    components = dict(passed)
    weights: dict[str, ExpertWeights] = {}
    for name, own in found.items():
        unet = empty_model(own.config, str(own.where), _dtype(dtypes, f"unet_{name}"))
        expected = dict(unet.state_dict())
        file_tensors(own, expected)  # maps the files and looks at their headers alone
        weights[name] = ExpertWeights(unet, lambda own=own, expected=expected: file_tensors(own, expected))
        components[f"unet_{name}"] = unet
        if f"scheduler_{name}" not in components:
            components[f"scheduler_{name}"] = scheduler_from_config(own.training)
    for name in files:
        if f"scheduler_{name}" not in components:
            components[f"scheduler_{name}"] = scheduler_from_config(_passed_training(name, folder))
    for component in SHARED:
        if component not in components:
            components[component] = load_shared(component, folder, index, dtypes, variant)
    if resident:
        for own in weights.values():
            own.take("cpu")
    return Loaded(components, tuple(files), weights, index, folder)


def _check_configs(found: Mapping[str, ExpertFiles], folder: Path, passed: Mapping[str, Any]) -> None:
    """Whether the parts fit, from their configs."""
    shapes = {name: own.architecture.shape(own.config) for name, own in found.items()}
    vae = read_config(folder / "vae" / "config.json") if "vae" not in passed else dict(passed["vae"].config)
    text = (
        read_config(folder / "text_encoder" / "config.json")
        if "text_encoder" not in passed
        else passed["text_encoder"].config.to_dict()
    )
    # diffusers' and transformers' own defaults, for configs that leave them out
    check_experts_fit(shapes, {"latent_channels": 4, **vae}, {"hidden_size": 512, **text})
