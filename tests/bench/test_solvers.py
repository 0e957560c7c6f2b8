"""The table of solvers and spacings, on settings and pictures small enough for a test."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from older_versions import NEEDS_A_FLOWS_EULER_A

from bench.demo import solvers
from bench.demo.solvers import SETTINGS, Setting, chunks, draw, make, measure, table
from bench.report import write_csv

pytestmark = pytest.mark.usefixtures("one_thread")


class Referee:
    """Measures nothing but brightness."""

    def measure(self, images: np.ndarray) -> dict[str, float]:
        assert images.shape == (2, 64, 64, 3) and images.dtype == np.uint8
        return dict.fromkeys(("attributes", "frechet", "patches"), float(images.mean() / 255))


def test_no_setting_comes_twice():
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS)


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(one, id=one.name, marks=NEEDS_A_FLOWS_EULER_A if one.pair == "euler_a" else ())
        for one in SETTINGS
        if one.calls == 6
    ],
)
def test_settings_can_be_planned_for_their_calls(demo_pipeline, setting):
    assert setting.calls - 1 <= len(setting.plan(demo_pipeline)) <= setting.calls


def test_only_what_is_beyond_both_spreads_is_better():
    def result(pair: str, mean: float, spread: float) -> solvers.Result:
        runs = [dict.fromkeys(solvers.MEASURES, mean + step * spread) for step in (-1.0, 0.0, 1.0)]
        return solvers.Result(Setting(pair, None, 6), 6, runs)

    own, near, far, low = (
        result(*each)
        for each in (
            (solvers.PAIRS[0], 0.8, 0.02),
            ("heun", 0.83, 0.02),
            ("dpmpp_2m", 0.9, 0.02),
            ("unipc", 0.6, 0.0),
        )
    )
    every = [own, near, far, low]
    assert far.spread("attributes") == pytest.approx(0.02)
    assert solvers.beyond_spread(every, "attributes", 6) == [far]
    assert solvers.beyond_spread(every, "frechet", 6) == [low]


def test_pictures_are_made_once_and_measured(demo_pipeline, tmp_path, monkeypatch):
    chosen = [Setting("ddim+euler", None, 2), Setting("ddim+euler", "beta", 2)]
    small = {"SETTINGS": chosen, "SEEDS": (0, 1), "CHUNK": 2, "CALLS": (2,), "PAIRS": ("ddim+euler",)}
    for name, value in small.items():
        monkeypatch.setattr(solvers, name, value)
    folder = tmp_path / "pictures"
    make(demo_pipeline, ["a castle", "a portrait"], folder)
    assert chunks(folder) == [0]
    made = solvers.pictures(chosen[0], folder, [0])
    alone = demo_pipeline("a portrait", plan=chosen[0].plan(demo_pipeline), seed=1_000_001, output_type="np")
    assert np.abs(made[1, 1].astype(float) - 255 * alone.images[0]).max() <= 1.5  # in another batch

    kept = chosen[0].path(folder, 0).stat().st_mtime_ns
    chosen[1].path(folder, 0).unlink()
    assert chunks(folder) == []
    make(demo_pipeline, ["a castle", "a portrait"], folder)
    assert chunks(folder) == [0] and chosen[0].path(folder, 0).stat().st_mtime_ns == kept

    results = list(measure(demo_pipeline, Referee(), folder, [0]))
    own, beta = table(results).splitlines()[2:]
    assert own.startswith("| ddim+euler | own | ") and beta.startswith("| ddim+euler | beta | ")
    assert "| 2 | none | none | none |" in solvers.block(results, 2)
    write_csv([result.row() for result in results], tmp_path / "solvers.csv")
    with open(tmp_path / "solvers.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["levels"] for row in rows] == ["own", "beta"] and {row["made"] for row in rows} == {"2"}
    draw(results, tmp_path / "solvers.png")
    assert (tmp_path / "solvers.png").stat().st_size > 10_000
