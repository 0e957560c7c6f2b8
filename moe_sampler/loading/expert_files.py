"""Which files an expert is made of, wherever they are: its weights, its config and what it was trained on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..architectures import DEFAULT_CONFIG, Architecture, named_architecture
from ..errors import CheckpointError, listed
from .folders import CARD, INDEX, SHARED, expert_names, read_config, read_model_index
from .hub import WEIGHTS, Hub, Place, component_patterns, component_variant
from .marks import read_marks, read_training, with_marks
from .presets import TRAINING, ExpertSource, training_config

__all__ = ["ExpertFiles", "find_base", "find_expert", "find_model_config", "find_training", "read_base_index"]


@dataclass(frozen=True)
class ExpertFiles:
    """Where one expert is.

    Args:
        name: of the expert.
        where: the folder or file, for messages.
        weights: one file, or the shards.
        config: of its model.
        training: scheduler config that says what the expert was trained on.
    """

    name: str
    where: Path
    weights: tuple[Path, ...]
    config: Mapping[str, Any]
    training: Mapping[str, Any]

    @property
    def architecture(self) -> Architecture:
        return named_architecture(self.config)


def find_base(
    base: str | os.PathLike,
    hub: Hub,
    revision: str | None,
    variant: str | None,
    replaced: Sequence[str] = (),
    subfolder: str | None = None,
) -> tuple[Path, dict[str, Any]]:
    """The folder with the components that experts share, and its `model_index.json`.

    Args:
        base: a local folder or a hub id, of a hybrid pipeline or a Stable Diffusion one.
        hub, revision, variant: for a hub id.
        replaced: experts whose weights come from elsewhere.
        subfolder: of the folder or hub repository.

    Raises:
        CheckpointError: there is no such folder, or a shared component is missing from it.
    """
    place = _look_for_base(base, hub, revision, subfolder)
    path = place.path
    if path is None:
        own = [name for name in expert_names(read_config(place.need([INDEX]))) if name not in replaced]
        parts = [*SHARED, *(f"{part}_{name}" for name in own for part in ("unet", "scheduler"))]
        # A single-file expert has no config of its own: the base's UNet has the same shape.
        configs = ["*.json", CARD, "unet/config.json", "unet_*/config.json", "scheduler/*.json"]
        path = place.local([*configs, *(p for part in parts for p in component_patterns(part, variant))])
    if not (path / INDEX).is_file():
        raise CheckpointError(f"{path} has no {INDEX}: it is not a diffusers pipeline folder")
    return path, read_config(path / INDEX)


def read_base_index(
    base: str | os.PathLike,
    hub: Hub,
    revision: str | None,
    replaced: Sequence[str] = (),
    subfolder: str | None = None,
) -> dict[str, Any]:
    """The base's `model_index.json` alone; a local folder must hold what it names.

    Args:
        base, hub, revision, replaced, subfolder: as `find_base` takes them.

    Raises:
        CheckpointError: as `find_base`.
    """
    place = _look_for_base(base, hub, revision, subfolder)
    if place.path is None:
        return read_config(place.need([INDEX]))
    if not replaced or not (place.path / INDEX).is_file():
        return read_model_index(place.path)
    own = [name for name in expert_names(read_config(place.path / INDEX)) if name not in replaced]
    parts = [f"{part}_{name}" for name in own for part in ("unet", "scheduler")]
    return read_model_index(place.path, [*SHARED, *parts])


def _look_for_base(
    base: str | os.PathLike, hub: Hub, revision: str | None, subfolder: str | None = None
) -> Place:
    place = hub.look(base, revision=revision, subfolder=subfolder)
    if place.is_file:
        raise CheckpointError(
            f"{base} is a file: the base is a folder or hub id with vae/, text_encoder/ and tokenizer/, and "
            "files are experts (sol=, lune=, sd15= or experts=)"
        )
    return place


def _folder_weights(folder: Path, variant: str | None, model: str) -> tuple[Path, ...]:
    variant = component_variant(folder, variant)
    stem = f"{WEIGHTS[0]}.{variant}" if variant else WEIGHTS[0]
    whole = folder / f"{stem}.safetensors"
    if whole.is_file():
        return (whole,)
    index = folder / f"{WEIGHTS[0]}.safetensors.index{f'.{variant}' if variant else ''}.json"
    if not index.is_file():
        raise CheckpointError(f"{folder} cannot be loaded as {model}: it has no {whole.name}")
    files = sorted(set(read_config(index).get("weight_map", {}).values()))
    absent = [file for file in files if Path(file).name != file or not (folder / file).is_file()]
    if absent or not files:
        raise CheckpointError(f"{folder} is incomplete: it has no {listed(absent) or 'shards'}")
    return tuple(folder / file for file in files)


def _model_folder(path: Path, name: str) -> tuple[Path, Path | None]:
    """In a model's or a pipeline's folder: where the model is, and a scheduler config beside it."""
    for unet, scheduler in ((f"unet_{name}", f"scheduler_{name}"), ("unet", "scheduler"), (".", ".")):
        if (path / unet / "config.json").is_file():
            config = path / scheduler / "scheduler_config.json"
            return (path / unet, config) if config.is_file() else (path / unet, None)
    if (path / f"unet_{name}").is_dir():
        raise CheckpointError(f"{path / f'unet_{name}'} cannot be loaded: it has no config.json")
    raise CheckpointError(f"{path} holds no UNet: no config.json, unet/ or unet_{name}/")


def _base_config(base: Path) -> Mapping[str, Any]:
    """The config of a file's model: the base's, else Stable Diffusion 1.5's."""
    found = [base / "unet" / "config.json", *sorted(base.glob("unet_*/config.json"))]
    return next((read_config(file) for file in found if file.is_file()), DEFAULT_CONFIG)


def _locate(name: str, source: ExpertSource, hub: Hub, variant: str | None, weights: bool = True) -> Path:
    """Where it is on this machine; without weights, a hub repository's configs alone."""
    try:
        place = hub.look(source.weights, revision=source.revision, subfolder=source.subfolder)
        if place.is_file:
            return place.local() if weights or place.path is not None else Path(place.file)
        parts = ["", "unet", f"unet_{name}"]
        patterns = [pattern for part in parts for pattern in component_patterns(part, variant)]
        wanted = [*patterns, "scheduler/*.json", f"scheduler_{name}/*.json"]
        return place.local([pattern for pattern in wanted if weights or pattern.endswith(".json")])
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _training(name: str, source: ExpertSource, beside: Path | None, files: Sequence[Path]) -> dict[str, Any]:
    """What an expert was trained on: what its source says, else the config beside it, else the one in its own
    file, else its name, and nothing but what its files say of themselves, too."""
    training, said_by = source.training, f"the training given for {name}"
    if training is None and beside is not None:
        training, said_by = read_config(beside), str(beside)
    if training is None:
        training, said_by = read_training(files), f"the header of {files[0] if files else source.weights}"
    if training is None and name in TRAINING:
        training, said_by = name, f"the name {name}"
    config = training if training is None else training_config(training)
    marks = read_marks(files)
    training = with_marks(config, marks, files[0] if files else source.weights, said_by, TRAINING)
    if training is None:
        raise CheckpointError(
            f"{name}: nothing says what it was trained on; give ExpertSource(..., training=), or "
            f"--expert-training {name}= on the command line, either one of "
            f"{', '.join(TRAINING)} or a diffusers scheduler config"
        )
    return dict(training)


def find_training(name: str, source: ExpertSource | str | Path, hub: Hub) -> dict[str, Any]:
    """What an expert was trained on, as `find_expert` says it; of the hub, configs alone are downloaded.

    Raises:
        CheckpointError: it isn't there, or nothing says what it was trained on.
    """
    source = ExpertSource.of(source)
    path = _locate(name, source, hub, None, weights=False)
    beside = _model_folder(path, name)[1] if path.is_dir() else None
    return _training(name, source, beside, [path] if path.is_file() else [])


def find_model_config(
    name: str,
    source: ExpertSource,
    base: str | os.PathLike,
    revision: str | None,
    hub: Hub,
    subfolder: str | None = None,
) -> Mapping[str, Any]:
    """The config of an expert's model, as `find_expert` says it; of the hub, configs alone are downloaded.

    Args:
        name: of the expert.
        source: where it is.
        base, revision, subfolder: whose model's config counts for single files.
        hub: for hub ids.

    Raises:
        CheckpointError: it isn't there.
    """
    path = _locate(name, source, hub, None, weights=False)
    if path.is_dir():
        return read_config(_model_folder(path, name)[0] / "config.json")
    configs = ["unet/config.json", "unet_*/config.json"]
    return _base_config(_look_for_base(base, hub, revision, subfolder).local(configs))


def find_expert(
    name: str, source: ExpertSource | str | Path, base: Path, hub: Hub, variant: str | None
) -> ExpertFiles:
    """An expert's files, config and training settings.

    Args:
        name: of the expert.
        source: where it is; a bare path or hub id is a source without further settings.
        base: local folder of the base, whose model's config counts for single files.
        hub, variant: for hub ids and diffusers folders.

    Raises:
        CheckpointError: it isn't there, its model is of no known architecture, or nothing says what it was
            trained on.
    """
    source = ExpertSource.of(source)
    path = _locate(name, source, hub, variant)
    folder, beside = _model_folder(path, name) if path.is_dir() else (path, None)
    config = read_config(folder / "config.json") if path.is_dir() else _base_config(base)
    try:
        model = named_architecture(config).class_name
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {source.weights} {error}") from None
    weights = _folder_weights(folder, variant, model) if path.is_dir() else (path,)
    return ExpertFiles(name, folder, weights, config, _training(name, source, beside, weights))
