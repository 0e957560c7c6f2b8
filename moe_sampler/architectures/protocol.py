"""What the rest of the package asks of an expert's model. One file beside this one answers for each kind."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from diffusers.models.attention_processor import Attention
    from torch import Tensor, nn

__all__ = ["Architecture", "ModelShape", "ReusableArchitecture", "WatchableArchitecture"]


@dataclass(frozen=True)
class ModelShape:
    """What a model's config says of its inputs and outputs.

    Args:
        sample_size: side of the latents it was made for; None where its config doesn't say, or they aren't
            square.
        in_channels, out_channels: of the latents.
        cross_attention_dim: channels of the text features.
        size_multiple: height and width of latents must be multiples of it.
    """

    sample_size: int | None
    in_channels: int
    out_channels: int
    cross_attention_dim: int
    size_multiple: int


class Architecture(Protocol):
    """One class of models, and how it is built, filled and called.

    Configs are what the model's config.json holds. Tensors may be on the meta device.
    """

    @property
    def class_name(self) -> str:
        """Of the model, as config.json's `_class_name`."""
        ...

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What trainers put before the names of its tensors."""
        ...

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        """What a config says, its class's defaults for what it leaves out."""
        ...

    def build(self, config: Mapping[str, Any]) -> ModelMixin:
        """A new model, its weights drawn from torch's generator on torch's current device."""
        ...

    def call(
        self, model: nn.Module, x: Tensor, timestep: Tensor, prompt_embeds: Tensor, **conditioning: Any
    ) -> Tensor:
        """The model's prediction [B, out_channels, h, w].

        Args:
            model: of this class, or what wraps it and is called as it is.
            x: [B, in_channels, h, w], in the model's dtype.
            timestep: [] or [B].
            prompt_embeds: [B, tokens, cross_attention_dim], in the model's dtype.
            conditioning: what else its forward takes.
        """
        ...

    def own_names(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        """A file's tensors under the model's own names, where the file has those of another codebase; what it
        doesn't know keeps its name."""
        ...

    def guess(
        self, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], unexpected: Collection[str]
    ) -> str:
        """What tensors that don't fit probably are, as a sentence for an error; "" without an idea.

        Args:
            tensors: the file's.
            expected: the model's own.
            unexpected: names that the model doesn't have.
        """
        ...


class ReusableArchitecture(Architecture, Protocol):
    """An architecture whose outermost layers can be run alone, with the features of everything deeper from an
    earlier call (see `sampling.reuse`)."""

    def check_reusable(self, model: Any) -> None:
        """Raise ValueError, with what to do, for a model of this class that can't, as it is or as it is
        wrapped."""
        ...

    def call_recording(
        self, model: Any, x: Tensor, timestep: Tensor, prompt_embeds: Tensor, **conditioning: Any
    ) -> tuple[Tensor, Tensor]:
        """As `call`, to the last bit, with the deep features [B, ...]."""
        ...

    def call_reusing(
        self,
        model: Any,
        x: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        features: Tensor,
        **conditioning: Any,
    ) -> Tensor:
        """The prediction, computed in the outermost layers alone; with the features of a call of the same
        inputs that is `call`'s to the last bit."""
        ...

    def reuse_share(self, config: Mapping[str, Any]) -> float:
        """What such a call costs of a full one, in multiplications, at the size the model was made for."""
        ...


class WatchableArchitecture(Architecture, Protocol):
    """An architecture whose layers can be watched at work: what David and the student's features need."""

    def block_channels(self, model: Any) -> dict[str, int]:
        """Channels of the outputs [B, channels, h, w] of the model's blocks, by the submodule's name. A
        block's output is a tensor or a tuple that begins with it."""
        ...

    def middle(self, model: Any) -> nn.Module | None:
        """The submodule whose output [B, channels, h, w] is the model's most abstract one, if it has one."""
        ...

    def self_attention_layers(self, model: Any) -> dict[str, Attention]:
        """The submodules whose image tokens attend to each other, by name, in the order of definition."""
        ...

    def first_layers(self, model: Any, names: Collection[str]) -> nn.Module:
        """The same model, sharing every weight, that ends after its middle, or once the submodules of these
        names have run, if that is later. What it returns is of no use."""
        ...
