"""Adapters: what --lora says, and how they come into a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .._files import local_place
from .by_name import number, split_name
from .options import LoraOptions

__all__ = ["Lora", "add_loras", "read_loras"]


@dataclass(frozen=True)
class Lora:
    """An adapter of one expert."""

    expert: str
    path: str
    scale: float = 1.0

    @classmethod
    def read(cls, text: str, name: str | None = None) -> Lora:
        """From NAME=PATH or NAME=PATH@SCALE; where there is one expert alone, its name, without NAME=."""
        name, path = split_name("--lora", text) if name is None else (name, text)
        before, at, scale = path.rpartition("@")
        if not at or Path(path).exists():
            return cls(name, local_place(path))
        try:
            return cls(name, local_place(before), number(scale))
        except ValueError:
            return cls(name, local_place(path))

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
        if path.is_file():
            keys = _keys(path)
            if text_encoder is None and any(key.startswith(("text_encoder.", "lora_te")) for key in keys):
                raise ValueError(
                    f"{path} has a part for the text encoder, which all experts share: say "
                    "--lora-text-encoder to use it too, or --no-lora-text-encoder to leave it out"
                )


def _keys(path: Path) -> list[str]:
    """Of a file's tensors, if it is a LoRA."""
    from safetensors import SafetensorError, safe_open

    from ..loading.lora_files import check_kind

    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None
    check_kind(keys, str(path))
    return keys


def read_loras(
    previous: Mapping[str, Any], options: LoraOptions, names: Sequence[str]
) -> tuple[list[Lora], bool | None]:
    """The adapters, checked, and whether their text encoder parts are wanted.

    Args:
        previous: an image's settings, or {}.
        options: what counts before these.
        names: of the experts.
    """
    loras = [Lora.read(text) for text in options.lora or ()]
    if not loras:
        loras = [Lora(*each) for each in previous.get("loras", ())]
    text_encoder = options.lora_text_encoder
    text_encoder = previous.get("lora_text_encoder") if text_encoder is None else text_encoder
    for each in loras:
        each.check(names, text_encoder)
    return loras, text_encoder


def add_loras(pipe: Any, loras: Sequence[Lora], text_encoder: bool | None) -> None:
    """Load them into a pipeline."""
    for index, lora in enumerate(loras):
        pipe.load_lora_weights(
            lora.path, expert=lora.expert, adapter_name=f"lora_{index}", text_encoder=text_encoder
        )
    for name in dict.fromkeys(lora.expert for lora in loras):
        own = [(f"lora_{index}", each.scale) for index, each in enumerate(loras) if each.expert == name]
        pipe.set_adapters([n for n, _ in own], [scale for _, scale in own], expert=name)
