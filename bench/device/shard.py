"""One of several pytest processes that share a list of tests: each takes the next few that nobody has taken.

    python -P bench/device/shard.py FOLDER NAME FILE ... -- the gpu-marked tests of the files

writes FOLDER/NAME.jsonl, a line a test as it ends, beginning with {"collected": N}. Run as a script and
without the repository's root on the path, where `kernels` is another package.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_TOGETHER = 6  # neighbours share fixtures and compiled kernels


class Shard:
    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._log = (folder / f"{name}.jsonl").open("w", encoding="utf-8")
        self._reports: dict[str, dict] = {}

    def _write(self, line: dict) -> None:
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()

    def _taken(self, items: list[pytest.Item]) -> Iterator[pytest.Item]:
        for start in range(0, len(items), _TOGETHER):
            try:
                (self._folder / f"taken-{start}").touch(exist_ok=False)
            except FileExistsError:
                continue
            yield from items[start : start + _TOGETHER]

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self._write({"collected": len(session.items)})
        mine = self._taken(session.items)
        item = next(mine, None)
        while item is not None:
            following = next(mine, None)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            item = following
        return True

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(
                {"id": report.nodeid, "outcome": "error", "seconds": 0.0, "text": report.longreprtext}
            )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The worst outcome of a test's three phases; before and after the call a failure is an error."""
        found = self._reports.setdefault(
            report.nodeid, {"id": report.nodeid, "outcome": "passed", "seconds": 0.0, "text": ""}
        )
        found["seconds"] = round(found["seconds"] + report.duration, 4)
        if report.failed:
            found["outcome"] = "failed" if report.when == "call" else "error"
        elif report.skipped and found["outcome"] == "passed":
            found["outcome"] = "skipped"
        if not report.passed:
            found["text"] += report.longreprtext
        if report.failed and report.capstderr:
            found["text"] += f"\n{report.capstderr[-4000:]}"  # of the processes that a test begins, too
        if report.when == "teardown":
            self._write(self._reports.pop(report.nodeid))


def main() -> None:
    folder, name, *files = sys.argv[1:]
    options = ["-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
    code = pytest.main([*options, *files], plugins=[Shard(Path(folder), name)])
    # Failed tests are in the file; what else there may be is for whoever started this.
    sys.exit(code in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR))


if __name__ == "__main__":
    main()
