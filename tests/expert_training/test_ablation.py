"""The ablation: equal starts, a table of what was measured, and a page that holds it."""

import json

import pytest

from bench import david_ablation as ablation
from bench.david_ablation import ablation_table, fill_page, run_ablation

SIZES = {"steps": 2, "seeds": (0,), "scenes": 22, "held_out": 2, "batch": 2, "quiet": True}


def test_both_arms_start_alike_and_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    starts = []
    whole = ablation.train_expert

    def spied(task, settings, quiet):
        unet = task.model.unet if settings.david.use_david else task.model
        starts.append(
            (settings.david.use_david, sum(float(p.detach().double().sum()) for p in unet.parameters()))
        )
        return whole(task, settings, quiet=quiet)

    monkeypatch.setattr(ablation, "train_expert", spied)
    results = run_ablation(tmp_path, **SIZES)
    assert [enabled for enabled, _ in starts] == [False, True]
    assert starts[0][1] == starts[1][1]
    assert results["with David"] != results["without David"]
    assert len(list(tmp_path.glob("latents-*"))) == 1
    assert run_ablation(tmp_path, **SIZES) == results and len(starts) == 2
    assert set(json.loads((tmp_path / "results.json").read_text())["runs"]) == {
        "without-david-0",
        "with-david-0",
    }
    with pytest.raises(ValueError, match="another folder"):
        run_ablation(tmp_path, **{**SIZES, "steps": 3})


def test_the_table_shows_means_spread_and_the_change_of_pairs():
    results = {
        "without David": [{"loss": 1.0, "x0_error/0.5": 0.2}, {"loss": 2.0, "x0_error/0.5": 0.4}],
        "with David": [{"loss": 1.1, "x0_error/0.5": 0.1}, {"loss": 2.2, "x0_error/0.5": 0.2}],
    }
    lines = ablation_table(results).splitlines()
    assert lines[2].split(" | ")[0] == "| v error, mean over the levels"
    assert "1.50000 ± 0.70711" in lines[2] and "+10.00 ± 0.00 %" in lines[2]
    assert lines[3].startswith("| x0 error at s = 0.5 | 0.30000") and "-50.00 ± 0.00 %" in lines[3]


def test_a_page_is_filled_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured: david -->\nold\n<!-- end: david -->\nafter\n")
    for text in ("new", "newer"):
        fill_page(page, text)
    assert page.read_text() == "before\n<!-- measured: david -->\n\nnewer\n\n<!-- end: david -->\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has no <!-- measured"):
        fill_page(page, "x")
