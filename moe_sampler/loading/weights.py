"""One expert's weights: a model built without them, which can take them in and give them up again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..architectures import build, named_architecture
from ..errors import CheckpointError
from .expert_files import ExpertFiles
from .folders import aligned
from .marks import MARK_TENSORS
from .state_dicts import check_fit, read_tensors, without_wrappers

if TYPE_CHECKING:
    from diffusers import ModelMixin

__all__ = ["ExpertWeights", "empty_model", "file_tensors"]

Tensors = dict[str, torch.Tensor]
Arrival = torch.Event | torch.cuda.Event

MAPPED_BYTES = 256 * 2**20
"""How much of a file's weights is taken in before the file is mapped anew."""


def empty_model(config: Mapping[str, Any], origin: str, dtype: torch.dtype) -> ModelMixin:
    """An expert's model on the meta device: its shape, and no memory.

    Raises:
        CheckpointError: a config that makes no model.
    """
    from accelerate import init_empty_weights

    name = named_architecture(config).class_name
    try:
        with init_empty_weights():
            model = build(config)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{origin}: its config makes no {name}: {error}") from error
    # Not diffusers' own `to`, which warns of layers it would keep in float32.
    torch.nn.Module.to(model, dtype)
    return model.eval()


def file_tensors(files: ExpertFiles, expected: Mapping[str, torch.Tensor]) -> Tensors:
    """An expert's tensors as views of its mapped files, under its model's own names, which are checked."""
    own = files.architecture
    try:
        read = without_wrappers(read_tensors(files.weights), own.prefixes, str(files.weights[0]))
        weights = {key: tensor for key, tensor in read.items() if key not in MARK_TENSORS}
        tensors = own.own_names(weights, files.config)
    except CheckpointError as error:
        raise CheckpointError(f"{files.where} cannot be loaded as {own.class_name}: {error}") from None
    check_fit(tensors, expected, files.where, own.class_name, own.guess)
    return tensors


def _laid_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor in the memory layout of another, which may be on the meta device."""
    last = like.ndim == 4 and not like.is_contiguous()
    return tensor.contiguous(memory_format=torch.channels_last) if last else tensor


class ExpertWeights:
    """A model's own parameters, wherever they are: adapters added later are not among them.

    Args:
        model: with its weights, or on the meta device when `read` gives them.
        read: the tensors by key, as views of files that can be mapped again at any time; None when there are
            no files, and the weights can only be kept in host memory.
    """

    def __init__(self, model: torch.nn.Module, read: Callable[[], Tensors] | None = None) -> None:
        self.model, self._read = model, read
        # By module, not by name: an adapter that wraps a layer renames it.
        self._slots = {
            f"{prefix}{'.' if prefix else ''}{name}": (module, name)
            for prefix, module in model.named_modules()
            for name in module._parameters
            if module._parameters[name] is not None
        }
        self._host: Tensors = {}
        """What no file holds: pinned copies for CUDA, and tensors that were changed after they were read."""
        self._changed: set[str] = set()
        self._ahead: tuple[Tensors, Arrival] | None = None
        self._taken: dict[str, tuple[torch.nn.Parameter, int]] = {}

    @property
    def has_files(self) -> bool:
        return self._read is not None

    @property
    def resident(self) -> bool:
        """Whether the model has its weights."""
        return all(self._parameter(key).device.type != "meta" for key in self._slots)

    @property
    def nbytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in map(self._parameter, self._slots))

    def _parameter(self, key: str) -> torch.nn.Parameter:
        module, name = self._slots[key]
        parameter = module._parameters[name]
        assert parameter is not None  # only such are slots
        return parameter

    def _put(self, key: str, tensor: torch.Tensor) -> None:
        module, name = self._slots[key]
        keeps = self._parameter(key).requires_grad
        module._parameters[name] = torch.nn.Parameter(tensor, requires_grad=keeps)

    def _sources(self) -> Tensors:
        """Every tensor: from host memory where it is kept there, else from the files."""
        if self._slots.keys() <= self._host.keys():
            return self._host
        if self._read is None:
            raise RuntimeError("weights that are in no file and not in host memory cannot be taken in")
        return {**self._read(), **self._host}

    def _pin(self) -> None:
        """Keep pinned host copies, in the dtype that is computed in."""
        for key, tensor in self._sources().items():
            if not tensor.is_pinned():
                self._host[key] = tensor.to(self._parameter(key).dtype).pin_memory()

    def prefetch(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        """Begin to copy the weights to a CUDA device, beside whatever it is doing, if there is room."""
        if self.resident or self._ahead is not None or torch.cuda.mem_get_info(device)[0] < 1.1 * self.nbytes:
            return
        self._pin()
        with torch.cuda.stream(stream):
            ahead = {
                key: self._host[key].to(device, self._parameter(key).dtype, non_blocking=True)
                for key in self._slots
            }
        self._ahead = (ahead, stream.record_event())

    def _arrived(self, tensors: Tensors, event: Arrival, device: torch.device) -> Tensors:
        """What was prefetched, safe to use on the current stream."""
        self._ahead = None
        stream = torch.cuda.current_stream(device)
        stream.wait_event(event)
        for tensor in tensors.values():
            tensor.record_stream(stream)
        return tensors

    def take(self, device: torch.device | str) -> None:
        """Give the model its weights, on `device`.

        Raises:
            CheckpointError: the files have changed since they were found.
        """
        device = torch.device(device)
        if not self.resident:
            self._fill(device)
            self._taken = {
                key: (p, p._version) for key, p in zip(self._slots, self._parameters(), strict=True)
            }
        lost = [name for name, p in self.model.named_parameters() if p.device.type == "meta"]
        if lost:
            raise RuntimeError(
                f"{lost[0]} was added while the expert was not in memory, and has no data: load adapters "
                "through the pipeline's load_lora_weights"
            )
        self.model.to(device)

    def take_for_good(self, device: torch.device | str) -> None:
        """Give the model its weights, and the copies on the host up."""
        self.take(device)
        for key in self._changed:
            self._taken.pop(key, None)
        self._host, self._changed = {}, set()

    def _fill(self, device: torch.device) -> None:
        if device.type == "cuda" and self._ahead is None:
            self._pin()
        sources = self._sources() if self._ahead is None else self._arrived(*self._ahead, device)
        since_mapped = 0
        for key in self._slots:
            if since_mapped > MAPPED_BYTES and sources is not self._host and self._read is not None:
                # What was read of a mapped file counts as memory until it is unmapped.
                sources, since_mapped = {}, 0
                sources = self._sources()
            tensor = sources[key].to(device, self._parameter(key).dtype, non_blocking=True)
            self._put(key, _laid_out(aligned(tensor), self._parameter(key)))
            since_mapped += tensor.numel() * tensor.element_size()

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [self._parameter(key) for key in self._slots]

    def release(self) -> None:
        """Give the weights up. What no file holds is kept on the host: adapters, layers with a fused adapter,
        and what was changed in place (but for changes through `.data`, which leave no trace)."""
        self._ahead = None
        if any(parameter.device.type == "meta" for parameter in self._parameters()):
            return
        # Fusing an adapter changes weights in a way that leaves no trace but their values. diffusers sets
        # this to something other than False when an adapter is or was loaded.
        adapted = getattr(self.model, "_hf_peft_config_loaded", False) is not False
        sources = self._sources() if adapted and self._taken else {}
        for key in self._slots:
            parameter = self._parameter(key)
            taken, version = self._taken.get(key, (None, -1))
            changed = taken is not parameter or parameter._version != version
            if not changed and key in sources:
                changed = not torch.equal(sources[key].to(parameter.dtype), parameter.detach().to("cpu"))
            if changed:
                self._host[key] = parameter.detach().to("cpu")
                self._changed.add(key)
            self._put(key, torch.empty_like(parameter, device="meta"))
        self._taken = {}
        self._keep_adapters()

    def _keep_adapters(self) -> None:
        own = {id(parameter) for parameter in self._parameters()}
        for parameter in self.model.parameters():
            if id(parameter) not in own:
                parameter.data = parameter.data.to("cpu")
