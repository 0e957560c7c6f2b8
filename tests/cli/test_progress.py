"""What a long command says of its pace."""

from __future__ import annotations

import time

from moe_sampler.cli import progress
from moe_sampler.cli.progress import progress_bar


def test_the_pace_is_that_of_the_work_without_the_loading_before(monkeypatch, capsys):
    now = time.mktime((2026, 5, 1, 23, 0, 0, 0, 0, -1))
    monkeypatch.setattr(progress.time, "time", lambda: now)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress_bar("pictures") as told:
        for seconds, done in ((0, 0), (600, 4), (31, 8), (5, 12), (3564, 408), (3600, 1000)):
            now += seconds
            told(done, 1000)
    assert capsys.readouterr().err.splitlines() == [
        "4 of 1000 pictures",
        "8 of 1000 pictures, 7.8 seconds each, until 02 May, 01:18",
        "408 of 1000 pictures, 8.9 seconds each, until 01:37",
    ]


def test_a_quiet_command_says_nothing(capsys):
    with progress_bar("pictures", shown=False) as told:
        told(1, 2)
    assert capsys.readouterr().err == ""
