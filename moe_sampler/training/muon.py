"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), of convolutions too; AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Muon"]

_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Of the quintic that takes singular values towards 1: p(x) = A x + B x^3 + C x^5."""
_MOMENTUM = 0.95
_FEW = 16
"""What reads or writes no more channels than this is an end of the network, whose channels mean something
each, as a latent's do."""
_TOGETHER = 2**22
"""Elements of matrices that are iterated on together: small ones keep no device busy by themselves, and large
ones would take memory for nothing."""


class Muon(torch.optim.AdamW):
    """Steps of hidden layers' weights along all directions alike: the momentum's singular values become about
    one. What a layer takes from all its inputs, a kernel's places included, is one matrix.

    The steps are as long as AdamW's usually are (Liu et al. 2025, arXiv:2502.16982, eq. 4), so a learning
    rate and weight decay that are right for it count as they are. Biases, norms, embeddings and layers with
    at most 16 channels on one side are AdamW's. `torch.optim.Muon` takes nothing but matrices, and iterates
    on them in bfloat16.

    As AdamW's, a step can be told on the device to be left out (`found_inf`), takes scaled gradients
    (`grad_scale`) and a learning rate that is a tensor, and can be recorded as a CUDA graph.

    Args:
        model: float32; whatever of it requires a gradient is trained.
        adamw: learning rate, betas, eps and weight decay, as torch's AdamW takes them.
    """

    def __init__(self, model: nn.Module, **adamw: Any) -> None:
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        trained = [p for p in model.parameters() if p.requires_grad]
        hidden = [p for p in trained if p.ndim > 1 and min(p.shape[:2]) > _FEW and id(p) not in embeddings]
        ids = {id(p) for p in hidden}
        groups = [
            {"params": hidden, "orthogonal": True},
            {"params": [p for p in trained if id(p) not in ids], "orthogonal": False},
        ]
        super().__init__([group for group in groups if group["params"]], fused=True, **adamw)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all parameters that have a gradient."""
        groups = self.param_groups
        for group in groups:
            if group["orthogonal"]:
                for alike in _alike(group["params"]):
                    self._orthogonal_step(alike, group["lr"], group["weight_decay"])
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _orthogonal_step(self, parameters: list[Tensor], rate: float | Tensor, decay: float) -> None:
        """Of parameters of one shape."""
        states = [self._state_of(parameter) for parameter in parameters]
        momenta = [state["momentum_buffer"] for state in states]
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            gradients = [gradient / scale for gradient in gradients]
        left_out = getattr(self, "found_inf", None)
        made = torch.ones((), device=parameters[0].device) if left_out is None else 1 - left_out
        # A step that isn't made draws the momentum towards itself, and moves the weights by nothing.
        gradients = [torch.where(made > 0, g, m) for g, m in zip(gradients, momenta, strict=True)]
        torch._foreach_add_([state["step"] for state in states], [made] * len(states))
        torch._foreach_lerp_(momenta, gradients, 1 - _MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, _MOMENTUM)  # Nesterov's
        directions = orthogonal(torch.stack([gradient.flatten(1) for gradient in ahead]))
        own_rate = made * rate
        torch._foreach_mul_(parameters, [1 - own_rate * decay] * len(parameters))
        changes = directions * (-0.2 * math.sqrt(max(directions.shape[1:])) * own_rate)
        torch._foreach_add_(parameters, list(changes.unflatten(2, parameters[0].shape[1:])))

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)  # AdamW's own loader wants one
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state


def _alike(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Those with a gradient, together with others of their shape, device and dtype."""
    kinds: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            kind = parameter.shape, parameter.device, parameter.dtype
            kinds.setdefault(kind, []).append(parameter)
    for found in kinds.values():
        many = max(1, _TOGETHER // found[0].numel())
        yield from (found[start : start + many] for start in range(0, len(found), many))


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """[B, M, N] with the same singular vectors, and singular values of about one (0.7 to 1.2), if they
    weren't below a thousandth of their matrix's norm.

    A Newton-Schulz iteration x <- A x + (B G + C G^2) x with G = x x^T. All iterates are polynomials of the
    first G times the first x, so the iteration needs only G, of the shorter side, and one product at the end.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    gram = x @ x.mT
    product = None
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        factor.diagonal(dim1=1, dim2=2).add_(_A)
        product = factor if product is None else factor @ product
        if step + 1 < steps:
            gram = factor @ gram @ factor
    x = product @ x
    return x.mT if tall else x
