"""A step that is recorded once and replayed: its places, what it is fed, and that it is the same step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import Points, digest, settings, train, with_hidden_layers
from waits import waits_are_errors

from moe_sampler.training import Draws, Losses, SettingsError, Trainer
from moe_sampler.training.captured import WARM_UP, FedDraws, Inputs


def rising(step: int, steps: float) -> float:
    return min(1.0, step / steps)


class Alike(Points):
    """Whose loss decides nothing on the host; a poisoned sample's is NaN."""

    steps_alike = True

    def loss(self, model, batch, draws):
        from moe_sampler.kernels import flow_training_pair

        x0, index = batch
        sigma = draws.stratified("time").float()
        pair = flow_training_pair(x0, sigma, seeds=draws.seeds("noise"))
        per_sample = (model(pair.noisy, sigma) - pair.target).square().mean(1) * draws.scheduled(rising, 3)
        per_sample = torch.where(sum((index == i for i in self.poison), index < 0), torch.nan, per_sample)
        loss = per_sample.mean()
        return Losses(loss, {"velocity": loss.detach()}, per_sample.detach(), sigma)


def test_values_reach_their_places_by_one_copy():
    generator = torch.Generator().manual_seed(0)

    def values(seed: int) -> list[torch.Tensor]:
        generator.manual_seed(seed)
        numbers = torch.randn(3, 5, generator=generator)
        return [torch.tensor(0.25 * seed), numbers, numbers[:, 0] > 0, numbers[0].double(), numbers[:0]]

    inputs = Inputs(values(1), torch.device("cpu"))
    places = [tensor.data_ptr() for tensor in inputs.tensors]
    for seed in (1, 2, 3):
        inputs.fill(values(seed))
        for own, wanted in zip(inputs.tensors, values(seed), strict=True):
            assert own.dtype == wanted.dtype and torch.equal(own, wanted)
    assert places == [tensor.data_ptr() for tensor in inputs.tensors]
    with pytest.raises(ValueError, match="a recorded step takes"):
        inputs.fill([value[:1] if value.ndim else value for value in values(1)])


def test_draws_are_fed_what_the_next_step_draws():
    """Everything a loss asks for, asked for again of another step, is that step's own."""

    def ask(draws: Draws) -> list[torch.Tensor]:
        found = [draws.uniform("a"), draws.stratified("a"), draws.normal("b"), draws.integers("c", 7)]
        return [*found, draws.seeds("noise"), draws.scheduled(rising, 8), draws.uniform("a")]

    at = [Draws(5, step, range(2, 6), 9) for step in range(3)]
    learning = FedDraws(at[0])
    for own, wanted in zip(ask(learning), ask(at[0]), strict=True):
        assert torch.equal(own, wanted)
    assert len(learning.asked) == 6, "the same twice is one"
    for draws in at[1:]:
        fed = FedDraws(at[0], {key: draws.values(*key) for key in learning.asked})
        for own, wanted in zip(ask(fed), ask(draws), strict=True):
            assert torch.equal(own, wanted)
    assert [float(draws.scheduled(rising, 2)) for draws in at] == [0.0, 0.5, 1.0]
    with pytest.raises(SettingsError, match="drew other at one step and not at another"):
        fed.uniform("other")
    with pytest.raises(SettingsError, match="on the host"):
        fed.on("meta")
    with pytest.raises(SettingsError, match="no tensors"):
        fed.generators("words")
    assert fed.on("cpu") is fed


def test_what_cant_be_recorded_is_refused_before_any_work(tmp_path):
    with pytest.raises(SettingsError, match="cuda_graph needs a CUDA device; this run is on cpu"):
        Trainer(Alike(), settings(tmp_path / "run", cuda_graph=True))
    with pytest.raises(ValueError, match="makes CUDA graphs of its own"):
        settings(tmp_path, cuda_graph=True, torch_compile=True, torch_compile_mode="reduce-overhead")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_8bit_adam": True}, "8-bit"),
        ({"optimizer": "adafactor"}, "Adafactor can't be told"),
        ({"gradient_accumulation_steps": 2}, "steps of one batch"),
        ({"gradient_checkpointing": True}, "checkpointing"),
        ({"processes": 2}, "one process"),
        ({"scaler": object()}, "fp16"),
        ({"alike": False}, "decided on the host"),
    ],
)
def test_each_refusal_says_why(tmp_path, change, message):
    from types import SimpleNamespace

    from moe_sampler.training.captured import check_capture

    task = Alike()
    task.steps_alike = change.pop("alike", True)
    accelerator = SimpleNamespace(
        device=torch.device("cuda"),
        num_processes=change.pop("processes", 1),
        scaler=change.pop("scaler", None),
    )
    check_capture(
        Alike(),
        settings(tmp_path),
        SimpleNamespace(**{**vars(accelerator), "num_processes": 1, "scaler": None}),
    )
    with pytest.raises(SettingsError, match=message):
        check_capture(task, settings(tmp_path, **change), accelerator)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_on_cuda_a_recorded_run_is_the_same_run(tmp_path, optimizer):
    """Weights, average and moments, with steps that are left out among those replayed, to rounding."""
    changes = {
        "optimizer": optimizer,
        "on_nonfinite": "skip",
        "max_train_steps": 16,
        "checkpointing_steps": 16,
    }
    made = [
        train(
            tmp_path / name,
            with_hidden_layers(Alike(dropout=0.0, poison=[20])),
            cuda_graph=recorded,
            **changes,
        )
        for name, recorded in (("plain", False), ("recorded", True))
    ]
    assert made[0]["skipped"] == made[1]["skipped"] > 0
    files = [
        load_file(tmp_path / name / "checkpoint-16" / f"{part}.safetensors")
        for part in ("model", "ema", "optimizer")
        for name in ("plain", "recorded")
    ]
    for plain, recorded in zip(files[::2], files[1::2], strict=True):
        assert plain and plain.keys() == recorded.keys()
        for name in plain:
            torch.testing.assert_close(recorded[name], plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stop", [2, 9])
def test_on_cuda_a_recorded_run_resumes_to_the_bit(tmp_path, stop, optimizer):
    """Stopped before it was recorded or after."""
    changes = {"cuda_graph": True, "max_train_steps": 14, "checkpointing_steps": 1, "optimizer": optimizer}

    def task():
        return with_hidden_layers(Alike())

    train(tmp_path / "whole", task(), **changes)

    class Stopped(Exception):
        pass

    trainer = Trainer(task(), settings(tmp_path / "halves", **changes), quiet=True)
    step, trainer_step = [0], trainer.make_step

    def make_step(*arguments):
        if step[0] == stop:
            raise Stopped
        step[0] += 1
        return trainer_step(*arguments)

    trainer.make_step = make_step
    with pytest.raises(Stopped):
        trainer.train()
    train(tmp_path / "halves", task(), **changes)
    assert digest(tmp_path / "halves" / "checkpoint-14") == digest(tmp_path / "whole" / "checkpoint-14")


@pytest.mark.gpu
def test_on_cuda_a_replayed_step_neither_waits_nor_launches_more_than_it_must(tmp_path):
    from moe_sampler.training.interrupts import Interrupts

    trainer = Trainer(Alike(), settings(tmp_path / "run", cuda_graph=True, max_train_steps=20))
    batches = iter(trainer.loader())
    for _ in range(WARM_UP + 1):
        trainer.make_step(batches, 1e-3, Interrupts())
    with waits_are_errors():
        for _ in range(3):
            trainer.make_step(batches, 1e-3, Interrupts())
    trainer.read_window()


class Waits(Alike):
    def loss(self, model, batch, draws):
        assert float(batch[0].sum()) < 1e9
        return super().loss(model, batch, draws)


@pytest.mark.gpu
def test_on_cuda_a_step_that_waits_is_refused_by_name(tmp_path):
    """In a process of its own: torch's allocator takes a recording that failed for one that goes on."""
    code = (
        f"from test_captured import Waits, train; train({str(tmp_path / 'run')!r}, Waits(), cuda_graph=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode and "SettingsError: cuda_graph: the step can't be recorded" in done.stderr
