"""How many steps fit into the time there is, with a clock of our own."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
from training_helpers import Points, settings

from moe_sampler.training import SettingsError, Trainer
from moe_sampler.training import pace as module
from moe_sampler.training.checkpoints import checkpoint_folders
from moe_sampler.training.pace import Pace


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """`clock.now` is the time."""
    found = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: found.now))
    return found


def stable(folder, **changes):
    values = {"lr_scheduler": "warmup_stable_decay", "max_train_steps": 100, "lr_decay_steps": 40}
    return settings(folder, **{"lr_warmup_steps": 10, "lr_floor": 0.02, **values, **changes})


def run(pace: Pace, clock, seconds_a_step, first: int = 0, start=(None, None)) -> tuple[int, list]:
    """(Steps made, the settings it went on with) of a run whose step n takes so many seconds."""
    now = pace.begin(first, *start)
    step, found = first, []
    while step < now.max_train_steps:
        clock.now += seconds_a_step(step)
        step += 1
        changed = pace.look(step, now.max_train_steps)
        if changed is not None:
            now = changed
            found.append(changed)
    return step, found


def test_the_decay_has_its_share_and_the_run_ends_in_time(tmp_path, clock):
    pace = Pace(stable(tmp_path), clock.now + 100)
    steps, (settled,) = run(pace, clock, lambda step: 0.1)
    assert 950 <= steps <= 1001 and clock.now <= 1100.0 + 1e-6
    assert settled.max_train_steps == steps
    assert settled.lr_decay_steps == pytest.approx(0.4 * steps, rel=0.02)
    assert pace.decay_start == steps - settled.lr_decay_steps and settled.lr_warmup_steps == 10


def test_it_looks_at_the_clock_twice_a_second(tmp_path, clock):
    pace = Pace(stable(tmp_path), clock.now - 5)
    pace.begin(0, None, None)
    clock.now += 0.49
    assert pace.look(1, 10**9) is None and pace.decay_start is None
    clock.now += 0.02
    settled = pace.look(2, 10**9)
    assert settled is not None and settled.max_train_steps == pace.decay_start == 2


def test_slow_first_steps_do_not_count(tmp_path, clock):
    """A first step of 30 seconds, which compiles."""
    steps, _ = run(Pace(stable(tmp_path), clock.now + 100), clock, lambda step: 0.1 if step else 30.0)
    assert 650 <= steps <= 701 and clock.now <= 1100.0 + 1e-6


def test_a_decay_that_becomes_slower_is_shortened(tmp_path, clock):
    pace = Pace(stable(tmp_path), clock.now + 100)
    steps, settled = run(pace, clock, lambda step: 0.1 if step < 700 else 0.5)
    assert len(settled) > 1 and steps == settled[-1].max_train_steps < settled[0].max_train_steps
    assert clock.now <= 1101.0
    assert all(one.max_train_steps - one.lr_decay_steps == pace.decay_start for one in settled)


def test_a_run_that_was_halted_is_not_slower_for_it(tmp_path, clock):
    """Half a minute in the middle, as SIGSTOP or a laptop's lid make it."""
    pace = Pace(stable(tmp_path), clock.now + 100)
    steps, (settled,) = run(pace, clock, lambda step: 30.0 if step == 300 else 0.1)
    assert 650 <= steps <= 701 and clock.now <= 1100.0 + 1e-6
    assert settled.lr_decay_steps == pytest.approx(0.4 * steps, rel=0.02)


def test_what_is_late_already_ends_at_once(tmp_path, clock):
    pace = Pace(stable(tmp_path), clock.now - 5)
    steps, (settled,) = run(pace, clock, lambda step: 1.0)
    assert steps == 1 and settled.lr_warmup_steps == 1 and settled.lr_decay_steps == 0


def test_a_resumed_run_goes_on_in_its_decay(tmp_path, clock):
    pace = Pace(stable(tmp_path), clock.now + 100)
    steps, settled = run(pace, clock, lambda step: 0.1, first=700, start=(1000, 600))
    assert steps == 1000 and settled == [] and clock.now == pytest.approx(1030.0)
    pace = Pace(stable(tmp_path), clock.now + 10)
    steps, _ = run(pace, clock, lambda step: 0.1, first=700, start=(1000, 600))
    assert 795 <= steps <= 801, "there is less time than it settled on"


def test_before_the_decay_a_resumed_run_is_steady(tmp_path, clock):
    pace = Pace(stable(tmp_path), clock.now + 10)
    steps, (settled,) = run(pace, clock, lambda step: 0.1, first=60, start=(10**9, None))
    assert 155 <= steps <= 161 and settled.lr_decay_steps == pytest.approx(0.4 * steps, abs=6)


def test_other_schedules_know_their_end_from_the_beginning(tmp_path):
    with pytest.raises(SettingsError, match="warmup_stable_decay"):
        Pace(settings(tmp_path, lr_scheduler="cosine"), time.time())


def test_a_trainer_ends_in_time_and_continues(tmp_path, monkeypatch):
    """Stopped in the middle by the power, then given some time again."""
    monkeypatch.setattr(module, "_EVERY", 0.05)
    folder = tmp_path / "run"
    given = stable(folder, checkpointing_steps=5, logging_steps=5, validation_steps=0, sample_steps=0)

    class PowerCut(BaseException):
        pass

    def cut(step: int) -> None:
        time.sleep(0.002)
        if step == 17:
            raise PowerCut

    with pytest.raises(PowerCut):
        Trainer(Points(hook=cut), given, quiet=True, deadline=time.time() + 600).train()
    assert checkpoint_folders(folder)[-1].name == "checkpoint-15"
    state = json.loads((checkpoint_folders(folder)[-1] / "state.json").read_text())
    assert state["decay_start"] is None
    trainer = Trainer(
        Points(hook=lambda step: time.sleep(0.002)), given, quiet=True, deadline=time.time() + 3
    )
    result = trainer.train()
    last = checkpoint_folders(folder)[-1]
    assert last.name == f"checkpoint-{result['step']}" and result["step"] > 15
    state = json.loads((last / "state.json").read_text())
    assert state["settings"]["max_train_steps"] == result["step"]
    assert state["settings"]["lr_decay_steps"] == result["step"] - state["decay_start"] > 0
    rates = [
        json.loads(line).get("learning_rate") for line in (folder / "log.jsonl").read_text().splitlines()
    ]
    assert rates[-2 if rates[-1] is None else -1] < 0.2 * given.learning_rate, "it decayed"
    assert (folder / "model.safetensors").is_file()
