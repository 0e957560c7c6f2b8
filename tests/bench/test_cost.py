"""The tables of quality against cost, on settings and pictures small enough for a test."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from bench.demo.cost import GUIDERS, SCALES, STUDIES, Setting, draw, measure, read, table
from bench.report import write_csv

pytestmark = pytest.mark.usefixtures("one_thread")


class Referee:
    """Measures nothing but brightness."""

    prompts = ("a castle", "a portrait")

    def measure(self, images: np.ndarray) -> dict[str, float]:
        assert images.shape == (2, 64, 64, 3) and images.dtype == np.uint8
        names = ("attributes", "composition", "surface", "frechet", "high_frequencies", "patches")
        return dict.fromkeys(names, float(images.mean() / 255))


def test_settings_are_measured_once_against_the_first(demo_pipeline, tmp_path):
    chosen = [Setting(3), Setting(3, 2), Setting(2), Setting(6, 1, "1 to 0.3")]
    rows = []
    for row in measure(demo_pipeline, Referee(), chosen, seeds=(0, 1)):
        rows.append(row)
        write_csv(rows, tmp_path / "cost.csv")
    costs = [row["cost"] for row in rows]
    assert costs[0] == 6 and costs[2] == 4 and costs[1] == pytest.approx(2 * (1 + 1 + 0.103), abs=0.01)
    assert costs[3] < 12
    assert rows[0]["rms_from_first"] == 0 < min(row["rms_from_first"] for row in rows[1:])
    assert all("patches_std" in row for row in rows)

    titles = [line.split(" | ")[0] for line in table(rows).splitlines()[2:]]
    assert titles == ["| 6 steps, all full, guided 1 to 0.3", "| 3 steps, all full"] + [
        f"| {setting.title}" for setting in sorted(chosen[1:3], key=lambda own: -own.cost(demo_pipeline))
    ]
    assert "| 3 steps, all full | 6.0 | 0.000 |" in table(rows)
    kept = read(tmp_path / "cost.csv")
    assert table(kept) == table(rows)
    assert list(measure(demo_pipeline, Referee(), chosen, seeds=(0, 1), done=kept)) == []
    assert list(measure(demo_pipeline, Referee(), chosen[:2], (0, 1), done=kept[:1])) == rows[1:2]


@pytest.mark.parametrize("study", STUDIES)
def test_every_setting_of_a_study_is_a_plan_and_a_point(study, demo_pipeline, tmp_path):
    settings = STUDIES[study]
    assert len({setting.title for setting in settings}) == len(settings)
    assert all(0 < setting.cost(demo_pipeline) <= settings[0].cost(demo_pipeline) for setting in settings)
    measures = dict.fromkeys(("attributes", "frechet", "patches"), 0.5)
    draw(study, [{"setting": s.title, "cost": 1.0, **measures} for s in settings], tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").width > 1000


def test_guiders_are_measured_at_every_scale():
    found = {(setting.guider, setting.scale) for setting in STUDIES["guidance"]}
    assert len(found) == len(GUIDERS) * len(SCALES) and STUDIES["cost"][0] == Setting(24)
