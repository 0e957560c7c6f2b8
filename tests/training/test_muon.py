"""Muon: its steps against torch's own on matrices, convolutions as matrices, and in the trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training_helpers import Late, PowerCut, cut, digest, train

from moe_sampler.training.muon import Muon, orthogonal

RATE, DECAY = 1e-2, 0.1
TALL, WIDE, SQUARE = (160, 24), (24, 160), (64, 64)


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_directions_are_kept_and_lengths_are_about_one(shape):
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(-2, 0, min(shape), dtype=torch.float64)
    found = orthogonal((u * values) @ v)
    inner = u.T @ found @ v.T
    assert inner.diagonal().min() > 0.65 and inner.diagonal().max() < 1.25
    torch.testing.assert_close(inner - inner.diagonal().diag(), torch.zeros_like(inner), atol=1e-12, rtol=0)
    single = orthogonal(((u * values) @ v).float())
    torch.testing.assert_close(single.double(), found, atol=2e-3, rtol=0)
    assert orthogonal(torch.zeros(shape)).abs().max() == 0


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 32)
        self.first = nn.Conv2d(4, 32, 3)
        self.hidden = nn.Conv2d(32, 24, 3)
        self.matrix = nn.Linear(32, 48)
        self.norm = nn.GroupNorm(4, 32)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)


ORTHOGONAL = {"hidden.weight", "matrix.weight"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Hidden()


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(p.shape, generator=generator)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def three_steps(model, optimizer):
    for step in range(3):
        for name, gradient in gradients(model, step).items():
            model.get_parameter(name).grad = gradient
        optimizer.step()


def test_hidden_layers_step_as_torchs_muon_and_the_rest_as_adamw(model):
    adamw = {"lr": RATE, "betas": (0.9, 0.99), "weight_decay": DECAY, "eps": 1e-8}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    three_steps(model, Muon(model, **adamw))
    for name, found in model.named_parameters():
        own = nn.Parameter(before[name].flatten(1) if name in ORTHOGONAL else before[name].clone())
        if not found.requires_grad:
            assert torch.equal(found, before[name])
            continue
        kind = {"lr": RATE, "weight_decay": DECAY}
        expected = (
            torch.optim.Muon([own], **kind, momentum=0.95, adjust_lr_fn="match_rms_adamw")
            if name in ORTHOGONAL
            else torch.optim.AdamW([own], **adamw)
        )
        for step in range(3):
            own.grad = gradients(model, step)[name].reshape(own.shape)
            expected.step()
        # torch's iterates in bfloat16.
        tolerance = {"atol": 0.05 * RATE, "rtol": 0} if name in ORTHOGONAL else {"atol": 1e-7, "rtol": 1e-6}
        torch.testing.assert_close(found.reshape(own.shape), own, **tolerance)


def test_a_step_is_as_long_as_adamws_and_of_any_layout(model):
    optimizer = Muon(model, lr=1.0, weight_decay=0.0)
    other = Hidden()
    other.load_state_dict(model.state_dict())
    other.to(memory_format=torch.channels_last)
    before = model.hidden.weight.detach().clone()
    three_steps(model, optimizer)
    length = (model.hidden.weight - before).square().mean().sqrt() / 3
    assert 0.1 < length < 0.4
    three_steps(other, Muon(other, lr=1.0, weight_decay=0.0))
    torch.testing.assert_close(other.hidden.weight, model.hidden.weight, atol=1e-5, rtol=1e-5)


def test_what_has_no_gradient_stays(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Muon(model, lr=RATE)
    model.matrix.weight.grad = torch.randn(48, 32)
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"matrix.weight"} and set(optimizer.state) == {model.matrix.weight}


class Deep(Late):
    """With a hidden layer that is wide enough, and one that never has a gradient."""

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        with torch.random.fork_rng():
            torch.manual_seed(4)
            layers = nn.Linear(3, 24), nn.SiLU(), nn.Linear(24, 32), nn.SiLU(), nn.Linear(32, 2)
            self.model.layers = nn.Sequential(*layers)
            self.model.idle = nn.Linear(24, 24)


def test_it_learns_and_resumes_to_the_same_bits(tmp_path):
    chosen = {"optimizer": "muon", "learning_rate": 1e-2}
    train(tmp_path / "whole", Deep(), **chosen)
    with pytest.raises(PowerCut):
        train(tmp_path / "run", Deep(hook=cut(11)), **chosen)
    train(tmp_path / "run", Deep(), **chosen)
    assert digest(tmp_path / "run" / "checkpoint-12") == digest(tmp_path / "whole" / "checkpoint-12")
    train(tmp_path / "adamw", Deep(), learning_rate=1e-2)
    assert digest(tmp_path / "adamw" / "checkpoint-12") != digest(tmp_path / "whole" / "checkpoint-12")


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path):
    chosen = {"optimizer": "muon", "learning_rate": 1e-2, "on_nonfinite": "skip", "max_skipped": 100}
    task = Deep(poison=range(0, 50, 2))  # in each batch some
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    train(tmp_path / "run", task, **chosen)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
