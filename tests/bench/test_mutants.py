"""Planted faults: which there are, and what is said of those that are noticed, missed and never run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mutmut", reason="whose faults are planted; no extra brings it")

from bench import faults, mutants

PART = '''"""Part 1 of 1."""

__all__ = ["over"]
LIMIT = 3


def over(x: "int") -> bool:
    """Never 7."""
    if x < 0:
        raise ValueError("not below 0" + f"{x + 1}")
    return x > LIMIT


def twice(x):
    return x * 2


def unused(x):
    return x + 1
'''
TESTS = """import pytest

from moe_sampler.part import over, twice


@pytest.fixture(scope="module")
def doubled():
    return twice(3)


def test_over():
    assert over(4) and not over(3)


def test_twice(doubled):
    assert doubled == 6
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    for folder in ("moe_sampler", "kernels", "tinyflux", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "moe_sampler" / "__init__.py").write_text("")
    (tmp_path / "moe_sampler" / "part.py").write_text(PART)
    (tmp_path / "tests" / "test_part.py").write_text(TESTS)
    return tmp_path


def change(mutant) -> str:
    """The line a fault makes."""
    return str(mutant).splitlines()[-1].strip(" +")


def test_what_is_planted(checkout):
    found = faults.mutants_of(checkout, ["moe_sampler"])
    changes = {change(mutant) for mutant in found}
    assert {"LIMIT = 4", "if x <= 0:", "return x >= LIMIT", "return x - 1", "return x + 2"} <= changes
    assert not any(word in line for line in changes for word in ("raise", "__all__", '"""', "int"))
    assert [mutant.number for mutant in found] == list(range(len(found)))
    assert {mutant.at_import for mutant in found if "LIMIT =" in change(mutant)} == {True}
    assert all(mutant.compiles and mutant.source != PART for mutant in found)


def test_a_seed_draws_the_same_faults_in_the_sources_order(checkout):
    found = faults.mutants_of(checkout, ["moe_sampler/part.py"])
    drawn = [[m.number for m in faults.chosen_of(found, 4, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] == sorted(drawn[0]) != drawn[2]
    assert len(faults.chosen_of(found, 10_000, 0)) == len(found)


def test_a_fault_that_hangs_is_noticed(checkout, monkeypatch):
    monkeypatch.setattr(mutants, "ROOT", checkout)
    monkeypatch.setattr(mutants, "_PATIENCE", 2)
    (checkout / "tests" / "test_part.py").write_text(
        "def test_that_never_ends():\n    while True:\n        pass\n"
    )
    baseline = mutants.Baseline()
    with mutants.copied_checkout() as copy:
        test = "tests/test_part.py::test_that_never_ends"
        assert mutants.verdict(copy, [test], baseline) == mutants.KILLED


def test_tests_are_those_beside_the_source():
    assert mutants.tests_beside("moe_sampler/sampling") == "tests/sampling"
    assert mutants.tests_beside("moe_sampler/pipelines/offload.py") == "tests/pipelines"
    assert mutants.tests_beside("tinyflux/training") == "tests/tinyflux/training"
    assert mutants.tests_beside("kernels/rotary.py") == "tests/kernels"


def test_what_is_said_of_each(checkout):
    survive, unseen = ["if x <= 0:", "if x < 1:"], ["return x - 1", "return x + 2"]
    planted = ["LIMIT = 4", "return x >= LIMIT", "return x * 3", *survive, *unseen]
    numbers = {change(mutant): str(mutant.number) for mutant in faults.mutants_of(checkout, ["moe_sampler"])}
    typed = ["moe_sampler", "--tests", "tests", "--only", *(numbers[line] for line in planted)]
    code = f"from pathlib import Path; from bench import mutants; mutants.ROOT = Path({str(checkout)!r})"
    ran = subprocess.run(
        [sys.executable, "-c", f"{code}; mutants.main({typed!r})"],
        cwd=Path(mutants.__file__).parents[1],
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    said = [part.strip().splitlines() for part in ran.stdout.split("\n\n")]
    for word, lines in (("survived", survive), ("unreached", unseen)):
        found = [part for part in said if part[0].startswith(f"{word}: ")]
        assert [part[-1].strip(" +") for part in found] == lines
        assert [part[0].split()[1] for part in found] == [numbers[line] for line in lines]
    assert said[-1][-2].split() == ["all", "3", "2", "2", "43%"]
    assert (checkout / "moe_sampler" / "part.py").read_text() == PART
