"""Registration with torch, choice of backend, and the checks every operator makes before any work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from moe_sampler.kernels import _jit

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
WITH_FLOAT64 = (*FLOATS, torch.float64)  # twins of differentiable operators, so that gradcheck can run

_library = torch.library.Library("moe_sampler", "FRAGMENT")


class Operator:
    """One opaque torch operator with two bodies of the same signature.

    `launch` runs the Triton kernel and serves CUDA tensors; `twin` is plain torch and serves all others.
    `autograd` is what `torch.library.register_autograd` takes: (save(ctx, inputs, output), backward(ctx,
    *gradients)), where `ctx.backend` names the body that made the output, for the backward operator's `on`.
    """

    def __init__(
        self,
        schema: str,
        *,
        twin: Callable,
        launch: Callable,
        fake: Callable,
        autograd: tuple[Callable, Callable] | None = None,
    ) -> None:
        self.twin, self.launch, self._autograd = twin, launch, autograd
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        name = schema.partition("(")[0]
        _library.impl(name, twin, "CompositeExplicitAutograd")
        _library.impl(name, launch, "CUDA")
        torch.library.register_fake(f"moe_sampler::{name}", fake, lib=_library)
        if autograd is not None:
            save, backward = autograd
            torch.library.register_autograd(
                f"moe_sampler::{name}", backward, setup_context=_for_backend(save, None), lib=_library
            )
        packet, _, overload = name.partition(".")
        self.default = getattr(getattr(torch.ops.moe_sampler, packet), overload or "default")

    def on(self, backend: str | None, device: torch.device) -> Callable:
        """The body that `backend` names; None picks by device, through torch's dispatcher."""
        if backend is None or backend == ("triton" if device.type == "cuda" else "torch"):
            return self.default
        if backend == "torch":
            return self._body(self.twin, backend)
        if backend == "triton":
            _jit.require_triton(device)
            return self._body(self.launch, backend)
        raise ValueError(f"backend must be None, 'triton' or 'torch', got {backend!r}")

    def _body(self, body: Callable, backend: str) -> Callable:
        if self._autograd is None:
            return body
        save, backward = self._autograd
        methods = {
            "forward": staticmethod(body),
            "setup_context": staticmethod(_for_backend(save, backend)),
            "backward": staticmethod(backward),
        }
        return type("Body", (torch.autograd.Function,), methods).apply


def _for_backend(save: Callable, backend: str | None) -> Callable:
    def save_with_backend(ctx, inputs, output) -> None:
        ctx.backend = backend
        save(ctx, inputs, output)

    return save_with_backend


def unobserved(x: Tensor) -> bool:
    """Whether a call on `x` is plain eager work on a CPU: nothing compiles, fakes or counts operators.

    The dispatcher then does nothing but to call the twin, for a tenth of a small step's time.
    """
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
    )


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def differentiated_otherwise(backend: str | None, *tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation or a transform of `torch.func` is at work on the tensors.

    Registered operators know backward alone, once: without this, forward mode would give zeros. The formula
    in plain torch then takes their place, unless Triton was asked for by name, which is a ValueError.
    """
    if torch.compiler.is_compiling():
        return False
    transformed = torch._C._are_functorch_transforms_active()
    if not transformed and not any(t is not None and _has_tangent(t) for t in tensors):
        return False
    if backend == "triton":
        raise ValueError(
            "backend='triton' serves neither forward-mode differentiation nor torch.func: leave backend at "
            "None or 'torch', which compute the formula in plain torch there"
        )
    return True


def undifferentiated(*tensors: Tensor | None) -> list[Any]:
    """The tensors' values alone, for the checks that an operator makes on what has no derivative."""
    return [None if t is None else forward_ad.unpack_dual(t).primal.detach() for t in tensors]


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a twin that takes float64 computes in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_tensor(
    name: str,
    tensor: Tensor,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    *shapes: tuple[int, ...],
    strided: bool = False,
) -> None:
    """Raise a TypeError or ValueError unless `tensor` is what a kernel can read.

    `strided`: only the last dimension must be contiguous, the others may have any stride.
    """
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")
    if shapes and tensor.shape not in shapes:
        wanted = " or ".join(str(list(s)) for s in shapes)
        raise ValueError(f"{name} must have shape {wanted}, got {list(tensor.shape)}")
    if strided and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} must be contiguous in its last dimension; call .contiguous() on it")
    if not strided and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; call .contiguous() on it")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, and this operation has no derivative: use torch.no_grad()")
    if forward_ad._current_level >= 0 and _has_tangent(tensor):  # a call for every tensor of a step is long
        raise ValueError(f"{name} has a tangent, and this operation has no forward-mode derivative")


def all_apart(tensors: Iterable[Tensor | None]) -> bool:
    """Whether no two share memory, which is quicker to see than whether those do that mustn't. All are
    contiguous."""
    spans = sorted([(start := t.data_ptr(), start + t.nbytes) for t in tensors if t is not None])
    end = 0
    for start, stop in spans:
        if start < end:
            return False
        end = stop
    return True


def check_no_overlap(
    written: Iterable[tuple[str, Tensor | None]], read: Iterable[tuple[str, Tensor | None]]
) -> None:
    """Raise a ValueError if a written tensor shares memory with any other one. All are contiguous."""
    seen = [(name, start := t.data_ptr(), start + t.nbytes) for name, t in read if t is not None]
    for name, t in written:
        if t is None:
            continue
        start = t.data_ptr()
        stop = start + t.nbytes
        for other, other_start, other_stop in seen:
            if start < other_stop and other_start < stop:
                raise ValueError(f"{name} shares memory with {other}; give it storage of its own")
        seen.append((name, start, stop))
