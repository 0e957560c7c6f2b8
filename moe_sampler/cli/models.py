"""Which model the options mean: what its configs say, and the loaded pipeline."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._files import local_place
from ..errors import CheckpointError
from .by_name import ByExpert, split_name
from .imports import without_collecting
from .loras import Lora, add_loras
from .machine import Machine, quiet
from .options import ModelOptions

__all__ = ["DEMO", "Model", "merge_models", "recorded_student", "student_place"]

DEMO = "demo"
_MODEL_KEYS = ("model", "preset", "sources", "revision", "subfolder", "variant")


def student_place(text: str) -> str:
    """Where the student lies that an option or an image names."""
    from ..demo import student_path

    return str(student_path()) if text == DEMO else text


def recorded_student(text: str) -> str:
    """What an image remembers of it."""
    return text if text == DEMO else local_place(text)


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
        sources[name] = {"weights": local_place(text)}
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
    base = previous.get("model") if options.model is None else local_place(options.model)
    settings = {
        "model": None if options.model == DEMO else base,
        "preset": previous.get("preset") if options.preset is None else options.preset,
        "sources": _sources(previous.get("sources") or {}, options),
        "variant": previous.get("variant") if options.variant is None else options.variant,
    }
    for key, texts in (("revision", options.revision), ("subfolder", options.subfolder)):
        read = ByExpert.read(f"--{key}", texts)
        settings[key] = previous.get(key) if read.shared is None else read.shared
        for name, value in read.own.items():
            if name not in settings["sources"]:
                raise ValueError(f"--{key} names {name}, which has no source of its own")
            settings["sources"][name][key] = value
    based = options.model is not None or options.preset is not None or "sources" in previous
    if settings["sources"] and not based:
        raise ValueError(
            "say what the experts share (VAE, text encoder): give --preset sd15, or the folder or "
            "hub id of a base"
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

    @classmethod
    def read(cls, options: ModelOptions, previous: Mapping[str, Any]) -> Model:
        """From the options, and the settings of an image made before."""
        return cls(merge_models(previous, options), options.local_files_only)

    @property
    def base(self) -> str | None:
        """Folder or hub id of what the experts share; None leaves it to the preset."""
        from ..demo import experts_path

        base = self.settings.get("model")
        return str(experts_path()) if base is None and self.preset is None else base

    @property
    def is_demo(self) -> bool:
        """Whether these are the experts in the package, and no others."""
        from ..demo import experts_path

        return self.base == str(experts_path()) and not self.settings.get("sources")

    @property
    def preset(self) -> str | None:
        return self.settings.get("preset")

    @property
    def sources(self) -> dict[str, Any]:
        """Experts that come from elsewhere than the base or the preset."""
        from ..loading.presets import ExpertSource

        return {name: ExpertSource(**source) for name, source in self.settings.get("sources", {}).items()}

    @property
    def _place(self) -> dict[str, Any]:
        """Where in its folder or repository the base is."""
        return {key: self.settings.get(key) for key in ("revision", "subfolder")}

    def _hub(self) -> Any:
        from ..loading.hub import Hub

        return Hub(local_files_only=self.local_files_only)

    def _parts(self) -> tuple[str, dict[str, Any]]:
        """The base, and the experts that don't come from it."""
        from ..loading.presets import preset

        base, sources = self.base, self.sources
        if self.preset is not None:
            known = preset(self.preset)
            base, sources = base or known.base, {**known.experts, **sources}
        assert base is not None  # only a preset leaves it open
        return base, sources

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
        place = self._place
        # a preset's own base has no experts and no settings
        replaced = tuple(sources)
        index = {} if self.base is None else read_base_index(base, self._hub(), replaced=replaced, **place)
        own = ExpertSource(base, **place)
        names = dict.fromkeys([*expert_names(index), *sources])
        configs = {name: find_training(name, sources.get(name, own), self._hub()) for name in names}
        return configs, default_settings(list(names), index)

    def reuse_shares(self, names: Sequence[str], optional: Collection[str] = ()) -> dict[str, float]:
        """What calls of these experts that reuse features cost of a full one, from their models' configs.

        optional: those that are left out if their features can't be reused.

        Raises:
            CheckpointError: another one whose features can't be reused.
        """
        from ..architectures import reuse_share
        from ..loading.expert_files import find_model_config
        from ..loading.presets import ExpertSource

        base, sources = self._parts()
        own = ExpertSource(base, **self._place)
        configs = {
            name: find_model_config(name, sources.get(name, own), base, hub=self._hub(), **self._place)
            for name in names
        }
        shares = {}
        for name, config in configs.items():
            try:
                shares[name] = reuse_share(config)
            except ValueError as error:
                if name not in optional or isinstance(error, CheckpointError):
                    raise CheckpointError(f"{name}: {error}") from error
        return shares

    def sizes(self) -> tuple[int, int]:
        """The side of the images the model was made for, and what height and width must be multiples of, in
        pixels. Downloads what isn't there yet."""
        from ..loading.expert_files import find_base, find_expert
        from ..loading.folders import expert_names, read_config
        from ..loading.presets import ExpertSource

        base, sources = self._parts()
        variant = self.settings.get("variant")
        given = {"variant": variant, "replaced": list(sources)}
        folder, index = find_base(base, self._hub(), **given, **self._place)
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

    def size(self, settings: Mapping[str, Any], start: Any = None) -> dict[str, int]:
        """Height and width as far as they are known: what was given, or what the pipeline would choose for a
        PIL image to start from."""
        from ..pipelines.checks import check_size
        from ..pipelines.start_images import fitted_size

        size = {key: settings[key] for key in ("height", "width") if key in settings}
        if start is None and not size:
            return {}
        side, multiple = self.sizes()
        if start is not None:
            size["height"], size["width"] = fitted_size([start], side, multiple, **size)
        check_size(size.get("height", multiple), size.get("width", multiple), multiple)
        return size

    def load(self, machine: Machine, loras: Sequence[Lora] = (), text_encoder: bool | None = None) -> Any:
        """The pipeline, with its adapters."""
        with without_collecting():
            from ..pipelines.hybrid import HybridPipeline
        quiet()
        pipe = HybridPipeline.from_pretrained(
            self.base,
            preset=self.preset,
            experts=self.sources,
            dtype=machine.torch_dtype,
            variant=self.settings.get("variant"),
            **self._place,
            offload=machine.offload,
            speed=machine.speed,
            device=machine.device,
            local_files_only=self.local_files_only,
        )
        add_loras(pipe, loras, text_encoder)
        return pipe
