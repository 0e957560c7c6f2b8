"""Queries, keys and values of an attention as one matrix product: what diffusers calls fused projections.

diffusers' own `fuse_qkv_projections` copies the weights into layers of its own. They would take memory twice,
be saved along, and know nothing of adapters, offloading or weights that are loaded later. Here the weights
stay where they were named, and only come to lie side by side in memory, where one product reads them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

__all__ = ["join_projections"]

_library = torch.library.Library("moe_sampler", "FRAGMENT")
_library.define("side_by_side(Tensor x, Tensor[] weights) -> Tensor")


def _product(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """x: [..., n]. weights: [m_i, n] each. Returns [..., sum of m_i].

    An operator of its own, as whether weights lie side by side is known when it runs, also in compiled code.
    """
    if not _adjacent(weights):
        # Values and names stay; loaded, cast or moved anew they lie apart again until the next call.
        for weight, place in zip(
            weights, torch.cat(list(weights)).split([len(w) for w in weights]), strict=True
        ):
            weight.data = place
    rows, columns = sum(map(len, weights)), weights[0].shape[1]
    return F.linear(x, weights[0].as_strided((rows, columns), (columns, 1)))


def _adjacent(weights: Sequence[Tensor]) -> bool:
    storage, end = weights[0].untyped_storage().data_ptr(), weights[0].data_ptr()
    for weight in weights:
        apart = weight.data_ptr() != end or weight.untyped_storage().data_ptr() != storage
        if apart or not weight.is_contiguous():
            return False
        end += weight.nbytes
    return True


_library.impl("side_by_side", _product, "CompositeExplicitAutograd")


@torch.library.register_fake("moe_sampler::side_by_side", lib=_library)
def _(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(len(weight) for weight in weights)))


class Projections(nn.Module):
    """Some of an attention's projections, of one input. It has no parameters of its own.

    Args:
        attention: whose.
        names: of its layers, in order.
    """

    def __init__(self, attention: Attention, names: Sequence[str]) -> None:
        super().__init__()
        self._of, self._names = (attention,), tuple(names)  # in a tuple, the attention is no submodule

    def forward(self, x: Tensor) -> Tensor:
        layers = [getattr(self._of[0], name) for name in self._names]
        if torch.is_grad_enabled() or not all(map(_plain, layers)):
            return torch.cat([layer(x) for layer in layers], -1)
        return torch.ops.moe_sampler.side_by_side(x, [layer.weight for layer in layers])


def _plain(layer: nn.Module) -> bool:
    """Whether it is nothing but a product: no adapter, no quantized one, and nobody watches it."""
    return (
        type(layer) is nn.Linear
        and layer.bias is None
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and "forward" not in vars(layer)
    )


def join_projections(models: Iterable[nn.Module], joined: bool) -> None:
    """Let attentions project with one product, or with one each as diffusers does; in place. Attentions that
    somebody gave another processor are left alone."""
    from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0

    fused: Any = FusedAttnProcessor2_0  # diffusers annotates the oldest of its processors alone
    plain: Any = AttnProcessor2_0
    for attention in _attentions(models):
        name, own = ("to_kv", "kv") if attention.is_cross_attention else ("to_qkv", "qkv")
        is_joined = isinstance(getattr(attention, name, None), Projections)
        if joined and not is_joined and type(attention.processor) is plain:
            setattr(attention, name, Projections(attention, [f"to_{each}" for each in own]))
            attention.set_processor(fused())
        elif is_joined and not joined:
            delattr(attention, name)
            if type(attention.processor) is fused:
                attention.set_processor(plain())


def _attentions(models: Iterable[nn.Module]) -> Iterator[Attention]:
    from diffusers.models.attention_processor import Attention

    for model in models:
        yield from (module for module in model.modules() if isinstance(module, Attention))
