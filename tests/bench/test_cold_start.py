"""The bench of cold starts, without one."""

from __future__ import annotations

import pytest

from bench import cold_start, pages

LINES = """
import time: self [us] | cumulative | imported package
a progress bar import time:       100 |        100 |   typer.core
import time:        50 |        150 | moe_sampler.cli
import time:      1000 |       1000 |       torch._C
import time:      2000 |       3000 |     torch
import time:       300 |        300 |         sympy
import time:        20 |         20 |         torch.distributed.fsdp
import time:       500 |        820 |       torch._dynamo
import time:       400 |       1220 |     diffusers.utils
import time:         7 |          7 |     torch.fx
import time:        10 |       1230 | moe_sampler.pipelines.hybrid
import time:         5 |          5 | shutil
""".splitlines()


def test_imports_are_put_down_to_a_package_or_whoever_imported_them():
    found = {name: round(seconds * 1e6) for name, seconds in cold_start.import_seconds(LINES).items()}
    expected = {"torch": 3007, "torch._dynamo": 820, "diffusers": 400, "typer": 100, "moe_sampler": 60}
    assert found == expected | {"others": 5} and list(found) == [*expected, "others"]


def test_commands_take_turns_and_the_page_shows_them(monkeypatch, tmp_path):
    order: list[str] = []
    seconds = iter([(90.0, 90.0), (90.0, 90.0), (4.0, 5.0), (1.0, 1.0), (2.0, 9.0), (3.0, 3.0)])

    def started(arguments):
        order.append(arguments[0])
        return next(seconds)

    monkeypatch.setattr(cold_start, "started", started)
    table = cold_start.rows({"one": ["a"], "two": ["b"]}, turns=2)
    assert order == ["a", "b", "b", "a", "a", "b"]
    taken = [(row["command"], row["cpu_seconds"], row["wall_seconds"]) for row in table]
    assert taken == [("one", "1.50", "5.00"), ("two", "3.50", "4.00")]

    page = tmp_path / "PERFORMANCE.md"
    page.write_text(pages.PERFORMANCE.read_text(encoding="utf-8"), encoding="utf-8")
    pages.renew_page(page, "cold start", cold_start.block(table, {"torch": 3.0, "others": 1.0}))
    text = page.read_text(encoding="utf-8")
    assert "| one | 1.50 | 5.00 |" in text and "| `torch` | 3.00 | 75% |  |" in text


def test_a_command_that_fails_is_no_measurement():
    with pytest.raises(RuntimeError, match="ended with 2"):
        cold_start.started(["--no-such-option-of-python"])


def test_the_script_without_this_package_is_python():
    compile(cold_start.DIFFUSERS, "script", "exec")
