"""Finding models: local folders and files, or the Hugging Face hub, without downloading what isn't used."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .folders import INDEX, SHARED, CheckpointError, expert_names, read_config
from .presets import SD15_UNET, TRAINING, ExpertSource, training_config
from .state_dicts import SUFFIXES

__all__ = ["Hub", "UNetFiles", "component_variant", "find_base", "find_expert", "find_training", "is_hub_id"]

WEIGHTS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call a component's weights."""

_REPO = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class Hub:
    """How to ask the Hugging Face hub; arguments as `huggingface_hub` takes them."""

    cache_dir: str | Path | None = None
    local_files_only: bool = False
    token: str | bool | None = None
    force_download: bool = False

    def file(self, repo: str, file: str, revision: str | None) -> Path:
        from huggingface_hub import hf_hub_download

        return self._ask(hf_hub_download, f"{repo}:{file}", repo, filename=file, revision=revision)

    def folder(self, repo: str, patterns: Sequence[str], revision: str | None) -> Path:
        from huggingface_hub import snapshot_download

        return self._ask(snapshot_download, repo, repo, allow_patterns=list(patterns), revision=revision)

    def _ask(self, download: Any, what: str, repo: str, **arguments: Any) -> Path:
        options = {key: value for key, value in vars(self).items() if value is not None}
        try:
            return Path(download(repo, **arguments, **options))
        except (OSError, ValueError) as error:  # huggingface_hub's errors are kinds of these
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{what} cannot be had from the hub: {reason}") from error


@dataclass(frozen=True)
class UNetFiles:
    """Where one expert is.

    Args:
        name: of the expert.
        where: the folder or file, for messages.
        weights: one file, or the shards.
        config: of the UNet.
        training: scheduler config that says what the expert was trained on.
    """

    name: str
    where: Path
    weights: tuple[Path, ...]
    config: Mapping[str, Any]
    training: Mapping[str, Any]


def is_hub_id(text: str) -> bool:
    """Whether a text that names nothing on this machine may be owner/name on the hub."""
    return bool(_REPO.match(text)) and not text.startswith(".") and Path(text).suffix not in SUFFIXES


def _patterns(component: str, variant: str | None) -> list[str]:
    """What a component needs of a repository."""
    stems = [f"{stem}.{variant}" for stem in WEIGHTS] if variant else []
    weights = [f"{component}/{stem}{end}" for stem in (*stems, *WEIGHTS) for end in ("", "-?????-of-?????")]
    configs = [f"{component}/*.json", f"{component}/*.txt"]
    return [*configs, *(f"{pattern}.safetensors" for pattern in weights)]


def find_base(
    base: str | Path, hub: Hub, revision: str | None, variant: str | None, replaced: Sequence[str] = ()
) -> tuple[Path, dict[str, Any]]:
    """The folder with the components that experts share, and its `model_index.json`.

    Args:
        base: a local folder or a hub id, of a hybrid pipeline or a Stable Diffusion one.
        hub, revision, variant: for a hub id.
        replaced: experts whose weights come from elsewhere.

    Raises:
        CheckpointError: there is no such folder, or a shared component is missing from it.
    """
    path = Path(base)
    if path.is_file():
        raise CheckpointError(
            f"{base} is a file: the base is a folder or hub id with vae/, text_encoder/ and tokenizer/, and "
            "files are experts (sol=, lune=, sd15= or experts=)"
        )
    if not path.exists() and is_hub_id(str(base)):
        index = read_config(hub.file(str(base), INDEX, revision))
        own = [name for name in expert_names(index) if name not in replaced]
        parts = [*SHARED, *(f"{part}_{name}" for name in own for part in ("unet", "scheduler"))]
        # A single-file expert has no config of its own: the base's UNet has the same shape.
        configs = ["*.json", "unet/config.json", "unet_*/config.json", "scheduler/*.json"]
        patterns = [*configs, *(pattern for part in parts for pattern in _patterns(part, variant))]
        path = hub.folder(str(base), patterns, revision)
    if not path.is_dir():
        raise CheckpointError(f"{base} is not a folder, and not a hub id like owner/name")
    if not (path / INDEX).is_file():
        raise CheckpointError(f"{path} has no {INDEX}: it is not a diffusers pipeline folder")
    return path, read_config(path / INDEX)


def component_variant(folder: Path, variant: str | None) -> str | None:
    """The variant, where the component has it."""
    return variant if variant and any(folder.glob(f"*.{variant}[.-]*")) else None


def _folder_weights(folder: Path, variant: str | None) -> tuple[Path, ...]:
    variant = component_variant(folder, variant)
    stem = f"{WEIGHTS[0]}.{variant}" if variant else WEIGHTS[0]
    whole = folder / f"{stem}.safetensors"
    if whole.is_file():
        return (whole,)
    index = folder / f"{WEIGHTS[0]}.safetensors.index{f'.{variant}' if variant else ''}.json"
    if not index.is_file():
        raise CheckpointError(f"{folder} cannot be loaded as UNet2DConditionModel: it has no {whole.name}")
    files = sorted(set(read_config(index).get("weight_map", {}).values()))
    absent = [file for file in files if Path(file).name != file or not (folder / file).is_file()]
    if absent or not files:
        raise CheckpointError(f"{folder} is incomplete: it has no {', '.join(absent[:5]) or 'shards'}")
    return tuple(folder / file for file in files)


def _unet_folder(path: Path, name: str) -> tuple[Path, Path | None]:
    """In a UNet's or a pipeline's folder: where the UNet is, and a scheduler config beside it."""
    for unet, scheduler in ((f"unet_{name}", f"scheduler_{name}"), ("unet", "scheduler"), (".", ".")):
        if (path / unet / "config.json").is_file():
            config = path / scheduler / "scheduler_config.json"
            return (path / unet, config) if config.is_file() else (path / unet, None)
    if (path / f"unet_{name}").is_dir():
        raise CheckpointError(
            f"{path / f'unet_{name}'} cannot be loaded as UNet2DConditionModel: it has no config.json"
        )
    raise CheckpointError(f"{path} holds no UNet: no config.json, unet/ or unet_{name}/")


def _base_unet_config(base: Path) -> Mapping[str, Any]:
    """The config of a file's UNet: the base's, else Stable Diffusion 1.5's."""
    found = [base / "unet" / "config.json", *sorted(base.glob("unet_*/config.json"))]
    return next((read_config(file) for file in found if file.is_file()), SD15_UNET)


def _locate(name: str, source: ExpertSource, hub: Hub, variant: str | None, weights: bool = True) -> Path:
    """Where it is on this machine; without weights, a hub repository's configs alone."""
    path = Path(source.weights)
    if path.exists():
        return path
    text = str(source.weights)
    repo, colon, file = text.partition(":")
    if is_hub_id(repo):
        if colon:
            return hub.file(repo, file, source.revision) if weights else Path(file)
        parts = [pattern for part in ("unet", f"unet_{name}") for pattern in _patterns(part, variant)]
        root = [pattern.removeprefix("unet/") for pattern in _patterns("unet", variant)]
        patterns = [*root, *parts, "scheduler/*.json", f"scheduler_{name}/*.json"]
        wanted = [pattern for pattern in patterns if weights or pattern.endswith(".json")]
        return hub.folder(repo, wanted, source.revision)
    raise CheckpointError(
        f"{name}: there is no {text}; give a folder, a file, a hub id owner/name or a hub file "
        "owner/name:file"
    )


def _training(name: str, source: ExpertSource, beside: Path | None) -> dict[str, Any]:
    """What an expert was trained on: what its source says, else the config beside it, else its name."""
    training = source.training
    if training is None:
        training = read_config(beside) if beside is not None else (name if name in TRAINING else None)
    if training is None:
        raise CheckpointError(
            f"{name}: nothing says what it was trained on; give ExpertSource(..., training=), or "
            f"--expert-training {name}= on the command line, either one of "
            f"{', '.join(TRAINING)} or a diffusers scheduler config"
        )
    return training_config(training)


def find_training(name: str, source: ExpertSource | str | Path, hub: Hub) -> dict[str, Any]:
    """What an expert was trained on, as `find_expert` says it; of the hub, configs alone are downloaded.

    Raises:
        CheckpointError: it isn't there, or nothing says what it was trained on.
    """
    if not isinstance(source, ExpertSource):
        source = ExpertSource(source)
    path = _locate(name, source, hub, None, weights=False)
    beside = _unet_folder(path, name)[1] if path.is_dir() else None
    return _training(name, source, beside)


def find_expert(
    name: str, source: ExpertSource | str | Path, base: Path, hub: Hub, variant: str | None
) -> UNetFiles:
    """An expert's files, config and training settings.

    Args:
        name: of the expert.
        source: where it is; a bare path or hub id is a source without further settings.
        base: local folder of the base, whose UNet config counts for single files.
        hub, variant: for hub ids and diffusers folders.

    Raises:
        CheckpointError: it isn't there, or nothing says what it was trained on.
    """
    if not isinstance(source, ExpertSource):
        source = ExpertSource(source)
    path = _locate(name, source, hub, variant)
    if path.is_dir():
        folder, beside = _unet_folder(path, name)
        weights, config = _folder_weights(folder, variant), read_config(folder / "config.json")
    else:
        folder, weights, config, beside = path, (path,), _base_unet_config(base), None
    kind = config.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        raise CheckpointError(f"{name}: {source.weights} is a {kind}, not a UNet2DConditionModel")
    return UNetFiles(name, folder, weights, config, _training(name, source, beside))
