"""`moe-sampler experts` as a user runs it."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from typer.testing import CliRunner

from moe_sampler import HybridPipeline
from moe_sampler.cli import app
from moe_sampler.demo import experts_path
from moe_sampler.expert_training.settings import RunSettings
from moe_sampler.training.settings import help_of

SHORT = (
    *("--lr-warmup-steps", 0, "--train-batch-size", 2, "--held-out", 2, "--num-validation-images", 0),
    *("--validation-steps", 0, "--sample-steps", 0, "--report-to", "none"),
)


def run(*arguments, code: int = 0):
    result = CliRunner().invoke(app, ["experts", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_every_setting_is_a_flag_with_a_text():
    shown = re.sub(r"\x1b\[[0-9;]*m", "", run("train", "--help").stdout)
    names = []
    for kind, _ in help_of(RunSettings).values():
        texts = help_of(kind)
        for field in dataclasses.fields(kind):
            names.append(field.name)
            assert texts[field.name][1], field.name
            assert f"--{field.name.replace('_', '-')} " in shown, field.name
    assert len(set(names)) == len(names), "a flag means one setting"


def test_a_file_and_flags_train_an_expert_that_loads(tmp_path):
    config = tmp_path / "sol.toml"
    config.write_text(
        f"""
[training]
output_dir = "{tmp_path / "run"}"
max_train_steps = 50
learning_rate = 1e-3

[data]
demo = true
count = 10

[levels]
density = "uniform"
"""
    )
    shown = run("train", "sol", config, "--max-train-steps", 1, "--density", "shifted", *SHORT)
    assert f"{tmp_path / 'run'}: trained to step 1\n" in shown.stdout and "x0_error/0.5" in shown.stdout
    record = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert record["training"]["max_train_steps"] == 1 and record["training"]["learning_rate"] == 1e-3
    assert record["levels"]["density"] == "shifted" and record["data"]["count"] == 10
    pipe = HybridPipeline.from_pretrained(experts_path(), sol=tmp_path / "run")
    assert pipe.scheduler_sol.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("sol", "--demo"), "give training.output_dir"),
        (("luna", "--demo", "--output-dir", "x"), 'no kind of expert "luna"; did you mean "lune"'),
        (("sol", "--output-dir", "x"), "give a source of images and captions, or demo"),
        (("sol", "--source", "pictures", "--demo", "--output-dir", "x"), "not both"),
        (("sol", "--source", "pictures", "--output-dir", "x"), "give base"),
        (
            ("sol", "--source", "pictures", "--base", "nowhere", "--output-dir", "x"),
            "pictures is not a folder",
        ),
        (("lune", "--demo", "--output-dir", "x", "--beta-schedule", "linear"), "leave beta_schedule out"),
        (("sol", "--demo", "--output-dir", "x", "--held-out", "4000"), "lower held_out"),
        (("sol", "--demo", "--output-dir", "x", "--count", "70", "--use-david"), "lower that number"),
        (("sol", "--demo", "--output-dir", "x", "--shift", "0"), "levels: shift must be positive"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    shown = run("train", *arguments, code=2).stderr.strip()
    assert shown.startswith("error: ") and message in shown and len(shown.splitlines()) == 1
    assert not list(tmp_path.iterdir()), "before any work"


def test_an_unknown_setting_in_the_file_has_its_nearest_name(tmp_path):
    config = tmp_path / "a.toml"
    config.write_text("[training]\nmax_train_step = 3\n")
    shown = run("train", "sol", config, code=2).stderr
    assert 'no setting training.max_train_step; did you mean "max_train_steps"' in " ".join(shown.split())
    config.write_text("training = 3\n")
    assert "training is a table" in run("train", "sol", config, "--seed", 3, code=2).stderr
