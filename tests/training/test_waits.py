"""No step waits for the device: seen on one that has no numbers to read."""

from __future__ import annotations

import pytest
import torch
from training_helpers import Points, settings, with_hidden_layers
from waits import waits_are_errors

from moe_sampler._transfers import OnDevice, to_device
from moe_sampler.training import Draws, Trainer
from moe_sampler.training.agreement import StopAgreement
from moe_sampler.training.interrupts import Interrupts


class Silent(Points):
    """Whose loss reads nothing either."""

    def loss(self, model, batch, draws):
        x0, _ = batch
        from moe_sampler.kernels import flow_training_pair
        from moe_sampler.training import Losses

        sigma = draws.stratified("time").float()
        pair = flow_training_pair(x0, sigma, seeds=draws.seeds("noise"))
        per_sample = (model(pair.noisy, sigma) - pair.target).square().mean(1)
        loss = per_sample.mean()
        return Losses(loss, {"velocity": loss.detach()}, per_sample.detach(), sigma)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_reads_nothing(tmp_path, silent_device, accumulation, optimizer):
    changes = {"gradient_accumulation_steps": accumulation, "optimizer": optimizer}
    trainer = Trainer(with_hidden_layers(Silent()), settings(tmp_path / "run", **changes))
    batches = iter(trainer.loader())
    for _ in range(3):
        with silent_device() as waits:
            assert not trainer.make_step(batches, 1e-3, Interrupts())
        assert waits.found == []
    # And the device does notice who reads.
    with pytest.raises((RuntimeError, NotImplementedError)):
        trainer.read_window()


def test_the_silent_device_notices(silent_device):
    numbers = torch.zeros(2, device="meta")
    for read in (lambda: float(numbers.sum()), lambda: numbers.cpu(), lambda: numbers.nonzero()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
    with silent_device() as waits:
        torch.zeros(2).to("meta")
        torch.zeros(2).to("meta", non_blocking=True)
    assert len(waits.found) == 1


def test_draws_are_the_same_numbers_anywhere():
    draws = Draws(1, 2, range(3, 5), 8)
    assert torch.equal(draws.on("cpu").normal("x"), draws.normal("x"))
    elsewhere = draws.on("meta").integers("y", 5)
    assert elsewhere.device.type == "meta" and elsewhere.shape == (2,)
    many = Draws(0, 0, range(1000), 1000).integers("y", 5)
    assert many.dtype == torch.int64 and sorted(set(many.tolist())) == [0, 1, 2, 3, 4]


def test_a_tensor_is_brought_once():
    table = OnDevice(torch.arange(3))
    assert table.on("cpu") is table.on("cpu")
    assert table.on("meta") is table.on("meta") and table.on("meta").device.type == "meta"
    assert to_device(torch.ones(2), "cpu").tolist() == [1, 1]


def test_several_processes_hear_what_was_wanted_a_step_ago():
    class Two:
        num_processes, device = 2, torch.device("cpu")

        def reduce(self, tensor, how):
            assert how == "sum"
            return tensor + self.other

    agreement, accelerator = None, Two()
    agreement = StopAgreement(accelerator)
    answers = []
    for own, accelerator.other in ((False, 0.0), (False, 1.0), (True, 0.0), (False, 0.0), (False, 0.0)):
        answers.append(agreement.ask(own))
    assert answers == [False, False, True, True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_on_cuda_a_step_does_not_synchronise(tmp_path, optimizer):
    task = with_hidden_layers(Silent())
    trainer = Trainer(task, settings(tmp_path / "run", optimizer=optimizer))
    batches = iter(trainer.loader())
    trainer.make_step(batches, 1e-3, Interrupts())  # compiles kernels, brings things to the device
    with waits_are_errors():
        for _ in range(3):
            trainer.make_step(batches, 1e-3, Interrupts())
    trainer.read_window()
