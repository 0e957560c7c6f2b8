"""The trainer on a task of milliseconds: what it learns, resumes, refuses and leaves behind."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from processes import run
from safetensors.torch import load_file
from training_helpers import Late, Points, PowerCut, alone, cut, digest, settings, train

from moe_sampler._files import MARK
from moe_sampler.training import (
    CheckpointError,
    Draws,
    Interrupted,
    NonFiniteError,
    SettingsError,
    Trainer,
)
from moe_sampler.training import checkpoints as disk
from moe_sampler.training.batches import BatchPlan
from moe_sampler.training.distribution import new_accelerator


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    return folder


def test_it_learns_and_leaves_a_whole_folder(tmp_path):
    result = train(tmp_path / "run", max_train_steps=300, lr_scheduler="constant", logging_steps=50)
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    trained = [record for record in records if "loss" in record]
    losses = [record["loss"] for record in trained]
    assert losses[-1] < 0.96 * losses[0] < 0.96 * 1.6  # predicting zero has a loss of 1.5
    assert (result["step"], result["skipped"]) == (300, 0)
    assert set(trained[0]["by_noise"]) == {"0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1"}
    mean = sum(trained[0]["by_noise"].values()) / 5
    assert mean == pytest.approx(trained[0]["velocity"], rel=0.2)
    folder = tmp_path / "run"
    state = load_file(folder / "model.safetensors")
    assert state["gain"].shape == () and json.loads((folder / "config.json").read_text())["width"] == 16
    card = (folder / "README.md").read_text()
    for said in ("points on a circle", "learning_rate | 0.01", "validation loss", "steps | 300"):
        assert said in card
    assert "\n## Results\n" in card
    assert card.count("| | |\n|---|---|\n| ") == card.count("---|---") == 3  # tables as Markdown has them
    sheet = Image.open(folder / "samples" / "step-000300.png")
    assert sheet.size == (16, 16)  # three pictures of 8 pixels, two beside each other
    assert [path.name for path in disk.checkpoint_folders(folder)] == ["checkpoint-296", "checkpoint-300"]


def test_the_average_is_what_is_saved_and_validated(tmp_path):
    task = Points(dropout=0)
    train(tmp_path / "run", task, max_train_steps=9, checkpointing_steps=3, checkpoints_total_limit=9)
    folder = tmp_path / "run"
    # By hand: n / (9 + n) of the old average at update n, of the weights after each step.
    steps = [load_file(folder / f"checkpoint-{n}" / "model.safetensors") for n in (3, 6, 9)]
    averages = [load_file(folder / f"checkpoint-{n}" / "ema.safetensors") for n in (3, 6, 9)]
    assert not torch.equal(steps[2]["gain"], averages[2]["gain"])
    final = load_file(folder / "model.safetensors")
    for name, tensor in averages[2].items():
        assert torch.equal(final[name], tensor) and tensor.dtype == torch.float32
        assert torch.equal(task.model.state_dict()[name], steps[2][name])
    best = json.loads((folder / "best" / "validation.json").read_text())
    kept = load_file(folder / "best" / "model.safetensors")
    with torch.no_grad():
        task.model.load_state_dict(kept)
        assert task.validate(task.model.eval())["loss"] == pytest.approx(best["loss"], rel=1e-6)


def test_the_average_of_every_step_by_hand(tmp_path):
    train(
        tmp_path / "run",
        Points(dropout=0),
        max_train_steps=5,
        checkpointing_steps=1,
        checkpoints_total_limit=9,
    )
    expected = Points(dropout=0).model.layers[0].weight.detach().double()
    for n in range(1, 6):
        decay = min(0.9995, n / (9 + n))
        weights = load_file(tmp_path / "run" / f"checkpoint-{n}" / "model.safetensors")["layers.0.weight"]
        expected = decay * expected + (1 - decay) * weights.double()
        average = load_file(tmp_path / "run" / f"checkpoint-{n}" / "ema.safetensors")["layers.0.weight"]
        torch.testing.assert_close(average.double(), expected, rtol=0, atol=1e-7)


def logged(folder: Path) -> dict[int, dict]:
    """The log's lines of training, by step."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in records if "loss" in record}


def test_a_line_of_the_log_is_the_mean_since_the_last_one(tmp_path):
    train(tmp_path / "each", logging_steps=1)
    train(tmp_path / "some", logging_steps=5)
    each, some = logged(tmp_path / "each"), logged(tmp_path / "some")
    assert list(each) == list(range(1, 13)) and list(some) == [5, 10, 12]
    for last, steps in ((5, range(1, 6)), (10, range(6, 11)), (12, (11, 12))):
        for name in ("loss", "velocity", "grad_norm"):
            mean = sum(each[step][name] for step in steps) / len(steps)
            assert some[last][name] == pytest.approx(mean, rel=1e-6)
        assert some[last]["learning_rate"] == each[last]["learning_rate"]
        # A batch's times are stratified, so each of the five parts has some samples of every few steps.
        assert some[last]["by_noise"].keys() == {"0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1"}


class Told(Points):
    """Whose validations come to these losses, one after the other."""

    def __init__(self, *losses: float, **settings) -> None:
        super().__init__(**settings)
        self.losses = iter(losses)

    def validate(self, model) -> dict[str, float]:
        return {"loss": next(self.losses)}


def test_the_best_is_the_lowest_and_of_equals_the_first(tmp_path):
    folder = tmp_path / "run"
    best = lambda: json.loads((folder / "best" / "validation.json").read_text())  # noqa: E731
    result = train(folder, Told(3.0, 1.0, 2.0, 1.0))
    assert result["best"] == best() == {"step": 6, "loss": 1.0} and result["validation"] == {"loss": 1.0}
    kept = (folder / "best" / "model.safetensors").read_bytes()
    # A run that goes on knows what was best before.
    result = train(folder, Told(1.5, 1.0), max_train_steps=18)
    assert result["best"] == best() == {"step": 6, "loss": 1.0}
    assert (folder / "best" / "model.safetensors").read_bytes() == kept
    assert train(folder, Told(0.5), max_train_steps=21)["best"] == best() == {"step": 21, "loss": 0.5}
    assert (folder / "best" / "model.safetensors").read_bytes() != kept


ADAM = {"adam_beta1": 0.7, "adam_beta2": 0.8, "adam_epsilon": 0.3, "adam_weight_decay": 0.4}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("norm", [0.0, 0.05, 1e6])
def test_steps_by_hand(tmp_path, accumulation, norm):
    """Mean of the micro-batches, clipped, AdamW with the settings' numbers, at the step's own rate."""
    changes = {"max_train_steps": 5, "train_batch_size": 4, "gradient_accumulation_steps": accumulation}
    changes |= {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3, "max_grad_norm": norm, **ADAM}
    train(tmp_path / "run", Points(dropout=0), **changes, checkpointing_steps=5, logging_steps=1)
    task, size = Points(dropout=0), 4 * accumulation
    trained = list(task.model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.7, 0.8), eps=0.3, weight_decay=0.4)
    plan, losses, norms = BatchPlan(50, 4, accumulation, 1, seed=0), [], []
    for step in range(5):
        found = []
        for micro in range(accumulation):
            draws = Draws(0, step, range(4 * micro, 4 * micro + 4), size)
            found.append(task.loss(task.model, task.data[plan.indices(step, micro, 0)], draws).loss)
        losses.append(torch.stack(found).mean())
        losses[-1].backward()
        gradients = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
        norms.append(gradients.norm())
        for p in trained if norm else ():
            if p.grad is not None:
                p.grad *= min(1.0, norm / (float(norms[-1]) + 1e-6))
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, (step + 1) / 3)
        optimizer.step()
        optimizer.zero_grad()
    made = load_file(tmp_path / "run" / "checkpoint-5" / "model.safetensors")
    for name, parameter in task.model.named_parameters():
        torch.testing.assert_close(made[name], parameter.detach(), rtol=0, atol=1e-6, msg=name)
    log = logged(tmp_path / "run")
    assert list(log) == [1, 2, 3, 4, 5]
    for step, (loss, length) in enumerate(zip(losses, norms, strict=True), 1):
        assert log[step]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert log[step]["velocity"] == pytest.approx(loss.item(), rel=1e-5)
        assert log[step]["grad_norm"] == pytest.approx(float(length), rel=1e-4)
        assert log[step]["learning_rate"] == pytest.approx(1e-2 * min(1.0, step / 3))


@pytest.mark.parametrize("step", [2, 4, 7, 11])
def test_a_run_that_broke_off_resumes_to_the_same_bits(whole, tmp_path, step):
    folder = tmp_path / "run"
    with pytest.raises(PowerCut):
        train(folder, Points(hook=cut(step)))
    train(folder)
    assert digest(folder / "checkpoint-12") == digest(whole / "checkpoint-12")
    for path in ("model.safetensors", "best/model.safetensors", "samples/step-000012.png"):
        assert (folder / path).read_bytes() == (whole / path).read_bytes()

    def log(of: Path) -> dict[int, dict]:
        records = [json.loads(line) for line in (of / "log.jsonl").read_text().splitlines()]
        return {r["step"]: {k: v for k, v in r.items() if k != "seconds"} for r in records if "loss" in r}

    # The same lines, each once.
    assert log(folder) == log(whole)


class Restless(Points):
    """Whose loss hangs on every global generator, and on what each of them keeps for its next call."""

    def loss(self, model, batch, draws):
        found = super().loss(model, batch, draws)
        drawn = [random.random(), random.gauss(), np.random.rand(), np.random.randn(), torch.rand(()).item()]
        return found._replace(loss=found.loss * (1 + sum(drawn[: 1 + draws.step % 5])))


@pytest.mark.parametrize("step", [5, 8, 10])
def test_what_draws_from_global_generators_resumes_to_the_same_bits(tmp_path, step):
    random.seed(1), np.random.seed(2)
    train(tmp_path / "whole", Restless())
    with pytest.raises(PowerCut):
        train(tmp_path / "run", Restless(hook=cut(step)))
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    train(tmp_path / "run", Restless())
    assert digest(tmp_path / "run" / "checkpoint-12") == digest(tmp_path / "whole" / "checkpoint-12")


def test_what_had_no_gradient_before_a_checkpoint_may_have_one_after_it(tmp_path):
    train(tmp_path / "whole", Late())
    with pytest.raises(PowerCut):
        train(tmp_path / "run", Late(hook=cut(11)))
    train(tmp_path / "run", Late())
    assert digest(tmp_path / "run" / "checkpoint-12") == digest(tmp_path / "whole" / "checkpoint-12")
    assert load_file(tmp_path / "run" / "checkpoint-12" / "model.safetensors")["unused"].min() > 0


def test_at_any_moment_every_checkpoint_by_its_name_is_whole(tmp_path, monkeypatch):
    """Seen before and after each call that changes the disk: nothing a kill leaves is by the name of one."""
    folder, seen, passing = tmp_path / "run", [], set()

    def look() -> None:
        passing.update(path.name for path in folder.glob(".*") if path.name != MARK)
        for path in disk.checkpoint_folders(folder):
            files = disk.read_state(path)["files"]
            assert len(files) == 4
            for name in files:
                disk._check_sum(path, name, disk.read_state(path))
        seen.append(tuple(path.name for path in disk.checkpoint_folders(folder)))

    def looking(original):
        def call(*args, **kwargs):
            look()
            result = original(*args, **kwargs)
            look()
            return result

        return call

    for name in ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, looking(getattr(os, name)))
    train(folder, max_train_steps=8, checkpointing_steps=2)
    monkeypatch.undo()
    # What else it leaves, the next run sweeps away.
    assert {name.split(".")[1] for name in passing} >= {"checkpoint-2", "best", "final", "settings"}
    for name in passing:
        (folder / name).mkdir()
    train(folder, max_train_steps=8, checkpointing_steps=2)
    assert [path.name for path in folder.glob(".*")] == [MARK]
    kept = [("checkpoint-2",), ("checkpoint-2", "checkpoint-4")]
    after = list(dict.fromkeys(seen))
    assert after[:3] == [(), *kept] and after[-1] == ("checkpoint-6", "checkpoint-8")
    assert all(len(names) >= 2 for names in after[2:])  # there is always one to go back to


def test_a_killed_process_resumes_to_the_same_bits(whole, tmp_path):
    folder = tmp_path / "run"
    assert run(alone, folder, {}, 7).codes == [-signal.SIGKILL]
    assert [path.name for path in disk.checkpoint_folders(folder)] == ["checkpoint-4"]
    train(folder)
    assert digest(folder / "checkpoint-12") == digest(whole / "checkpoint-12")


def test_sigterm_saves_first(whole, tmp_path):
    folder = tmp_path / "run"
    done = run(alone, folder, {}, 6, signal.SIGTERM)
    assert "stopped by SIGTERM after step 7" in done.stderr
    assert [path.name for path in disk.checkpoint_folders(folder)] == ["checkpoint-4", "checkpoint-7"]
    train(folder)
    assert digest(folder / "checkpoint-12") == digest(whole / "checkpoint-12")


def test_sigterm_stops_two_processes_together(tmp_path):
    folder = tmp_path / "run"
    done = run(alone, folder, {}, 6, signal.SIGTERM, processes=2)
    # One step later than alone: several processes hear of each other without waiting.
    assert 0 not in done.codes and done.stderr.count("stopped by SIGTERM after step 8") >= 2, done.stderr
    assert "outlives" not in done.stderr
    assert [path.name for path in disk.checkpoint_folders(folder)] == ["checkpoint-4", "checkpoint-8"]


def test_interrupting_in_process_raises_and_gives_the_handlers_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    hook = lambda step: step == 3 and signal.raise_signal(signal.SIGINT)  # noqa: E731
    with pytest.raises(Interrupted) as stopped:
        train(tmp_path / "run", Points(hook=hook))
    assert (stopped.value.signal, stopped.value.step) == (signal.SIGINT, 4)
    assert signal.getsignal(signal.SIGINT) is before
    assert train(tmp_path / "run")["step"] == 12


def test_the_global_generators_are_left_alone(tmp_path):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train(tmp_path / "run", max_train_steps=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_looking_at_the_model_changes_nothing(whole, tmp_path):
    """Validating and sampling more often, and logging, leave the weights bit-equal."""
    folder = tmp_path / "run"
    train(folder, validation_steps=1, sample_steps=1, logging_steps=1)
    assert digest(folder / "checkpoint-12") == digest(whole / "checkpoint-12")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    train(folder, Points(dropout=0), **TWENTY, train_batch_size=16)
    return folder


TWENTY = {"max_train_steps": 20, "checkpointing_steps": 20}
WAYS = {
    "accumulation": (1, {"train_batch_size": 4, "gradient_accumulation_steps": 4}, {}),
    "two processes": (2, {"train_batch_size": 4, "gradient_accumulation_steps": 2}, {}),
    "FSDP": (2, {"train_batch_size": 8}, {"ACCELERATE_USE_FSDP": "true"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_global_batch_trains_the_same(one_process, tmp_path, way):
    processes, changes, environment = WAYS[way]
    folder = tmp_path / "run"
    if processes == 1:
        train(folder, Points(dropout=0), **TWENTY, **changes)
    else:
        given = {"dropout": 0.0, **TWENTY, **changes}
        done = run(alone, folder, given, processes=processes, **environment)
        assert done.codes == [0, 0], done.stderr[-3000:]
        assert json.loads((folder / "checkpoint-20" / "state.json").read_text())["processes"] == 2
    for name in ("model", "ema"):
        ours, theirs = (
            load_file(of / "checkpoint-20" / f"{name}.safetensors") for of in (folder, one_process)
        )
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert ours[key].shape == tensor.shape
            torch.testing.assert_close(ours[key], tensor, rtol=0, atol=1e-6)
    if way == "FSDP":  # goes on in one process
        train(folder, Points(dropout=0), max_train_steps=21, train_batch_size=16)
        assert disk.checkpoint_folders(folder)[-1].name == "checkpoint-21"


def test_a_nan_stops_with_its_samples(tmp_path):
    task = Points(poison=[11])
    with pytest.raises(NonFiniteError, match="nonfinite-step"):
        train(tmp_path / "run", task)
    (path,) = (tmp_path / "run").glob("nonfinite-*.json")
    (micro,) = json.loads(path.read_text())["micro_batches"]
    assert micro["samples"] == task.seen[-1] and 11 in micro["samples"]
    assert micro["losses"][micro["samples"].index(11)] == "nan"
    assert micro["losses"].count("nan") == 1


def test_a_nan_may_be_skipped(tmp_path):
    result = train(tmp_path / "run", Points(poison=[11]), on_nonfinite="skip")
    assert result["step"] == 12 and 1 <= result["skipped"] <= 2  # 96 of 50 samples: once or twice
    assert all(t.isfinite().all() for t in load_file(tmp_path / "run" / "model.safetensors").values())
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    trained = [record for record in records if "loss" in record]
    assert trained[-1]["skipped"] == result["skipped"] and math.isfinite(trained[-1]["loss"])


def test_skipping_has_an_end(tmp_path):
    with pytest.raises(NonFiniteError, match=r"3 such step\(s\) in a row"):
        train(tmp_path / "run", Points(poison=range(50)), on_nonfinite="skip", max_skipped=3)


def spoiled_at(*steps: int) -> Points:
    """A task all of whose losses are NaN at these steps."""

    def hook(step: int) -> None:
        task.poison = set(range(50)) if step in steps else set()

    task = Points(hook=hook)
    return task


def test_only_steps_in_a_row_count_towards_the_end(tmp_path):
    result = train(tmp_path / "run", spoiled_at(1, 3, 4, 6, 9, 10), on_nonfinite="skip", max_skipped=3)
    assert (result["step"], result["skipped"]) == (12, 6)
    with pytest.raises(NonFiniteError, match=r"at step 4 .*3 such step\(s\) in a row"):
        train(tmp_path / "other", spoiled_at(0, 2, 3, 4), on_nonfinite="skip", max_skipped=3)


def test_skipped_steps_are_counted_on(tmp_path):
    train(tmp_path / "run", spoiled_at(2, 5), on_nonfinite="skip", max_train_steps=8)
    result = train(tmp_path / "run", spoiled_at(9), on_nonfinite="skip")
    assert result["skipped"] == 3 and logged(tmp_path / "run")[12]["skipped"] == 3
    assert logged(tmp_path / "run")[8]["skipped"] == 2


def test_a_full_disk_is_an_error_before_training(tmp_path, monkeypatch):
    """Weights, their average and two moments, for each checkpoint that is kept and the one being written."""
    usage = disk.shutil.disk_usage(tmp_path)
    needed = 4 * 4 * sum(p.numel() for p in Points().model.parameters()) * 3
    for free in (100, needed - 1):
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        with pytest.raises(CheckpointError, match="GB left"):
            Trainer(Points(), settings(tmp_path / "run"))
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=needed))
    Trainer(Points(), settings(tmp_path / "run"))


def test_a_save_that_fails_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    folder, write, count = tmp_path / "run", disk.write_tensors, []

    def full(path, tensors, metadata=None):
        count.append(path)
        if len(count) > 6:  # in the middle of the second checkpoint
            raise OSError(28, "No space left on device")
        write(path, tensors, metadata)

    monkeypatch.setattr(disk, "write_tensors", full)
    with pytest.raises(CheckpointError, match=r"No space left.*checkpoint-4 is whole"):
        train(folder, validation_steps=0, sample_steps=0)
    assert [path.name for path in disk.checkpoint_folders(folder)] == ["checkpoint-4"]
    assert not list(folder.glob(".checkpoint-*"))
    monkeypatch.undo()
    assert train(folder)["step"] == 12


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written to"):
        Trainer(Points(), settings(tmp_path / "file" / "run"))


def test_a_damaged_checkpoint_is_named(whole, tmp_path):
    train(tmp_path / "run", max_train_steps=4)
    path = tmp_path / "run" / "checkpoint-4" / "ema.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"ema\.safetensors is damaged"):
        train(tmp_path / "run")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"lacks ema\.safetensors"):
        train(tmp_path / "run")


def test_another_run_is_not_continued(tmp_path):
    train(tmp_path / "run", max_train_steps=4)
    others = {"seed": {"seed": 1}, "samples a step": {"train_batch_size": 4}}
    others |= {"optimizer": {"optimizer": "muon"}}
    for what, changes in others.items():
        with pytest.raises(CheckpointError, match=f"another {what}"):
            Trainer(Points(), settings(tmp_path / "run", **changes))
    with pytest.raises(CheckpointError, match="another task"):
        Trainer(Points(count=49), settings(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="earlier run"):
        Trainer(Points(), settings(tmp_path / "run", resume_from_checkpoint="no"))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Trainer(Points(), settings(tmp_path / "run", resume_from_checkpoint="checkpoint-9"))


def test_a_data_set_smaller_than_a_batch(tmp_path):
    task = Points(count=3)
    train(tmp_path / "run", task, max_train_steps=3, gradient_accumulation_steps=2)
    seen = [index for batch in task.seen for index in batch]
    assert len(seen) == 48 and all(sorted(seen[i : i + 3]) == [0, 1, 2] for i in range(0, 48, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_8bit_adam": True}, "pip install bitsandbytes"),
        ({"report_to": "tensorbord"}, "not installed or not known"),
    ],
)
def test_what_is_not_possible_here_is_said_before_training(tmp_path, changes, message):
    if torch.cuda.is_available():
        pytest.skip("this machine may be able to")
    with pytest.raises(SettingsError, match=message):
        Trainer(Points(), settings(tmp_path / "run", **changes))


@pytest.fixture
def another_precision():
    """Accelerate keeps one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_fp16_without_scaled_gradients_is_refused(tmp_path, another_precision):
    if torch.cuda.is_available():
        pytest.skip("here gradients are scaled")
    with pytest.raises(SettingsError, match="no gradient scaling on cpu"):
        Trainer(Points(), settings(tmp_path / "run", mixed_precision="fp16"))


def test_what_is_trained_must_be_float32(tmp_path):
    task = Points()
    task.model.half()
    with pytest.raises(SettingsError, match="must be float32"):
        Trainer(task, settings(tmp_path / "run"))


def test_bf16_trains(tmp_path, another_precision):
    task = Points(dropout=0)
    Trainer(task, settings(tmp_path / "run", mixed_precision="bf16"), quiet=True).train()
    with torch.no_grad():
        found = task.model(torch.ones(2, 2), torch.ones(2))
        own = task.model.gain * task.model.layers(torch.ones(2, 3)) + task.model.offset
    assert found.dtype == own.dtype == torch.float32
    assert 0 < (found - own).abs().max() < 0.05  # the work was done in less


def test_compiled_it_trains_the_same(tmp_path):
    weights = {}
    for compiled in (False, True):
        task = Points(dropout=0)
        folder = tmp_path / str(compiled)
        train(folder, task, torch_compile=compiled, max_train_steps=4, validation_steps=0)
        weights[compiled] = load_file(folder / "checkpoint-4" / "model.safetensors")
    for name, tensor in weights[False].items():
        torch.testing.assert_close(weights[True][name], tensor, rtol=0, atol=1e-5)


def test_the_hub_is_asked_before_training_and_gets_the_model(tmp_path, monkeypatch):
    from huggingface_hub import HfApi, RepoUrl

    def offline(*_, **__):
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr(HfApi, "create_repo", offline)
    with pytest.raises(SettingsError, match="push_to_hub: run can't be made on the hub: the hub cannot be"):
        Trainer(Points(), settings(tmp_path / "run", push_to_hub=True))
    uploads = []
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: RepoUrl("https://huggingface.co/me/points"))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **given: uploads.append(given))
    train(tmp_path / "run", push_to_hub=True, hub_model_id="points", max_train_steps=2)
    (upload,) = uploads
    assert upload["repo_id"] == "me/points"
    sheet = "samples/step-000002.png"
    assert upload["allow_patterns"] == ["config.json", "model.safetensors", "README.md", sheet]
    assert f"]({sheet})" in (tmp_path / "run" / "README.md").read_text()
    assert "# me/points" in (tmp_path / "run" / "README.md").read_text()


@pytest.fixture
def scaled_on_a_cpu(monkeypatch, another_precision):
    """Accelerate scales gradients on accelerators only; torch can on a CPU too."""

    def scaling(given):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = new_accelerator(dataclasses.replace(given, mixed_precision="no"))
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=5)
        return accelerator

    monkeypatch.setattr("moe_sampler.training.run.new_accelerator", scaling)


def test_fp16_leaves_steps_out_until_the_scale_fits_and_resumes_to_the_same_bits(tmp_path, scaled_on_a_cpu):
    changes = {"max_train_steps": 24, "checkpointing_steps": 12, "learning_rate": 1e-3}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = train(whole, **changes)
    assert 0 < result["skipped"] < 12 and result["step"] == 24
    states = [json.loads((whole / f"checkpoint-{n}" / "state.json").read_text()) for n in (12, 24)]
    # Halved at every step left out, doubled after five good ones in a row.
    assert states[0]["scaler"]["scale"] == 2.0 ** (24 - states[0]["skipped"]) * 2.0 ** (
        (12 - states[0]["skipped"]) // 5
    )
    assert states[0]["average_updates"] == 12 - states[0]["skipped"]
    weights = load_file(whole / "checkpoint-24" / "model.safetensors")
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in weights.values())
    with pytest.raises(PowerCut):
        train(broken, Points(hook=cut(17)), **changes)
    train(broken, **changes)
    assert digest(broken / "checkpoint-24") == digest(whole / "checkpoint-24")
    assert json.loads((broken / "checkpoint-24" / "state.json").read_text())["scaler"] == states[1]["scaler"]


@pytest.mark.gpu
def test_on_cuda_it_scales_gradients_and_resumes_to_the_same_bits(tmp_path):
    for name, stop, code in (("whole", None, 0), ("broken", 7, -signal.SIGKILL), ("broken", None, 0)):
        changes = {"mixed_precision": "fp16"}
        done = run(alone, tmp_path / name, changes, stop, ACCELERATE_USE_CPU="false")
        assert done.codes == [code], done.stderr[-2000:]
    whole, broken = (tmp_path / name / "checkpoint-12" for name in ("whole", "broken"))
    assert digest(whole) == digest(broken)
    assert json.loads((whole / "state.json").read_text())["scaler"]["scale"] > 1


def test_tensorboard_gets_losses_and_sheets(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "run", report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "training"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12]
    assert [event.step for event in events.Scalars("validation/loss")] == [3, 6, 9, 12]
    assert events.Tags()["images"] == ["samples"]


class NoLossAt(Points):
    """Whose validation is NaN at these of its calls."""

    def __init__(self, *calls: int, **settings) -> None:
        super().__init__(**settings)
        self.calls, self.count = calls, -1

    def validate(self, model) -> dict[str, float]:
        self.count += 1
        return {"loss": math.nan} if self.count in self.calls else super().validate(model)


def test_a_nan_validation_is_never_the_best(tmp_path):
    task = NoLossAt(0, 2)
    result = train(tmp_path / "run", task)  # validates at 3, 6, 9 and 12
    assert result["best"]["step"] in (6, 12) and math.isfinite(result["best"]["loss"])
    assert json.loads((tmp_path / "run" / "best" / "validation.json").read_text()) == result["best"]
    assert train(tmp_path / "none", NoLossAt(0, 1, 2, 3))["best"] is None
    assert not (tmp_path / "none" / "best").exists()


def test_no_checkpoint_of_a_step_whose_validation_is_nan(tmp_path):
    train(tmp_path / "run", NoLossAt(1), validation_steps=4, checkpointing_steps=4)
    assert [path.name for path in disk.checkpoint_folders(tmp_path / "run")] == [
        "checkpoint-4",
        "checkpoint-12",
    ]


def test_no_checkpoint_of_a_step_whose_loss_is_nan(tmp_path):
    def after(step):  # the eighth step's samples alone
        task.poison = set(range(50)) if step == 7 else set()

    task = Points(hook=after)
    result = train(tmp_path / "run", task, on_nonfinite="skip", checkpointing_steps=4)
    assert result["skipped"] == 1
    assert [path.name for path in disk.checkpoint_folders(tmp_path / "run")] == [
        "checkpoint-4",
        "checkpoint-12",
    ]


def test_samples_that_are_nan_cost_the_sheet_and_not_the_run(tmp_path, caplog):
    task = Points()

    def samples(model):
        raise NonFiniteError("points gave NaN or an infinity")

    task.samples = samples
    assert train(tmp_path / "run", task)["step"] == 12
    assert "no samples of step 5: points gave NaN" in caplog.text
