"""The text encoder's halves of the experts' adapters: all experts share it, so each half is named by both.

PEFT keeps one list of active adapters a layer. An expert changes its own part of that list alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["activate", "active", "adapters", "fuse", "keeping_names", "remove", "remove_all", "text_name"]


def text_name(expert: str, name: str) -> str:
    """What an expert's adapter is called in the text encoder."""
    return f"{expert}:{name}"


def adapters(model: Any) -> set[str]:
    """The names of a model's adapters."""
    return set(getattr(model, "peft_config", {}))


@contextmanager
def keeping_names(text_encoder: Any) -> Iterator[None]:
    """Load an adapter within: transformers would keep the adapter's renaming of tensors, and save by it."""
    held, attribute = vars(text_encoder), "_weight_conversions"
    own = {attribute: held[attribute]} if attribute in held else {}
    try:
        yield
    finally:
        held.pop(attribute, None)
        held.update(own)


def _layers(text_encoder: Any) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in text_encoder.modules() if isinstance(module, BaseTunerLayer))


def active(text_encoder: Any) -> list[str]:
    """The adapters at work in the text encoder; in every layer the same, whichever it has."""
    return list(dict.fromkeys(name for layer in _layers(text_encoder) for name in layer.active_adapters))


def activate(text_encoder: Any, expert: str, others: list[str], scales: Mapping[str, float]) -> None:
    """Let these of an expert's adapters act, and `others` of other experts as they do."""
    own = {text_name(expert, name): scale for name, scale in scales.items()}
    own = {name: scale for name, scale in own.items() if name in adapters(text_encoder)}
    others = [name for name in others if not name.startswith(text_name(expert, ""))]
    for layer in _layers(text_encoder):
        layer.set_adapter([*others, *own])
        for name, scale in own.items():
            layer.set_scale(name, scale)


def fuse(text_encoder: Any, expert: str, lora_scale: float) -> None:
    """Add an expert's active adapters to the weights, and take them out: merged ones would silence others."""
    own = {name for name in active(text_encoder) if name.startswith(text_name(expert, ""))}
    for layer in _layers(text_encoder):
        for name in own & set(layer.scaling):
            layer.scaling[name] *= lora_scale
            layer.merge(adapter_names=[name])
            layer.merged_adapters.clear()
    remove(text_encoder, own)


def remove(model: Any, names: set[str]) -> None:
    """Take adapters out of a model of diffusers or transformers; the layers too, if there are no others."""
    if not names:
        return
    if adapters(model) <= names:
        remove_all(model)
    elif hasattr(model, "delete_adapters"):
        model.delete_adapters(list(names))
    else:
        kept = [name for name in active(model) if name not in names]
        for name in names:
            model.delete_adapter(name)
        for layer in _layers(model):
            layer.set_adapter(kept)


def remove_all(model: Any) -> None:
    """Take every adapter out of a model of diffusers or transformers."""
    from diffusers.utils import recurse_remove_peft_layers

    if not adapters(model):
        return
    if hasattr(model, "unload_lora"):
        model.unload_lora()
        return
    recurse_remove_peft_layers(model)
    del model.peft_config
    model._hf_peft_config_loaded = False
