"""A reproduction of the demo experts beside those that ship, on a few scenes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from bench.demo import evaluate, reproduction
from bench.demo.evaluator import new_evaluator
from moe_sampler.demo import experts_path
from moe_sampler.demo.record import RunRecord
from moe_sampler.demo.stages import TRAINED
from moe_sampler.demo.weights import write_average

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def work(monkeypatch, tmp_path):
    """A run's work folder, as far as it is looked at."""
    docs = tmp_path / "docs"
    (docs / "images").mkdir(parents=True)
    (docs / "DEMO.md").write_text("before <!-- measured: reproduction --><!-- end: reproduction --> after")
    monkeypatch.setattr(reproduction, "DOCS", docs)
    monkeypatch.setattr(reproduction, "RESULTS", tmp_path)
    monkeypatch.setattr(reproduction, "EXAMPLE_PROMPTS", ("a castle", "a portrait"))
    monkeypatch.setattr(evaluate, "train_evaluator", lambda scenes, folder: new_evaluator())
    prepare = evaluate.Referee.prepare.__func__
    few = classmethod(lambda cls, folder, vae: prepare(cls, folder, vae, 4, 8))
    monkeypatch.setattr(evaluate.Referee, "prepare", few)
    monkeypatch.setattr(evaluate, "generate", few_steps(evaluate.generate))
    monkeypatch.setattr(reproduction, "generate", evaluate.generate)
    folder = tmp_path / "work"
    folder.mkdir()
    RunRecord(0, scenes=6, spent=90.0).write(folder)
    for number, name in enumerate(TRAINED, 1):
        path = folder / "checkpoints" / f"{name}.safetensors"
        write_average(path, {"a": torch.zeros(1)}, 1000 * number)
    return folder


def few_steps(generate):
    return lambda pipe, method, prompts, seed: generate(pipe, method, prompts, seed, 2)


def test_both_are_measured_and_painted_once(work, monkeypatch):
    made = work.parent / "made"
    shutil.copytree(experts_path(), made)
    index = json.loads((made / "model_index.json").read_text())
    (made / "model_index.json").write_text(json.dumps(index | {"lune_levels": "uniform"}))
    reproduction.main([str(work), str(made)])
    content = json.loads((work.parent / "reproduction.json").read_text())
    assert content["run"]["minutes"] == 1.5 and content["run"]["steps"]["lune"] == 1000 * len(TRAINED)
    table = content["table"]
    assert [(title.split(": ")[0], len(runs)) for title, runs in table.items()] == [
        (title, runs) for title in ("as shipped", "made here") for runs in (1, 3, 3)
    ]
    # The same weights, of which one run has other levels: only those pictures differ.
    kinds = ("scenes through the autoencoder", "Lune alone")
    same = [table[f"as shipped: {kind}"] == table[f"made here: {kind}"] for kind in kinds]
    assert same == [True, False]
    assert np.isfinite([value for runs in table.values() for run in runs for value in run.values()]).all()
    page = (work.parent / "docs" / "DEMO.md").read_text()
    assert "It took 2 minutes on " in page and ": 6 scenes; steps, with their batches: " in page
    assert "1,000 of the autoencoder (24)" in page and "| made here: hybrid |" in page
    assert Image.open(work.parent / "docs" / "images" / "demo_reproduction.png").height > 200
    monkeypatch.setattr(reproduction, "sheet", lambda folders: Image.new("RGB", (1, 1)))
    monkeypatch.setattr(evaluate, "generate", None)  # pictures are kept
    reproduction.main([str(work), str(made)])
    assert json.loads((work.parent / "reproduction.json").read_text())["table"] == table


def test_a_run_that_is_not_finished_is_refused(work):
    (work / "checkpoints" / "lune.safetensors").unlink()
    with pytest.raises(ValueError, match=r"isn't finished: it lacks lune$"):
        reproduction.main([str(work), str(experts_path())])
    with pytest.raises(ValueError, match="no training run's work folder"):
        reproduction.trained(work.parent)
