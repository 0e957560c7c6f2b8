"""Muon: its steps against torch's own on matrices, convolutions as matrices, and in the trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training_helpers import Late, train, with_hidden_layers

from moe_sampler.training.muon import Muon, orthogonal

RATE, DECAY = 1e-2, 0.1
TALL, WIDE, SQUARE = (160, 24), (24, 160), (64, 64)


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_directions_are_kept_and_lengths_are_about_one(shape):
    u, _, v = torch.linalg.svd(torch.randn(2, *shape, dtype=torch.float64), full_matrices=False)
    scales = torch.tensor([1.0, 1e3], dtype=torch.float64)[:, None]
    values = scales * torch.logspace(-2, 0, min(shape), dtype=torch.float64)
    matrices = (u * values[:, None]) @ v
    found = orthogonal(matrices)
    inner = u.mT @ found @ v.mT
    lengths = inner.diagonal(dim1=1, dim2=2)
    assert lengths.min() > 0.65 and lengths.max() < 1.25
    torch.testing.assert_close(inner, lengths.diag_embed(), atol=1e-12, rtol=0)
    torch.testing.assert_close(orthogonal(matrices.float()).double(), found, atol=2e-3, rtol=0)
    assert orthogonal(torch.zeros(1, *shape)).abs().max() == 0


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


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 32) for _ in range(5))


def test_layers_of_one_shape_step_as_each_alone(monkeypatch):
    weights = []
    for together in (1, 2, 5):
        monkeypatch.setattr("moe_sampler.training.muon._TOGETHER", together * 24 * 32)
        torch.manual_seed(0)
        model = Twins()
        three_steps(model, Muon(model, lr=RATE))
        weights.append([p.detach() for p in model.parameters()])
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], atol=1e-6, rtol=1e-5)


def everything(model, optimizer):
    moments = {(i, name): v for i, s in enumerate(optimizer.state.values()) for name, v in s.items()}
    return {name: value.clone() for name, value in {**model.state_dict(), **moments}.items()}


def test_a_step_can_be_left_out_by_a_tensor(model):
    optimizer = Muon(model, lr=RATE, weight_decay=DECAY)
    optimizer.found_inf = torch.zeros(())
    three_steps(model, optimizer)
    before = everything(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = everything(model, optimizer)
    assert before.keys() == after.keys() and len(before) > len(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_rates_and_scales_that_are_tensors_count_as_numbers_do(model):
    other = Hidden()
    other.load_state_dict(model.state_dict())
    optimizer = Muon(other, lr=torch.tensor(RATE), weight_decay=DECAY)
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.tensor(8.0)
    three_steps(model, Muon(model, lr=RATE, weight_decay=DECAY))
    for step in range(3):
        for name, gradient in gradients(model, step).items():
            other.get_parameter(name).grad = 8 * gradient
        optimizer.step()
    torch.testing.assert_close(other.state_dict(), model.state_dict(), atol=1e-6, rtol=1e-5)


def test_what_has_no_gradient_stays(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Muon(model, lr=RATE)
    model.matrix.weight.grad = torch.randn(48, 32)
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"matrix.weight"} and set(optimizer.state) == {model.matrix.weight}


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path):
    chosen = {"optimizer": "muon", "learning_rate": 1e-2, "on_nonfinite": "skip", "max_skipped": 100}
    task = with_hidden_layers(Late(poison=range(0, 50, 2)))  # in each batch some
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    train(tmp_path / "run", task, **chosen)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
