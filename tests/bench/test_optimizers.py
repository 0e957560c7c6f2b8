"""Two optimizers side by side, for a second or two."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench.demo import optimizers

pytestmark = pytest.mark.usefixtures("one_thread")


def test_both_are_trained_for_the_same_time_and_not_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(optimizers, "RESULTS", tmp_path)
    monkeypatch.setattr(optimizers, "DOCS", tmp_path)
    page = tmp_path / "EXPERTS.md"
    page.write_text("before <!-- measured: optimizers --><!-- end: optimizers --> after")
    sizes = ["--scenes", "30", "--channels", "8", "24", "24", "--errors-of", "4"]
    arguments = [str(tmp_path / "work"), "--minutes", "0.05", *sizes]
    optimizers.main(arguments)
    result = json.loads((tmp_path / "optimizers.json").read_text())
    adamw, muon = (result["found"][name] for name in ("adamw", "muon"))
    assert adamw["steps"] > 1 and muon["steps"] > 1 and adamw["errors"] != muon["errors"]
    assert np.isfinite([*adamw["errors"], *muon["errors"]]).all()
    ratio = np.exp(np.mean(np.log(np.array(muon["errors"]) / adamw["errors"])))
    text = page.read_text()
    assert f"| geometric mean |  |  | {ratio:.2f} |" in text
    assert f"{adamw['steps']:,} of AdamW and {muon['steps']:,} of Muon" in text
    monkeypatch.setattr(optimizers, "run_stage", None)  # nothing is trained again
    optimizers.main(arguments)
    assert json.loads((tmp_path / "optimizers.json").read_text()) == result
