"""What a user of the trainer may choose: another optimizer, epochs, uploads on the way."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import Late, Points, PowerCut, cut, digest, settings, train, with_hidden_layers

from moe_sampler.training import SettingsError, Trainer, TrainingSettings


def test_adafactor_by_hand(tmp_path):
    """A step of Shazeer and Stern's (2018) algorithm 4, with the constants that torch documents."""
    task = Points(dropout=0.0)
    rate, decay = 1e-2, 0.01
    trainer = Trainer(
        task,
        settings(
            tmp_path / "run",
            optimizer="adafactor",
            learning_rate=rate,
            lr_scheduler="constant",
            lr_warmup_steps=0,
            adam_weight_decay=decay,
            max_grad_norm=0.0,
            max_train_steps=1,
        ),
        quiet=True,
    )
    weight = task.model.layers[0].weight
    before, found = weight.detach().clone().double(), []
    weight.register_post_accumulate_grad_hook(lambda p: found.append(p.grad.clone().double()))
    trainer.train()
    (gradient,) = found
    square = gradient.square()
    rows, columns = square.mean(1, keepdim=True), square.mean(0, keepdim=True)
    variance = rows * columns / rows.mean()
    update = gradient / variance.sqrt()
    update = update / max(1.0, update.square().mean().sqrt().item())
    step = min(rate, 1.0) * max(1e-3, before.square().mean().sqrt().item())
    expected = before * (1 - rate * decay) - step * update
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_another_optimizer_learns_and_resumes_to_the_same_bits(tmp_path, optimizer):
    def task(**arguments):
        return with_hidden_layers(Late(**arguments))

    chosen = {"optimizer": optimizer, "learning_rate": 1e-2}
    train(tmp_path / "whole", task(), **chosen)
    with pytest.raises(PowerCut):
        train(tmp_path / "run", task(hook=cut(11)), **chosen)
    train(tmp_path / "run", task(), **chosen)
    assert digest(tmp_path / "run" / "checkpoint-12") == digest(tmp_path / "whole" / "checkpoint-12")
    train(tmp_path / "adamw", task(), learning_rate=1e-2)
    assert digest(tmp_path / "adamw" / "checkpoint-12") != digest(tmp_path / "whole" / "checkpoint-12")


def test_optimizers_that_contradict_each_other():
    with pytest.raises(ValueError, match="use_8bit_adam is for optimizer adamw, which is adafactor"):
        TrainingSettings("run", optimizer="adafactor", use_8bit_adam=True)


@pytest.mark.parametrize("epochs, steps", [(0.5, 7), (1, 13)])
def test_epochs(tmp_path, epochs, steps):
    """50 samples, four a step."""
    result = train(
        tmp_path / "run",
        num_train_epochs=epochs,
        max_train_steps=3,
        lr_warmup_steps=5,
        train_batch_size=4,
        checkpointing_steps=100,
    )
    assert result["step"] == steps


def test_epochs_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="num_train_epochs must be positive"):
        settings(tmp_path, num_train_epochs=0.0)
    wanted = settings(tmp_path / "run", num_train_epochs=0.1, lr_warmup_steps=100)
    with pytest.raises(ValueError, match=r"lr_warmup_steps \(100\) and lr_decay_steps"):
        Trainer(Points(), wanted, quiet=True)
    with pytest.raises(SettingsError, match="as many as fit"):
        decaying = {"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 2, "num_train_epochs": 1.0}
        Trainer(Points(), settings(tmp_path / "other", **decaying), quiet=True, deadline=1e12)


class Hub:
    """Takes uploads, each when it is let through, and reads what they hold then."""

    def __init__(self, monkeypatch) -> None:
        from huggingface_hub import HfApi, RepoUrl

        self.uploads, self.gate, self.pool = [], threading.Event(), ThreadPoolExecutor(1)
        monkeypatch.setattr(
            HfApi, "create_repo", lambda *_, **__: RepoUrl("https://huggingface.co/me/points")
        )
        monkeypatch.setattr(HfApi, "upload_folder", lambda _, **given: self.upload(**given))

    def upload(self, folder_path, commit_message="", run_as_future=False, **given):
        def work():
            self.gate.wait(60)
            if commit_message == "step 4":
                raise OSError("the hub is asleep")
            self.uploads.append((commit_message, load_file(folder_path / "model.safetensors")))
            assert (folder_path / "README.md").is_file()

        if not run_as_future:
            return work()
        return self.pool.submit(work)


def test_uploads_on_the_way_are_not_waited_for(tmp_path, monkeypatch, caplog):
    hub = Hub(monkeypatch)
    seen = []

    class Watching(Points):
        def loss(self, model, batch, draws):
            seen.append(len(hub.uploads))
            if draws.step == 11:  # the upload of step 8 may have been left out, since step 4's is on its way
                hub.gate.set()
            return super().loss(model, batch, draws)

    folder = tmp_path / "run"
    given = {"push_to_hub": True, "hub_strategy": "every_save", "max_train_steps": 12}
    train(folder, Watching(), checkpointing_steps=4, **given)
    assert seen == [0] * len(seen)
    assert [message for message, _ in hub.uploads] == [""]  # step 4's failed, step 8's was left out
    assert "not uploaded to me/points: the hub is asleep" in caplog.text
    assert not (folder / ".upload.partial").exists()


def test_uploads_on_the_way_are_the_averaged_model(tmp_path, monkeypatch):
    hub = Hub(monkeypatch)
    hub.gate.set()
    folder = tmp_path / "run"
    given = {"push_to_hub": True, "hub_strategy": "every_save", "max_train_steps": 12}
    train(folder, checkpointing_steps=6, **given)
    (message, tensors), (last, final) = hub.uploads
    assert (message, last) == ("step 6", "")
    average = load_file(folder / "checkpoint-6" / "ema.safetensors")
    assert all(torch.equal(tensors[name], average[name]) for name in average)
    assert all(
        torch.equal(final[name], kept) for name, kept in load_file(folder / "model.safetensors").items()
    )
