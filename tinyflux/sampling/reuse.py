"""A student's first and last blocks alone: what is fresh in a call that reuses what those between them did.

A full call may keep what the middle blocks added to its tokens. A call that reuses it runs the first block,
adds it and runs the last one (`moe_sampler.sampling.reuse` says which calls do). Both are the student's own
forward, of a model that shares every weight.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from moe_sampler.tinyflux.model.config import TinyFluxConfig
from moe_sampler.tinyflux.model.tinyflux import TinyFlux

__all__ = ["check_reusable", "recording_model", "reuse_share", "reusing_model"]

_FEWEST = 3
_TOKENS, _SIDE = 128, 32
"""Of the text and of the latents where nothing else is said, for the price alone."""


class _AtTheEdge(nn.Module):
    """One of the outer blocks. A double block's streams are its first two arguments, text and image, which
    one stream has one after the other."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.streams = 2 if type(block).__name__ == "DoubleBlock" else 1

    @property
    def attn(self) -> nn.Module:
        """What the model looks for to spread Sol's map."""
        return self.block.get_submodule("attn")


class FirstBlock(_AtTheEdge):
    """Keeps its tokens [B, L + N, D], text first."""

    tokens: Tensor

    def forward(self, *inputs: Any) -> Any:
        given = self.block(*inputs)
        self.tokens = torch.cat(given, 1) if self.streams == 2 else given
        return given


class LastBlock(_AtTheEdge):
    """Keeps what the blocks before it added to the first one's tokens; or adds it where it is given.

    first: where they began; without features.
    """

    def __init__(self, block: nn.Module, first: FirstBlock | None, features: Tensor | None) -> None:
        super().__init__(block)
        self.first, self.features = first, features

    def forward(self, *inputs: Any) -> Any:
        streams, rest = inputs[: self.streams], inputs[self.streams :]
        if self.first is not None:
            tokens = torch.cat(streams, 1) if self.streams == 2 else streams[0]
            self.features = tokens - self.first.tokens
            return self.block(*inputs)
        assert self.features is not None
        added = self.features.split([stream.shape[1] for stream in streams], 1)
        return self.block(*(a + b for a, b in zip(streams, added, strict=True)), *rest)


def check_reusable(model: TinyFlux) -> None:
    """Raise ValueError unless its outer blocks can be run alone."""
    blocks = _blocks(model)
    if len(blocks) < _FEWEST:
        raise ValueError(
            f"this student has {len(blocks)} blocks, and none between the first and the last: leave out reuse"
        )
    if "forward" in vars(model) or model._compiled_call_impl is not None:
        raise ValueError(
            "a student that is compiled as a whole, or whose forward was replaced, has no blocks to run "
            "alone: compile its blocks instead, or leave out reuse"
        )


def recording_model(model: TinyFlux) -> tuple[TinyFlux, LastBlock]:
    """The same student, which computes the same to the last bit; and its last block, which has the features
    [B, L + N, D] when it was called."""
    first_block, *middle, last_block = _blocks(model)
    first = FirstBlock(first_block)
    last = LastBlock(last_block, first, None)
    return _with_blocks(model, [first, *middle, last]), last


def reusing_model(model: TinyFlux, features: Tensor) -> TinyFlux:
    """The outer blocks, with features from a call of `recording_model`."""
    first, *_, last = _blocks(model)
    return _with_blocks(model, [first, LastBlock(last, None, features)])


def _blocks(model: TinyFlux) -> list[nn.Module]:
    return [*model.double_blocks, *model.single_blocks]


def _with_blocks(model: TinyFlux, blocks: Sequence[nn.Module]) -> TinyFlux:
    kinds: dict[bool, list[nn.Module]] = {True: [], False: []}
    for block in blocks:
        own = block.block if isinstance(block, _AtTheEdge) else block
        kinds[type(own).__name__ == "DoubleBlock"].append(block)
    other = copy.copy(model)
    parts = {"double_blocks": nn.ModuleList(kinds[True]), "single_blocks": nn.ModuleList(kinds[False])}
    other._modules = {**model._modules, **parts}
    return other


def reuse_share(config: TinyFluxConfig | Mapping[str, Any]) -> float:
    """What a call that reuses features costs of a full one, in multiplications, at the student's own size.

    Raises:
        ValueError: a student without blocks between the first and the last.
    """
    values = config.to_dict() if isinstance(config, TinyFluxConfig) else dict(config)
    own = {key: value for key, value in values.items() if not key.startswith("_")}
    return _share(json.dumps(own, sort_keys=True, default=list))


@lru_cache(maxsize=16)
def _share(config: str) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = TinyFlux(TinyFluxConfig.from_dict(json.loads(config))).eval()
        check_reusable(model)
        height, width = model.config["sample_size"] or (_SIDE, _SIDE)
        inputs = {
            "hidden_states": torch.empty(1, height * width, model.config["in_channels"]),
            "encoder_hidden_states": torch.empty(1, _TOKENS, model.config["joint_attention_dim"]),
            "pooled_projections": torch.empty(1, model.config["pooled_projection_dim"]),
            "timestep": torch.empty(()),
            "size": (height, width),
        }
        recording, last = recording_model(model)
        with torch.no_grad(), FlopCounterMode(display=False) as full:
            recording(**inputs)
        assert last.features is not None
        with torch.no_grad(), FlopCounterMode(display=False) as outer:
            reusing_model(model, last.features)(**inputs)
    return outer.get_total_flops() / full.get_total_flops()
