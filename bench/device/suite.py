"""The `gpu`-marked tests in several processes that share one card, with a JUnit file that is always whole."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.device.results import Results, Row, write_whole
from bench.device.schedule import ROOT

__all__ = ["gpu_files", "junit", "measure"]

_MARK = "mark.gpu"
_REHEARSED = ("tests/kernels/test_cuda.py",)
_PROCESSES = 14


def gpu_files() -> list[str]:
    """The test files that hold `gpu`-marked tests, or whose folder's fixtures are marked so."""
    found = []
    for folder in sorted({path.parent for path in (ROOT / "tests").rglob("test_*.py")}):
        conftest = folder / "conftest.py"
        shared = conftest.exists() and _MARK in conftest.read_text(encoding="utf-8")
        for path in sorted(folder.glob("test_*.py")):
            text = path.read_text(encoding="utf-8")
            if _MARK in text or (shared and "body" in text):
                found.append(str(path.relative_to(ROOT)))
    return found


def measure(results: Results) -> None:
    if importlib.util.find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed here: carry its wheels along (docs/GPU.md)")
    files = _REHEARSED if results.rehearsal else gpu_files()
    # A file that takes long is begun first, so that no process works on it alone at the end.
    files = sorted(files, key=lambda name: -(ROOT / name).stat().st_size)
    count = 2 if results.rehearsal else max(1, min(_PROCESSES, (os.cpu_count() or 2) - 1))
    results.attempt("tests", lambda: _run(results, files, count), limit=results.left() + 60)


def _run(results: Results, files: Sequence[str], count: int) -> Iterator[tuple[str, Row]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = []
        for i in range(count):
            command = [
                sys.executable,
                "-P",
                str(Path(__file__).with_name("shard.py")),
                name,
                f"shard{i}",
                *files,
            ]
            with (folder / f"shard{i}.log").open("w") as log:
                shards.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
                )
        while any(shard.poll() is None for shard in shards) and results.left() > 2:
            _note(results, _outcomes(folder)[0])
            time.sleep(1)
        ended = [shard.poll() is not None for shard in shards]
        for shard in shards:
            shard.kill()
            shard.wait()
        found, collected = _outcomes(folder)
        _note(results, found)
        counts = Counter(test["outcome"] for test in found)
        yield (
            "tests",
            {"processes": count, "collected": collected, "not_reached": collected - len(found)}
            | {outcome: counts[outcome] for outcome in ("passed", "failed", "error", "skipped")},
        )
        broken = [
            (folder / f"shard{i}.log").read_text(errors="replace")[-3000:]
            for i, shard in enumerate(shards)
            if ended[i] and shard.returncode != 0
        ]
        if broken:
            raise RuntimeError(f"{len(broken)} of {count} processes broke:\n{broken[0]}")
        if counts["failed"] + counts["error"]:
            raise AssertionError(f"{counts['failed']} tests failed, {counts['error']} broke: see tests.xml")
        if collected > len(found):
            raise TimeoutError(f"{collected - len(found)} of {collected} tests not reached in time")
        if not counts["skipped" if results.rehearsal else "passed"]:
            raise AssertionError(f"none of {collected} tests ran: tests.xml says why they were skipped")


def _outcomes(folder: Path) -> tuple[list[Row], int]:
    """(every test that ended, how many there are)"""
    found, collected = {}, 0
    for path in sorted(folder.glob("shard*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):
                continue  # half written
            entry = json.loads(line)
            collected = max(collected, entry.get("collected", 0))
            if "id" in entry:
                found[entry["id"]] = entry  # a file that cannot be imported is found by every process
    return list(found.values()), collected


def _note(results: Results, found: Sequence[Row]) -> None:
    write_whole(results.folder / "tests.xml", junit(found))
    slow = sorted(found, key=lambda test: -test["seconds"])[:10]
    results.replace("slowest", [{"test": test["id"], "seconds": test["seconds"]} for test in slow])
    bad = [test for test in found if test["outcome"] in ("failed", "error")]
    results.replace("failed", [{"test": test["id"], "text": test["text"][-1500:]} for test in bad[:40]])


def junit(found: Sequence[Row]) -> str:
    """A JUnit file: tests as {"id", "outcome", "seconds", "text"}."""
    counts = Counter(test["outcome"] for test in found)
    totals = {
        "tests": str(len(found)),
        "failures": str(counts["failed"]),
        "errors": str(counts["error"]),
        "skipped": str(counts["skipped"]),
        "time": f"{sum(test['seconds'] for test in found):.3f}",
    }
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(root, "testsuite", {"name": "gpu", **totals})
    tags = {"failed": "failure", "error": "error", "skipped": "skipped"}
    for test in found:
        file, _, name = test["id"].partition("::")
        attributes = {"classname": file, "name": name or file, "time": f"{test['seconds']:.3f}"}
        case = ElementTree.SubElement(suite, "testcase", attributes)
        if test["outcome"] in tags:
            lines = test["text"].strip().splitlines() or [""]
            node = ElementTree.SubElement(case, tags[test["outcome"]], {"message": _printable(lines[-1])})
            node.text = _printable(test["text"])
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _printable(text: str) -> str:
    """Without the control characters, such as a terminal's colours, that XML has no place for."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
