"""A UNet's outermost layers alone: what is fresh in a call that reuses the features of everything deeper.

The last layer of the last block joins the deep features with the output of `conv_in`. A full call may keep
these features; a call that reuses them needs `conv_in`, the timestep and that one layer (DeepCache's first
branch, arXiv:2312.00858). Both are diffusers' own forward, of a model that shares every weight.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_reusable", "recording_model", "reusing_model", "share_of_outer_layers"]

_SPLITTABLE = ("UpBlock2D", "CrossAttnUpBlock2D")
"""Blocks that are a list of layers, each of which takes one skip connection."""


class LastLayer(nn.Module):
    """The last layer of a UNet, which keeps the deep features it is given, or is given some instead."""

    def __init__(self, layer: nn.Module, features: Tensor | None = None) -> None:
        super().__init__()
        self.layer, self.features, self._given = layer, features, features is not None
        self.resnets = layer.resnets  # which the UNet counts skip connections by
        self.has_cross_attention = getattr(layer, "has_cross_attention", False)

    def forward(self, hidden_states: Tensor, **inputs: Any) -> Tensor:
        if not self._given:
            self.features = hidden_states
        return self.layer(hidden_states=self.features, **inputs)


def check_reusable(model: Any) -> None:
    """Raise ValueError unless its outermost layers can be run alone."""
    block = model.up_blocks[-1]
    if type(block).__name__ not in _SPLITTABLE:
        raise ValueError(
            f"features can be reused in a UNet that ends in a {' or '.join(_SPLITTABLE)}, and this one ends "
            f"in a {type(block).__name__}: leave out reuse"
        )
    if any(hasattr(module, "_diffusers_hook") and "forward" in vars(module) for module in (model, block)):
        raise ValueError("features can't be reused with diffusers' group offloading: leave out reuse")
    if "forward" in vars(model) and not hasattr(model, "_hf_hook"):
        raise ValueError(
            "this UNet's forward was replaced by another, which its outermost layers alone would not run: "
            "leave out reuse"
        )
    if model._compiled_call_impl is not None:
        raise ValueError(
            "a UNet that is compiled as a whole has no layers to run alone: compile its blocks "
            '(compile_repeated_blocks, or speed="max") instead, or leave out reuse'
        )


def recording_model(model: Any) -> tuple[Any, LastLayer]:
    """The same model, which computes the same to the last bit; and its last layer, which has the features
    when it was called."""
    _bring(model)
    others: list[Any] = list(model.up_blocks)
    block = others.pop()
    last = LastLayer(_layers(block, slice(-1, None)))
    first = [_layers(block, slice(None, -1), inner=True)] if len(block.resnets) > 1 else []
    return _with_parts(model, up_blocks=nn.ModuleList([*others, *first, last])), last


def reusing_model(model: Any, features: Tensor) -> Any:
    """The outermost layers, with deep features [B, channels, h, w] from a call of `recording_model`."""
    _bring(model)
    last = LastLayer(_layers(model.up_blocks[-1], slice(-1, None)), features)
    empty = {"down_blocks": nn.ModuleList(), "mid_block": None}
    return _with_parts(model, **empty, up_blocks=nn.ModuleList([last]))


def _bring(model: Any) -> None:
    """What accelerate's hooks, which are not part of a model that shares its weights, do before a call: they
    bring the weights to the device."""
    hook = getattr(model, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(model)


def _layers(block: Any, layers: slice, inner: bool = False) -> Any:
    """Some of a block's layers; the inner ones are not followed by what follows the last one."""
    lists = {n: block._modules[n] for n in ("resnets", "attentions") if n in block._modules}
    parts: dict[str, Any] = {name: nn.ModuleList(list(each)[layers]) for name, each in lists.items()}
    return _with_parts(block, **parts, **({"upsamplers": None} if inner else {}))


def _with_parts(module: Any, **parts: Any) -> Any:
    """The same module, sharing every weight, with other submodules of these names."""
    other = copy.copy(module)
    other._modules = {**module._modules, **parts}
    vars(other).pop("forward", None)  # of a hook, which would call the module itself
    return other


def share_of_outer_layers(model: Any, inputs: tuple[Tensor, ...]) -> float:
    """What a call that reuses features costs of a full one, in multiplications. All may be on the meta
    device."""
    from torch.utils.flop_counter import FlopCounterMode

    recording, last = recording_model(model)
    with torch.no_grad(), FlopCounterMode(display=False) as full:
        recording(*inputs)
    assert last.features is not None
    with torch.no_grad(), FlopCounterMode(display=False) as outer:
        reusing_model(model, last.features)(*inputs)
    return outer.get_total_flops() / full.get_total_flops()
