"""An expert's model whose calls are CUDA graphs, alone or with the launch that ends the step.

A large GPU is done with a UNet's operations on one image before Python has launched the next ones. A recorded
call costs the host the copies of its inputs and one launch, whatever the number of layers.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._graphs import record, warm_up
from ..errors import first_line
from ..sampling.stretches import Recording
from .expert_model import ExpertModel

__all__ = ["CapturedModel", "Recordings"]

Work = Callable[[], Any]
Recorder = Callable[[Work], tuple[Callable[[], None], Any]]
"""work -> (what repeats it over the same memory, what it gave)."""

MOST = 8
"""Calls that are kept of a model: as many as it has sizes, batches and kinds of calls that alternate."""

_CONTAINERS = frozenset({dict, OrderedDict, list, set})


class _Recorded(NamedTuple):
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    replay: Callable[[], None]
    output: Any


class Recordings:
    """A model's recorded calls, one for each kind: shapes, dtypes, and everything that isn't a tensor.

    What is recorded holds for the model as it was: where its weights lie elsewhere, where a module, hook,
    adapter or any setting of a module is another, all is recorded anew.

    Args:
        model: on one device.
        recorder: records a call; by default as a CUDA graph.
    """

    def __init__(self, model: nn.Module, recorder: Recorder | None = None) -> None:
        self.model = model
        self._recorder = recorder or _CUDARecorder(model)
        self._calls: OrderedDict[Any, _Recorded] = OrderedDict()
        self._modules: list[nn.Module] = []
        self._state: tuple[list[Any], list[int]] = [], []
        self._given = 0

    def __call__(self, kind: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`call(*args, **kwargs)`, in memory of its own.

        Args:
            kind: of the call, where the model is called in several ways.

        Raises:
            ValueError: it can't be recorded, and what to do.
        """
        recorded = self.prepared(kind, call, args, kwargs)
        recorded.replay()
        # The next replay, of this call or of another, writes there again.
        return pytree.tree_map_only(Tensor, torch.clone, recorded.output)

    def prepared(
        self, kind: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Recorded:
        """The call's recording, with what it is given in its memory: for a call that works in place, and so
        can be replayed on what it left.

        Raises:
            ValueError: as for a call.
        """
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        plain = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        key = kind, structure, plain, *((t.shape, t.dtype) for t in tensors)
        if not self.hold():
            self._start_anew()
        if key not in self._calls:
            recorded = self._record(call, leaves, structure)
            if not self.hold():  # weights may come to lie elsewhere when a model is called at first
                self._start_anew()
            self._calls[key] = recorded
            while len(self._calls) > MOST:
                self._calls.popitem(last=False)
        self._calls.move_to_end(key)
        recorded = self._calls[key]
        for own, given in zip(recorded.inputs, tensors, strict=True):
            own.copy_(given, non_blocking=True)
        self._given += 1
        return recorded

    def _record(self, call: Callable[..., Any], leaves: Sequence[Any], structure: Any) -> _Recorded:
        device = next(self.model.parameters()).device
        # What inference mode makes could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            own = [leaf.to(device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(own, structure)
        try:
            replay, output = self._recorder(lambda: call(*args, **kwargs))
        except RuntimeError as error:
            raise ValueError(
                f"a {type(self.model).__name__}'s call can't be recorded as a CUDA graph "
                f'({first_line(error)}): use speed="fast"'
            ) from error
        inputs = [leaf for leaf in own if isinstance(leaf, Tensor)]
        return _Recorded(kwargs, inputs, replay, output)

    def hold(self) -> bool:
        """Whether the model is still as it was recorded."""
        (held, places), (now, now_places) = self._state, _state(self._modules)
        # By identity: what is held can't have been replaced by something else at the same address.
        same = len(held) == len(now) and all(map(operator.is_, held, now)) and places == now_places
        return bool(self._modules) and same

    def hold_until_given(self) -> Callable[[], bool]:
        """What says whether, beside that, no call was given to them since: a callback may run others."""
        given = self._given
        return lambda: self._given == given and self.hold()

    def _start_anew(self) -> None:
        self._calls.clear()
        self._modules = list(self.model.modules())
        self._state = _state(self._modules)


def _state(modules: Sequence[nn.Module]) -> tuple[list[Any], list[int]]:
    """All that modules hold, and where their tensors lie. Who replaces a submodule replaces it in its parent,
    so that modules that are known already tell of it."""
    held: list[Any] = []
    places: list[int] = []
    for module in modules:
        values = module.__dict__.values()
        held.extend(values)
        for value in values:
            if type(value) in _CONTAINERS and value:
                held.extend(value.values() if isinstance(value, dict) else value)
        places.extend(t.data_ptr() for t in module._parameters.values() if t is not None)
        places.extend(t.data_ptr() for t in module._buffers.values() if t is not None)
    return held, places


class _CUDARecorder:
    """Records on a stream of its own, in memory that its recordings share: each one's outputs are copied
    before another is replayed."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._stream = torch.cuda.Stream(next(model.parameters()).device)
        self._sharing: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, work: Work) -> tuple[Callable[[], None], Any]:
        device = next(self._model.parameters()).device
        if device != self._stream.device:
            self._stream, self._sharing = torch.cuda.Stream(device), WeakSet()
        warm_up(work, self._stream)
        # torch's allocator refuses a pool whose graphs are all gone, or in which a recording has failed.
        pool = next((graph.pool() for graph in self._sharing), None)
        try:
            graph, output = record(work, self._stream, pool)
        except BaseException:
            self._sharing.clear()
            raise
        self._sharing.add(graph)
        return graph.replay, output


class CapturedModel(ExpertModel):
    """As `ExpertModel`, with calls that are recorded; with gradients or autocast they are as usual.

    Args:
        recordings: of the model, kept from run to run.
        dtype: as `ExpertModel`.
    """

    def __init__(self, recordings: Recordings, dtype: torch.dtype | None = None) -> None:
        super().__init__(recordings.model, dtype)
        self._recordings = recordings

    def _call(self, kind: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._as_usual():
            return call(*args, **kwargs)
        return self._recordings(kind, call, *args, **kwargs)

    def _as_usual(self) -> bool:
        return torch.is_grad_enabled() or torch.is_autocast_enabled("cuda")

    def record(self, work: Callable[..., None], /, **state: Any) -> Recording | None:
        """As `sampling.stretches.RecordableModel`, whose steps this is for."""
        if self._as_usual():
            return None
        recordings, call = self._recordings, partial(work, super().__call__)
        recorded = recordings.prepared("step", call, (), state)
        return Recording(recorded.kwargs, recorded.replay, recordings.hold_until_given())

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._call("whole", super().__call__, *args, **kwargs)

    def recording(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._call("recording", super().recording, *args, **kwargs)

    def reusing(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._call("reusing", super().reusing, *args, **kwargs)
