"""Which model the options mean: what its configs say, and the loaded pipeline."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .options import MachineOptions, ModelOptions
from .settings import ByExpert, number, split_name

__all__ = ["Lora", "Machine", "Model", "merge_models", "quiet"]

DEMO = "demo"
_DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}
_DTYPES |= {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_MODEL_KEYS = ("model", "preset", "sources", "revision", "variant")


def _place(text: str) -> str:
    """A local path in full, so that it means the same from another folder; a hub id as it is."""
    return str(Path(text).resolve()) if Path(text).exists() else text


def _kind(name: str, text: str) -> Any:
    """A kind of expert by name, or the scheduler config in a JSON file."""
    from ..loading.folders import read_config
    from ..loading.presets import training_config

    if text.endswith(".json"):
        return read_config(Path(text))
    try:
        training_config(text)
    except ValueError as error:
        raise ValueError(f"--expert-training {name}={text}: {error}") from None
    return text


def _sources(previous: Mapping[str, Any], options: ModelOptions) -> dict[str, dict[str, Any]]:
    given = {"sol": options.sol, "lune": options.lune, "sd15": options.sd15}
    named = [split_name("--expert-source", text) for text in options.expert_source or ()]
    sources = {name: dict(source) for name, source in previous.items()}
    for name, text in [*((n, t) for n, t in given.items() if t is not None), *named]:
        sources[name] = {"weights": _place(text)}
    for text in options.expert_training or ():
        name, kind = split_name("--expert-training", text)
        if name not in sources:
            raise ValueError(
                f"--expert-training names {name}, which has no source: give --expert-source {name}=..."
            )
        sources[name]["training"] = _kind(name, kind)
    return sources


def merge_models(previous: Mapping[str, Any], options: ModelOptions) -> dict[str, Any]:
    """The settings that say which model: the options', and those of `previous` that they leave in place.

    Another base or preset replaces all that was said of the model before.
    """
    if options.model is not None or options.preset is not None:
        previous = {}
    base = previous.get("model") if options.model is None else _place(options.model)
    settings = {
        "model": None if options.model == DEMO else base,
        "preset": previous.get("preset") if options.preset is None else options.preset,
        "sources": _sources(previous.get("sources") or {}, options),
        "variant": previous.get("variant") if options.variant is None else options.variant,
    }
    revisions = ByExpert.read("--revision", options.revision)
    settings["revision"] = previous.get("revision") if revisions.shared is None else revisions.shared
    for name, revision in revisions.own.items():
        if name not in settings["sources"]:
            raise ValueError(f"--revision names {name}, which has no source of its own")
        settings["sources"][name]["revision"] = revision
    based = options.model is not None or options.preset is not None or "sources" in previous
    if settings["sources"] and not based:
        raise ValueError(
            "say what the experts share (VAE, text encoder): give --preset sd15, or --model FOLDER or ID"
        )
    return {"model": settings["model"]} | {k: settings[k] for k in _MODEL_KEYS[1:] if settings[k]}


@dataclass(frozen=True)
class Model:
    """A model as the settings describe it.

    Args:
        settings: from `merge_models`.
        local_files_only: whether nothing may be downloaded.
    """

    settings: Mapping[str, Any]
    local_files_only: bool = False

    @property
    def base(self) -> str | None:
        """Folder or hub id of what the experts share; None leaves it to the preset."""
        from ..demo import experts_path

        base = self.settings.get("model")
        return str(experts_path()) if base is None and self.preset is None else base

    @property
    def preset(self) -> str | None:
        return self.settings.get("preset")

    @property
    def sources(self) -> dict[str, Any]:
        """Experts that come from elsewhere than the base or the preset."""
        from ..loading.presets import ExpertSource

        return {name: ExpertSource(**source) for name, source in self.settings.get("sources", {}).items()}

    def _hub(self) -> Any:
        from ..loading.hub import Hub

        return Hub(local_files_only=self.local_files_only)

    def _parts(self) -> tuple[str, dict[str, Any]]:
        """The base, and the experts that don't come from it."""
        from ..loading.presets import preset

        known = {} if self.preset is None else preset(self.preset)
        base = self.base or known.base
        return base, {**(known.experts if known else {}), **self.sources}

    @property
    def shared(self) -> str:
        """Folder or hub id of the VAE, the text encoder and the tokenizer."""
        return self._parts()[0]

    def training(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """What the experts were trained on and the model's default settings, without any weights.

        Returns:
            Scheduler configs by expert, from noise to data; and the defaults.

        Raises:
            CheckpointError: something is missing.
        """
        from ..loading.expert_files import find_training, read_base_index
        from ..loading.folders import expert_names
        from ..loading.presets import ExpertSource
        from ..pipelines.settings import default_settings

        base, sources = self._parts()
        revision = self.settings.get("revision")
        # a preset's own base has no experts and no settings
        index = {} if self.base is None else read_base_index(base, self._hub(), revision, tuple(sources))
        own = ExpertSource(base, revision=revision)
        names = dict.fromkeys([*expert_names(index), *sources])
        configs = {name: find_training(name, sources.get(name, own), self._hub()) for name in names}
        return configs, default_settings(list(names), index)

    def sizes(self) -> tuple[int, int]:
        """The side of the images the model was made for, and what height and width must be multiples of, in
        pixels. Downloads what isn't there yet."""
        from ..loading.expert_files import find_base, find_expert
        from ..loading.folders import expert_names, read_config
        from ..loading.presets import ExpertSource

        base, sources = self._parts()
        revision, variant = self.settings.get("revision"), self.settings.get("variant")
        folder, index = find_base(base, self._hub(), revision, variant, list(sources))
        found = [
            find_expert(name, sources.get(name, ExpertSource(folder)), folder, self._hub(), variant)
            for name in dict.fromkeys([*expert_names(index), *sources])
        ]
        shapes = [files.architecture.shape(files.config) for files in found]
        vae = read_config(folder / "vae" / "config.json")
        halved = len(vae.get("block_out_channels") or vae["encoder_block_out_channels"]) - 1
        multiple = math.lcm(*(shape.size_multiple for shape in shapes)) * 2**halved
        if shapes[0].sample_size is None:
            raise ValueError("the experts' configs name no size: give --size")
        return shapes[0].sample_size * 2**halved, multiple

    def load(self, machine: Machine, loras: Sequence[Lora] = (), text_encoder: bool | None = None) -> Any:
        """The pipeline, with its adapters."""
        # Importing diffusers makes very many objects and no garbage: collecting meanwhile costs a second.
        gc.disable()
        from ..pipelines.hybrid import HybridPipeline

        gc.enable()
        import torch

        quiet()
        pipe = HybridPipeline.from_pretrained(
            self.base,
            preset=self.preset,
            experts=self.sources,
            dtype=getattr(torch, machine.dtype),
            variant=self.settings.get("variant"),
            revision=self.settings.get("revision"),
            offload=machine.offload,
            device=machine.device,
            local_files_only=self.local_files_only,
        )
        for index, lora in enumerate(loras):
            pipe.load_lora_weights(
                lora.path, expert=lora.expert, adapter_name=f"lora_{index}", text_encoder=text_encoder
            )
        for name in dict.fromkeys(lora.expert for lora in loras):
            own = [(f"lora_{index}", each.scale) for index, each in enumerate(loras) if each.expert == name]
            pipe.set_adapters([n for n, _ in own], [scale for _, scale in own], expert=name)
        return pipe


@dataclass(frozen=True)
class Machine:
    """What computes.

    Args:
        device: as torch calls it.
        dtype: of the models, as torch calls it.
        offload: as the pipeline takes it.
    """

    device: str
    dtype: str
    offload: str

    @classmethod
    def read(cls, options: MachineOptions, previous: Mapping[str, Any]) -> Machine:
        """From the options, checked against this machine; an image's dtype counts before the default."""
        import torch

        from ..pipelines.offload import check_offload

        check_offload(options.offload)
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            wanted = torch.device(device)
        except RuntimeError:
            raise ValueError(f'"{device}" is not a device: use cpu, cuda or cuda:N') from None
        if wanted.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("CUDA is not available here: use --device cpu")
        if options.offload == "model" and wanted.type == "cpu":
            raise ValueError("--offload model moves components to a GPU: on a CPU use --offload expert")
        if options.batch_size is not None and options.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {options.batch_size}")
        own = "float16" if wanted.type == "cuda" else "float32"
        dtype = options.dtype or previous.get("dtype") or own
        if dtype not in _DTYPES:
            raise ValueError(f'unknown dtype "{dtype}": use float32, float16 or bfloat16')
        return cls(device, _DTYPES[dtype], options.offload)


@dataclass(frozen=True)
class Lora:
    """An adapter of one expert."""

    expert: str
    path: str
    scale: float = 1.0

    @classmethod
    def read(cls, text: str) -> Lora:
        """From NAME=PATH or NAME=PATH@SCALE."""
        name, path = split_name("--lora", text)
        before, at, scale = path.rpartition("@")
        if not at or Path(path).exists():
            return cls(name, _place(path))
        try:
            return cls(name, _place(before), number(scale))
        except ValueError:
            return cls(name, _place(path))

    def check(self, names: Sequence[str], text_encoder: bool | None) -> None:
        """Raise ValueError for what shows without the model."""
        if find_spec("peft") is None:
            raise ValueError("LoRA adapters need the package peft: pip install peft")
        if self.expert not in names:
            raise ValueError(f"--lora names {self.expert}, but the experts are {', '.join(names)}")
        path = Path(self.path)
        if not path.exists():
            if path.suffix or self.path.count("/") != 1:
                raise ValueError(f"--lora {self.expert}: there is no {self.path}")
            return
        if path.is_file() and text_encoder is None and _has_text_encoder(path):
            raise ValueError(
                f"{path} has a part for the text encoder, which all experts share: say --lora-text-encoder "
                "to use it too, or --no-lora-text-encoder to leave it out"
            )


def _has_text_encoder(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return any(key.startswith(("text_encoder.", "lora_te")) for key in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None


def quiet() -> None:
    """Leave the terminal to our own progress bar."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
