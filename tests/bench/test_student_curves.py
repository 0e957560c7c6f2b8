"""Tables and plots of students' held-out errors while they trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from bench import student_curves
from bench.report import read_csv
from moe_sampler.tinyflux.training.settings import StudentSettings
from moe_sampler.training.settings import from_tables, read_toml


def log(folder, errors):
    folder.mkdir()
    lines = [{"step": 1, "loss": 3.0}]
    lines += [{"step": step, "validation": {"loss": e, "noise 0.1": 2 * e}} for step, e in errors.items()]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder)


def test_runs_side_by_side(tmp_path, monkeypatch):
    page = tmp_path / "PAGE.md"
    page.write_text("a\n<!-- measured: student curves -->\nold\n<!-- end: student curves -->\nb")
    monkeypatch.setattr(student_curves, "PAGE", page)
    monkeypatch.setattr(student_curves, "RESULTS", tmp_path)
    alone = log(tmp_path / "alone", {100: 0.5, 200: 0.4, 300: 0.3})
    taught = log(tmp_path / "taught", {200: 0.3, 300: 0.33})
    student_curves.main([alone, taught])
    assert page.read_text().splitlines()[3:] == [
        "| | alone | taught |",
        "|---|---|---|",
        "| 200 steps | 0.4000 | 0.3000 (-25.0%) |",
        "| 300 steps | 0.3000 | 0.3300 (+10.0%) |",
        "| at time 0.1 | 0.6000 | 0.6600 (+10.0%) |",
        "",
        "<!-- end: student curves -->",
        "b",
    ]
    assert [(row["run"], row["step"]) for row in read_csv(tmp_path / "student_curves.csv")] == [
        *(("alone", step) for step in ("200", "300")),
        *(("taught", step) for step in ("200", "300")),
    ]
    assert Image.open(tmp_path / "student_curves.png").width > 1000
    with pytest.raises(ValueError, match="were never validated at the same step"):
        student_curves.main([alone, log(tmp_path / "other", {50: 1.0})])
    with pytest.raises(ValueError, match="validated nothing: train with --held-out"):
        student_curves.main([log(tmp_path / "blind", {})])


def test_the_settings_of_the_page_are_settings():
    path = Path(student_curves.__file__).with_suffix(".toml")
    found = from_tables(StudentSettings, read_toml(path))
    assert (found.training.max_train_steps, found.training.lr_decay_steps, found.data.held_out) == (
        20000,
        8000,
        128,
    )
