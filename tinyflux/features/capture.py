"""Watching a model's self-attention: each layer's queries and keys, as they are made, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from moe_sampler.architectures import watchable
from moe_sampler.errors import listed

__all__ = ["CaptureError", "capture_self_attention"]

OnLayer = Callable[[str, Tensor, Tensor, tuple[int, int]], None]
"""Called with (layer, q, k, (height, width)); q, k: [B, heads, height * width, head size], views."""


class CaptureError(ValueError):
    """A layer of the model did not show what was asked of it."""


@contextmanager
def capture_self_attention(model: nn.Module, on_layer: OnLayer) -> Iterator[Callable[[], None]]:
    """Within the context, every self-attention layer of a forward pass is shown to `on_layer`.

    Yields what to call after each forward pass: it checks that every layer was seen.

    Forward hooks see the projections that the model computes anyway, whatever attention processor it has;
    q and k are let go before the layer itself attends. The hooks are gone afterwards, also after an error.

    Raises:
        CaptureError: after a pass, if a layer was not seen in it; at once, if a layer's tokens are no grid.
    """
    layers = watchable(model).self_attention_layers(model)
    if not layers:
        raise CaptureError("the model has no self-attention layers: it cannot teach attention statistics")
    normalised = [
        name for name, layer in layers.items() if layer.norm_q is not None or layer.norm_k is not None
    ]
    if normalised:
        raise CaptureError(f"{listed(normalised)} normalise queries and keys, which is not supported")
    grid: list[tuple[int, int]] = []
    seen: list[str] = []
    handles = []

    def note_grid(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden_states = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden_states, Tensor) and hidden_states.ndim == 4:
            grid[:] = [(hidden_states.shape[-2], hidden_states.shape[-1])]

    def show(name: str, layer: Attention, q: Tensor, k: Tensor) -> None:
        q, k = (x.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for x in (q, k))
        if not grid or q.shape != k.shape or q.shape[2] != grid[0][0] * grid[0][1]:
            where = f"a {grid[0][0]} × {grid[0][1]} grid" if grid else "an unknown grid"
            raise CaptureError(f"{name}: {q.shape[2]} queries and {k.shape[2]} keys on {where}")
        seen.append(name)
        on_layer(name, q, k, grid[0])

    def watch(name: str, layer: Attention) -> None:
        queries: list[Tensor] = []

        def on_q(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            queries[:] = [output]

        def on_k(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            if not queries:
                raise CaptureError(f"{name} made its keys before its queries")
            show(name, layer, queries.pop(), output)

        def on_qkv(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            q, k, _ = output.chunk(3, -1)
            show(name, layer, q, k)

        if getattr(layer, "fused_projections", False):
            handles.append(layer.get_submodule("to_qkv").register_forward_hook(on_qkv))
        else:
            handles.append(layer.get_submodule("to_q").register_forward_hook(on_q))
            handles.append(layer.get_submodule("to_k").register_forward_hook(on_k))

    def check() -> None:
        missed = [name for name in layers if name not in seen]
        if missed:
            raise CaptureError(f"{listed(missed)} did not show queries and keys through their projections")
        seen.clear()

    ancestors = {name.rsplit(".", depth)[0] for name in layers for depth in range(name.count(".") + 1)}
    modules = dict(model.named_modules())
    try:
        for name in sorted(ancestors):
            handles.append(modules[name].register_forward_pre_hook(note_grid, with_kwargs=True))
        for name, layer in layers.items():
            watch(name, layer)
        yield check
    finally:
        for handle in handles:
            handle.remove()
