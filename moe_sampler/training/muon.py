"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), of convolutions too; AdamW for the rest."""

from __future__ import annotations

import math
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


class Muon(torch.optim.AdamW):
    """Steps of hidden layers' weights along all directions alike: the momentum's singular values become about
    one. What a layer takes from all its inputs, a kernel's places included, is one matrix.

    The steps are as long as AdamW's usually are (Liu et al. 2025, arXiv:2502.16982, eq. 4), so a learning
    rate and weight decay that are right for it count as they are. Biases, norms, embeddings and layers with
    at most 16 channels on one side are AdamW's. `torch.optim.Muon` takes nothing but matrices, and iterates
    on them in bfloat16.

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
        self._step_supports_amp_scaling = False  # our steps can't be told on the device to be left out

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all parameters that have a gradient."""
        groups = self.param_groups
        for group in groups:
            if group["orthogonal"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._orthogonal_step(parameter, group["lr"], group["weight_decay"])
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _orthogonal_step(self, parameter: Tensor, rate: float, decay: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)  # AdamW's own loader wants one
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["step"] += 1
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - _MOMENTUM)
        ahead = gradient.lerp(momentum, _MOMENTUM)  # Nesterov's
        matrix = ahead.flatten(1)
        length = 0.2 * math.sqrt(max(matrix.shape))
        parameter.mul_(1 - rate * decay)
        parameter.add_(orthogonal(matrix).reshape(ahead.shape), alpha=-rate * length)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """[M, N] with the same singular vectors, and singular values of about one (0.7 to 1.2), if they weren't
    below a thousandth of the matrix's norm.

    A Newton-Schulz iteration x <- A x + (B G + C G^2) x with G = x x^T. All iterates are polynomials of the
    first G times the first x, so the iteration needs only G, of the shorter side, and one product at the end.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    gram = x @ x.T
    product = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for step in range(steps):
        factor = _B * gram + _C * (gram @ gram)
        factor.diagonal().add_(_A)
        product = factor @ product
        if step + 1 < steps:
            gram = factor @ gram @ factor
    x = product @ x
    return x.T if tall else x
