"""What a `Trainer` is told to train: a model, its data, and the loss of a micro-batch."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, NamedTuple, Protocol

from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from .draws import Draws

__all__ = ["Losses", "Published", "Task"]


class Losses(NamedTuple):
    """A micro-batch's loss and what the log shows of it; all but `loss` are detached.

    loss: [], the mean over the micro-batch. terms: [] each, by name. per_sample: [B], what the log shows by
    noise level. noise: [B], each sample's share of noise, 1 at pure noise.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    per_sample: Tensor
    noise: Tensor

    def kept(self, copy: bool) -> Losses:
        """For the log, without the graph. copy: out of memory that will be used again."""

        def own(tensor: Tensor) -> Tensor:
            return tensor.detach().clone() if copy else tensor.detach()

        terms = {name: own(value) for name, value in self.terms.items()}
        return Losses(own(self.loss), terms, own(self.per_sample), own(self.noise))


class Published(NamedTuple):
    """What a trained model's folder says of it, where it will be.

    header: of its weights (see `publishing.modelspec`). sections: of its card, Markdown that says how it is
    loaded. files: beside its config and weights.
    """

    header: dict[str, str]
    sections: list[str]
    files: tuple[str, ...] = ()


class Task(Protocol):
    """Implement this to train something with `Trainer`.

    Attributes:
        name: of the run in logs and trackers.
        model: what is trained, where `requires_grad`; a diffusers model (`ModelMixin`).
        data: a dataset with a length; torch's `default_collate` or the task's own `collate` makes batches.
        weights_name: of the file that the trained model's tensors go to, beside its config. Where there is a
            method `shipped`, it is given the model's tensors by name and says which these are; what is
            trained along and of no use afterwards stays in the checkpoints, or where a method `beside` gives
            tensors by file name, lies there, and isn't uploaded. `ships_config` is False where they are no
            whole model; where there is a method `save_config(folder)`, it writes the configs, else the
            model's own does. A method `published(address, license)` says what the model's card and header
            hold beside the run, as `Published`, for the `publishing.upload.Address` it will have.
        steps_alike: whether `loss` asks the device for the same operations at every step, of batches of one
            shape: nothing is decided on the host, and what isn't a tensor in a batch isn't looked at. Then
            the step can be recorded (`cuda_graph`).
    """

    name: str
    weights_name: str

    @property
    def steps_alike(self) -> bool: ...

    @property
    def model(self) -> nn.Module: ...

    @property
    def data(self) -> Dataset: ...

    def loss(self, model: nn.Module, batch: Any, draws: Draws) -> Losses:
        """Of a micro-batch. `model` is `self.model`, maybe wrapped for several processes or compiled: call
        it, don't look into it. Everything random comes from `draws`."""
        ...

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Numbers on held-out data, with fixed noise; "loss" is what the best checkpoint is chosen by. Empty
        where there is nothing held out."""
        ...

    def samples(self, model: nn.Module) -> list[Image.Image]:
        """Pictures from fixed seeds, for eyes. May be empty."""
        ...

    def describe(self) -> dict[str, Any]:
        """Of the data and all else a model card should say beside the settings. Plain values, and the same
        in a run that is resumed: a checkpoint is only continued with the same description."""
        ...


def length(data: Dataset) -> int:
    """How many samples a dataset has.

    Raises:
        TypeError: one that only iterates.
    """
    if not isinstance(data, Sized):
        raise TypeError(f"{type(data).__name__} has no length: a task's data is a dataset with __len__")
    return len(data)
