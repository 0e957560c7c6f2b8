"""The table of quality against cost, on settings and pictures small enough for a test."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from bench.demo.cost import SETTINGS, Setting, draw, measure, table
from bench.report import write_csv

pytestmark = pytest.mark.usefixtures("one_thread")


class Referee:
    """Measures nothing but brightness."""

    prompts = ("a castle", "a portrait")

    def measure(self, images: np.ndarray) -> dict[str, float]:
        assert images.shape == (2, 64, 64, 3) and images.dtype == np.uint8
        names = ("attributes", "composition", "surface", "frechet", "high_frequencies", "patches")
        return dict.fromkeys(names, float(images.mean() / 255))


def test_settings_are_measured_against_the_first(demo_pipeline, tmp_path):
    assert len({setting.title for setting in SETTINGS}) == len(SETTINGS)
    assert SETTINGS[0] == Setting(24) and SETTINGS[0].cost(demo_pipeline) == 48
    chosen = [Setting(3), Setting(3, 2), Setting(2), Setting(6, None, "1 to 0.3")]
    results = measure(demo_pipeline, Referee(), chosen, seeds=(0, 1))
    costs = [result.cost for result in results]
    assert costs[0] == 6 and costs[2] == 4 and costs[1] == pytest.approx(2 * (1 + 1 + 0.103), abs=0.01)
    assert costs[3] < 12
    assert results[0].distance == 0 < min(result.distance for result in results[1:])
    assert all(len(result.runs) == 2 for result in results)

    titles = [line.split(" | ")[0] for line in table(results).splitlines()[2:]]
    assert titles == ["| 6 steps, all full, guided 1 to 0.3", "| 3 steps, all full"] + [
        f"| {setting.title}" for setting in sorted(chosen[1:3], key=lambda own: -own.cost(demo_pipeline))
    ]
    assert "| 3 steps, all full | 6.0 | 0.000 |" in table(results)
    write_csv([result.row() for result in results], tmp_path / "cost.csv")
    rows = list(csv.DictReader((tmp_path / "cost.csv").open()))
    assert [row["reuse"] for row in rows] == ["1", "2", "1", "1"]
    draw(results, tmp_path / "cost.png")
    assert Image.open(tmp_path / "cost.png").width > 1000
