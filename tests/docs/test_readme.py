"""The README's promises; test_pages.py runs its blocks."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from moe_sampler.cli import app
from moe_sampler.demo import known_words

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_lines():
    lines = "".join(re.findall(r"^```bash\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE))
    assert (
        "pip install -c constraints.txt . && moe-sampler generate "
        '"a castle with two towers, at dusk" --seed 10 -o castle.png\n' in lines
    )
    assert 'pip install -c constraints.txt -e ".[test]" && pytest -n 2 --dist loadfile\n' in lines


def test_a_newcomer_reads_it_in_a_screen_and_a_half():
    assert len(TEXT.splitlines()) <= 130


@pytest.mark.parametrize("page", ["README.md", "docs/DEMO.md"])
def test_the_words_that_the_demo_knows(page):
    text, known = (ROOT / page).read_text(encoding="utf-8"), known_words()
    assert int(re.search(r"all (\d+) words", text)[1]) == len(known)
    passage = r"in words like (.*?);" if page == "README.md" else r"\| castles \|(.*?)\n\n"
    shown = re.search(passage, text, re.DOTALL)[1]
    for quoted in re.findall(r'"([^"]+)"', shown):
        assert not set(re.findall(r"\w{2,}", quoted)) - set(known), quoted


def test_night_turns_to_noon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("lake", "noon"):
        line = re.search(rf'^moe-sampler (generate) "([^"]+)" (.*-o {name}\.png)$', TEXT, re.MULTILINE)
        result = CliRunner().invoke(app, [line[1], line[2], *line[3].split()])
        assert result.exit_code == 0, result.output
    night, noon = (np.asarray(Image.open(f"{name}.png").convert("RGB")).mean() for name in ("lake", "noon"))
    assert night < 80 and noon > 130, (night, noon)
