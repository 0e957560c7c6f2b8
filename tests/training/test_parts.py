"""What a step is made of: draws, batches, learning rates, losses by noise, the average in place."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from moe_sampler.training import Draws, TrainingSettings
from moe_sampler.training.averages import WeightAverage
from moe_sampler.training.batches import BatchPlan
from moe_sampler.training.noise_bins import NoiseBins
from moe_sampler.training.optimization import learning_rate
from moe_sampler.training.run_state import model_tensors, optimizer_tensors, set_tensors


def test_draws_depend_on_the_place_alone():
    whole = Draws(3, 5, range(12), 12)
    for kind in ("uniform", "stratified", "normal", "seeds"):
        parts = [getattr(Draws(3, 5, range(i, i + 4), 12), kind)("x") for i in (0, 4, 8)]
        everything = getattr(whole, kind)("x")
        assert torch.equal(torch.cat(parts), everything)
        for other in (Draws(4, 5, range(12), 12), Draws(3, 6, range(12), 12)):
            assert not torch.equal(getattr(other, kind)("x"), everything)
        assert not torch.equal(getattr(whole, kind)("y"), everything)
    words = [g.integers(2**32) for g in whole.generators("words")]
    assert words[4:8] == [g.integers(2**32) for g in Draws(3, 5, range(4, 8), 12).generators("words")]
    assert len(set(words)) == 12
    with pytest.raises(ValueError, match="do not lie"):
        Draws(3, 5, range(8, 16), 12)


def test_draws_have_their_distributions():
    draws = Draws(0, 0, range(20_000), 20_000)
    assert stats.kstest(draws.uniform("a").numpy(), "uniform").pvalue > 0.01
    assert stats.kstest(draws.normal("a").numpy(), "norm").pvalue > 0.01
    strata = np.sort(draws.stratified("a").numpy() * 20_000).astype(int)
    assert (strata == np.arange(20_000)).all()
    seeds = draws.seeds("a")
    assert seeds.dtype == torch.int64 and (seeds >= 0).all() and len(set(seeds.tolist())) == 20_000


def test_every_epoch_is_every_sample_once():
    plan = BatchPlan(10, micro_batch=2, accumulation=2, processes=1, seed=1)
    order = [i for batch in plan.micro_batches(0, 0, 10) for i in batch]
    epochs = [order[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_global_batch_is_the_same_however_it_is_shared():
    def of(step: int, micro_batch: int, accumulation: int, processes: int) -> list[int]:
        plan = BatchPlan(29, micro_batch, accumulation, processes, seed=4)
        found = {}
        for process in range(processes):
            batches = list(plan.micro_batches(process, step, step + 1))
            for micro, batch in enumerate(batches):
                assert batch == plan.indices(step, micro, process)
                found |= dict(zip(plan.places(micro, process), batch, strict=True))
        return [found[place] for place in range(plan.total)]

    for step in (0, 1, 5):
        assert of(step, 12, 1, 1) == of(step, 3, 4, 1) == of(step, 3, 2, 2) == of(step, 2, 1, 6)


def test_reading_on_from_any_step():
    plan = BatchPlan(7, 3, 2, 2, seed=0)
    whole = list(plan.micro_batches(1, 0, 6))
    assert list(plan.micro_batches(1, 4, 6)) == whole[8:]


def settings(**changes) -> TrainingSettings:
    values = {"max_train_steps": 100, "learning_rate": 2.0, "lr_warmup_steps": 10}
    return TrainingSettings(output_dir=Path("x"), **{**values, **changes})


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine", "polynomial"])
def test_schedules(name):
    rate = learning_rate(settings(lr_scheduler=name))
    warm = [rate(step) for step in range(10)]
    expected = [2.0] * 10 if name == "constant" else [0.2 * (step + 1) for step in range(10)]
    assert warm == pytest.approx(expected)
    # Halfway from the end of the warm-up, in closed form.
    middle = {"linear": 1.0, "polynomial": 1.0, "cosine": 1.0}.get(name, 2.0)
    assert rate(54) == pytest.approx(middle, rel=1e-6)
    assert rate(32) == pytest.approx(1 + math.cos(math.pi * 23 / 90) if name == "cosine" else rate(32))
    assert rate(99) == rate(100) == rate(5000) == pytest.approx(2.0 if "constant" in name else 0.0, abs=1e-6)


def test_warmup_stable_decay_and_the_floor():
    rate = learning_rate(settings(lr_scheduler="warmup_stable_decay", lr_decay_steps=40, lr_floor=0.1))
    assert rate(9) == rate(40) == rate(58) == 2.0
    assert rate(79) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rate(99) == rate(10_000) == pytest.approx(0.2)
    floored = learning_rate(settings(lr_scheduler="cosine", lr_floor=0.25))
    assert floored(0) == pytest.approx(0.2)  # the warm-up begins below it
    assert min(floored(step) for step in range(20, 300)) == pytest.approx(0.5)


def test_moments_come_back_in_the_layout_of_their_parameters():
    """On which the rounding of AdamW depends."""

    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 2, 3)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 4, 6, 6)).square().sum().backward()
    optimizer.step()
    weights = {name: t.contiguous().clone() for name, t in model_tensors(model).items()}
    moments = {name: t.contiguous().clone() for name, t in optimizer_tensors(model, optimizer).items()}
    other = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 2, 3)).to(memory_format=torch.channels_last)
    fresh = torch.optim.AdamW(other.parameters(), lr=0.1)
    set_tensors(other, fresh, weights, moments, {name: t.shape for name, t in other.state_dict().items()})
    for (name, parameter), found in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, found) and parameter.stride() == found.stride()
        for moment in ("exp_avg", "exp_avg_sq"):
            value = fresh.state[found][moment]
            assert torch.equal(value, optimizer.state[parameter][moment]), name
            assert value.stride() == found.stride()
        assert fresh.state[found]["step"] == 1


def test_losses_by_noise():
    bins = NoiseBins(4)
    bins.add(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([0.0, 0.24, 1.0]))
    bins.add(torch.tensor([5.0]), torch.tensor([0.25]))
    assert bins.take() == {"0-0.25": 2.0, "0.25-0.5": 5.0, "0.75-1": 8.0}
    assert bins.take() == {}


def test_the_average_comes_and_goes_whatever_happens():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[1].requires_grad_(False)
    average = WeightAverage(model, 0.9)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    average.update()
    own = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="sampling failed"), average.in_place():
        torch.testing.assert_close(model[0].weight, 0.1 * before + 0.9 * own)
        raise RuntimeError("sampling failed")
    assert torch.equal(model[0].weight, own)
