"""What an expert's model may be. The rest of the package builds, fills and calls models through here alone.

Another kind of model is one more file: a class as `protocol.Architecture` says, and its place in `_KNOWN`;
or, from outside of this package, `register`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .protocol import Architecture, ModelShape, ReusableArchitecture, WatchableArchitecture
from .unet import SD15_UNET, UNET

if TYPE_CHECKING:
    from diffusers import ModelMixin

__all__ = [
    "DEFAULT_CONFIG",
    "Architecture",
    "ModelShape",
    "ReusableArchitecture",
    "WatchableArchitecture",
    "architecture_of",
    "build",
    "named_architecture",
    "register",
    "reusable",
    "reuse_share",
    "shape_of",
    "watchable",
]

DEFAULT_CONFIG: Mapping[str, Any] = SD15_UNET
"""Of weights without a config, where the base has none either."""

_DEFAULT: Architecture = UNET
_KNOWN: dict[str, Architecture] = {UNET.class_name: UNET}


def register(architecture: Architecture) -> None:
    """Let experts be models of another class.

    Raises:
        ValueError: a class that is known already.
    """
    if architecture.class_name in _KNOWN:
        raise ValueError(f"{architecture.class_name} is known already")
    _KNOWN[architecture.class_name] = architecture


def named_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config's `_class_name` names; a UNet's where it has none.

    Raises:
        CheckpointError: one that no expert can be.
    """
    name = config.get("_class_name", _DEFAULT.class_name)
    if name not in _KNOWN:
        raise CheckpointError(f"is a {name}, but experts are {_known()}")
    return _KNOWN[name]


def architecture_of(model: Any) -> Architecture:
    """The architecture of a loaded model, also of one that `torch.compile` wraps.

    Raises:
        TypeError: something else.
    """
    return _own_architecture(_uncompiled(model))


def shape_of(model: Any) -> ModelShape:
    """What a loaded model takes and gives.

    Raises:
        TypeError: as `architecture_of`.
    """
    return architecture_of(model).shape(_uncompiled(model).config)


def watchable(model: Any) -> WatchableArchitecture:
    """As `architecture_of`, for who watches the model's layers.

    Raises:
        TypeError: a model whose layers can't be watched, as it is or as it is wrapped.
    """
    found: Any = _own_architecture(model)
    if not hasattr(found, "self_attention_layers"):
        raise TypeError(f"the layers of a {found.class_name} can't be watched")
    return found


def reusable(model: Any) -> ReusableArchitecture:
    """As `architecture_of`, for who lets calls reuse features.

    Raises:
        TypeError: as `architecture_of`.
        ValueError: a model whose outermost layers can't be run alone, and what to do about it.
    """
    found: Any = architecture_of(model)
    _check_reusable(found)
    if model is not _uncompiled(model):
        raise ValueError(
            f"a {found.class_name} in torch.compile's wrapper has no layers to run alone: compile its blocks "
            '(compile_repeated_blocks, or speed="max") instead, or leave out reuse'
        )
    found.check_reusable(model)
    return found


def reuse_share(config: Mapping[str, Any]) -> float:
    """What a call that reuses features costs of a full one, from a model's config.

    Raises:
        CheckpointError: a config that makes no expert's model.
        ValueError: a model whose features can't be reused.
    """
    found: Any = named_architecture(config)
    _check_reusable(found)
    try:
        return found.reuse_share(config)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"its config makes no {found.class_name}: {error}") from error


def _check_reusable(architecture: Any) -> None:
    if not hasattr(architecture, "call_reusing"):
        raise ValueError(
            f"features of a {architecture.class_name} can't be reused: leave out reuse and budget"
        )


def _uncompiled(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)


def _own_architecture(model: object) -> Architecture:
    for cls in type(model).__mro__:
        if cls.__name__ in _KNOWN:
            return _KNOWN[cls.__name__]
    raise TypeError(f"an expert's model must be a {_known()} itself, not wrapped; got {type(model).__name__}")


def _known() -> str:
    return " or ".join(_KNOWN)


def build(config: Mapping[str, Any]) -> ModelMixin:
    """A new model from its config, its weights drawn from torch's generator.

    Raises:
        CheckpointError: as `named_architecture`.
    """
    return named_architecture(config).build(config)
