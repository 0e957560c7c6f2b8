"""Two specialists and one model, trained side by side, on a few scenes and for a few steps."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bench.demo import controls, evaluate
from bench.demo.controls import LEVELS, MODELS, Study, errors_over_time, own_errors
from bench.demo.evaluator import new_evaluator
from moe_sampler.demo.scene_task import stage_settings
from moe_sampler.demo.stages import SHIPPED, TRAINED
from moe_sampler.demo.weights import read_average

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = replace(SHIPPED, scenes=6, stages={name: stage_settings(4, 1e-3, 2, warmup=1) for name in TRAINED})
SIZES = ["--scenes", "6", "--channels", "8", "16", "16", "--steps", "2", "--parts", "2", "--seeds", "1"]


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(controls, "default_recipe", lambda large: SMALL)
    monkeypatch.setattr(controls, "RESULTS", tmp_path)
    monkeypatch.setattr(controls, "DOCS", tmp_path)
    (tmp_path / "DEMO.md").write_text("before <!-- measured: controls --><!-- end: controls --> after")
    prepare = evaluate.Referee.prepare.__func__
    monkeypatch.setattr(
        evaluate.Referee,
        "prepare",
        classmethod(lambda cls, folder, vae, count, trained: prepare(cls, folder, vae, count, 8, trained)),
    )
    monkeypatch.setattr(evaluate, "train_evaluator", lambda scenes, folder: new_evaluator())
    return tmp_path


def test_all_are_trained_measured_and_not_twice(small, monkeypatch):
    work = small / "work"
    arguments = [str(work), *SIZES, "--count", "4", "--errors-of", "4", "--sampling-steps", "2"]
    controls.main(arguments)
    result = json.loads((small / "controls.json").read_text())
    rows = result["errors"]
    assert len(rows) == 2 * 4 and {row["steps"] for row in rows} == {2, 4}
    assert all(np.isfinite(row["errors"]).all() and len(row["errors"]) == len(LEVELS) for row in rows)
    assert {title: len(runs) for title, runs in result["pictures"].items()} == dict.fromkeys(
        ("Sol and Lune", "two by level alone", "one model", "a large model", "one model after 2 steps"), 1
    )
    page = (small / "DEMO.md").read_text()
    assert "| 4 steps |" in page and "steps for each of the two, 4 for the others, of 2 of 6 scenes" in page
    assert Image.open(small / "controls.png").width > 1000
    monkeypatch.setattr(controls, "run_stage", None)  # nothing is trained again
    controls.main(arguments)
    assert json.loads((small / "controls.json").read_text()) == result
    with pytest.raises(ValueError, match=r"holds a study with .*8, 16, 16.*: use another work folder"):
        controls.main([*arguments, "--channels", "8", "8", "8"])


def test_a_measurement_on_the_way_changes_nothing(small, demo_pipeline, monkeypatch):
    monkeypatch.setattr(controls, "MODELS", {name: MODELS[name] for name in ("sol", "large")})
    whole, halves = (
        Study(small / name, replace(SMALL, channels=(8, 16, 16)), demo_pipeline, steps=4, parts=parts)
        for name, parts in (("whole", 1), ("halves", 2))
    )
    for study in (whole, halves):
        study.train([3])
    for name, model in controls.MODELS.items():
        a, b = (read_average(study.weights(name, 3, study.lengths(model)[-1])) for study in (whole, halves))
        assert a and all(torch.equal(a[key], b[key]) for key in a), name
    large, one = (sum(p.numel() for p in whole.unet(MODELS[n], 0).parameters()) for n in ("large", "one"))
    assert large > 1.5 * one


def test_two_models_are_worth_what_works_where_they_do(monkeypatch):
    monkeypatch.setattr(controls, "LEVELS", (0.3, 0.7, 0.9))
    errors, handoff = own_errors([3.0, 2.5, 3.0], [1.0, 2.0, 4.0])
    assert errors == [1.0, 2.0, 3.0] and handoff is not None and 0.7 < handoff < 0.9
    assert own_errors([9.0] * 3, [1.0, 2.0, 4.0]) == ([1.0, 2.0, 4.0], None)
    monkeypatch.setattr(controls, "LEVELS", (0.5, 0.9))
    by_seed = [
        {"seed": seed, "part": 0, "steps": 10, "contender": name, "errors": errors}
        for seed in (0, 1)
        for name, errors in {
            "hybrid": [0.9 + 0.1 * seed, 0.8],
            "levels": [1.0, 0.7],
            "one": [1.0, 1.0],
            "large": [0.625, 0.4],
        }.items()
    ]
    found = errors_over_time(by_seed).splitlines()
    assert found[0].startswith(
        "| | Sol and Lune, s ≥ 0.8 | Sol and Lune, s < 0.8 | two by level alone, s ≥ 0.8 |"
    )
    assert found[-1] == (
        "| 10 steps | 0.800 ± 0.000 | 0.950 ± 0.071 | 0.700 ± 0.000 | 1.000 ± 0.000 "
        "| 0.400 ± 0.000 | 0.625 ± 0.000 |"
    )
