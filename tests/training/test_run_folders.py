"""Whose a run's folder is, who works in it, and what of it a crash may leave."""

import json
import logging
import shutil

import pytest
from training_helpers import Points, digest, settings, train

from moe_sampler._files import MARK
from moe_sampler.errors import CheckpointError
from moe_sampler.training import Trainer
from moe_sampler.training.checkpoints import rotate


@pytest.mark.parametrize("name", ["best", "README.md", "config.json", "model.safetensors", "checkpoint-3"])
def test_what_a_stranger_has_by_our_names_is_left_alone(tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=f"has a {name} and is not the folder of a training run"):
        train(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


def test_other_things_may_lie_beside_a_run_and_links_may_not(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "my.toml").write_text("a = 1")
    train(folder, max_train_steps=4)
    assert (folder / "my.toml").read_text() == "a = 1"
    shutil.rmtree(folder / "best")
    (tmp_path / "elsewhere").mkdir()
    (folder / "best").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="best is a link"):
        train(folder)
    (folder / "best").unlink()
    (folder / MARK).write_text("")  # as a kill may leave it
    assert train(folder)["step"] == 12


def test_one_run_at_a_time_works_in_a_folder(tmp_path):
    errors = []

    def another(step: int) -> None:
        if step == 5:
            with pytest.raises(CheckpointError, match="is being trained in by another process") as caught:
                train(tmp_path / "run")
            errors.append(caught.value)

    train(tmp_path / "run", Points(hook=another))
    assert errors
    Trainer(Points(), settings(tmp_path / "run"), quiet=True).train()


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    """A run of 12 steps that was stopped after step 8, and what it would have come to."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "whole")

    def stop(step: int) -> None:
        if step == 9:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        train(folder / "half", Points(hook=stop))
    return folder


def _torn_log(folder):
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 9, "lo')


def _half_deleted(folder):
    (folder / "checkpoint-8" / "state.json").unlink()


def _empty(folder):
    (folder / "checkpoint-0010").mkdir()


def _cut_off(folder):
    path = folder / "checkpoint-8" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def _bit_of_random_states(folder):
    path = folder / "checkpoint-8" / "random-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")


def _another_step(folder):
    path = folder / "checkpoint-8" / "state.json"
    path.write_text(path.read_text().replace('"step": 8', '"step": 7', 1))


@pytest.mark.parametrize(
    "fault", [_torn_log, _half_deleted, _empty, _cut_off, _bit_of_random_states, _another_step]
)
def test_a_run_goes_on_after_what_a_crash_leaves(broken_off, tmp_path, fault, caplog):
    folder = tmp_path / "run"
    shutil.copytree(broken_off / "half", folder)
    fault(folder)
    (folder / ".checkpoint-9.partial").mkdir()
    (folder / ".settings.json.abc.tmp").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert train(folder)["step"] == 12
    said = "which is whole" in caplog.text
    assert said == (fault is not _torn_log)
    assert digest(folder / "checkpoint-12") == digest(broken_off / "whole" / "checkpoint-12")
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kinds = [(record["step"], "validation" in record) for record in records]
    wanted = [json.loads(line) for line in (broken_off / "whole" / "log.jsonl").read_text().splitlines()]
    assert kinds == [(record["step"], "validation" in record) for record in wanted]
    assert not [path for path in folder.iterdir() if path.name.startswith(".") and path.name != MARK]
    # Again, with nothing left to do: no line comes twice.
    train(folder)
    assert len((folder / "log.jsonl").read_text().splitlines()) == len(records)


def test_where_no_checkpoint_is_whole_it_says_so(broken_off, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(broken_off / "half", folder)
    for path in folder.glob("checkpoint-*/state.json"):
        path.write_text("[]")
    with pytest.raises(CheckpointError, match="no other checkpoint is whole"):
        train(folder)


def test_only_what_has_a_state_is_rotated_away(tmp_path):
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (2, 3):
        (tmp_path / f"checkpoint-{step}" / "state.json").write_text("{}")
    for left in (".checkpoint-4.partial", ".checkpoint-0.abc.removed"):
        (tmp_path / left).mkdir()
    (tmp_path / ".mine").mkdir()
    rotate(tmp_path, 1)
    (tmp_path / ".mine").rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]
