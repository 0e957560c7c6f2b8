"""Would the tests notice? Small faults are planted in the source, one at a time, and the tests run on each:

    python -m bench.mutants moe_sampler/sampling --sample 80 --seed 0
    python -m bench.mutants moe_sampler/sampling --only 212 977     # these again, now that there is a test

The faults are mutmut's (`pip install mutmut`): + becomes -, < becomes <=, a number grows by 1, an argument is
left out, a string is another one. They reach the constants of modules and decorated functions, too, which
mutmut's own runner leaves alone. What isn't planted: annotations, docstrings and the wording of errors.

First the tests run as they are, to see which lines each of them executes. Then every mutant gets a process of
its own, forked after torch and the other libraries were imported, over a copy of the checkout. It runs the
tests that execute the mutated line, the quickest first, up to the first that fails. A mutant is *killed* if a
test fails or takes far too long, *survived* if all pass, *unreached* if no test executes its line.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.faults import Mutant, chosen_of, mutants_of

ROOT = Path(__file__).parents[1]
OURS = ("moe_sampler", "bench", "tests", "conftest", "__main__", "__mp_main__")
LEFT_OUT = shutil.ignore_patterns(".git", "__pycache__", "*.egg-info", ".*_cache", "runs", "_build", ".venv")
KILLED, SURVIVED, UNREACHED = "killed", "survived", "unreached"
_PATIENCE = 60  # seconds, where a machine has more to do
_fork = multiprocessing.get_context("fork")


@dataclass
class Baseline:
    """What the tests do on the source as it is."""

    passed: bool = False
    tests: dict[str, dict[int, set[str]]] = field(default_factory=dict)
    """By file and line, who executes it: tests, files or classes of tests by their fixtures, and "" where it
    ran outside of them."""
    seconds: dict[str, float] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)

    def tests_of(self, mutant: Mutant) -> list[str]:
        """The tests that may notice a mutant, the quickest first."""
        by_line = self.tests.get(mutant.path, {})
        found = set().union(*(by_line.get(line, ()) for line in mutant.lines))
        if found and (mutant.at_import or "" in found):
            found = set().union(*by_line.values())
        # A fixture of a file is every test's there.
        names = found - {""}
        tests = [t for t in self.seconds if any(t == n or t.startswith(f"{n}::") for n in names)]
        return sorted(tests, key=self.seconds.__getitem__)


class Watch:
    """pytest plugin: tells `coverage` which test is running, and keeps the times."""

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.current = nodeid
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logfinish(self) -> None:
        self.coverage.switch_context("")

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration

    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> None:
        # What several tests share is made by whichever comes first.
        of_one = fixturedef.scope == "function"
        self.coverage.switch_context(self.current if of_one else request.node.nodeid)

    def pytest_fixture_post_finalizer(self) -> None:
        self.coverage.switch_context(self.current)

    def pytest_runtest_call(self) -> None:
        self.coverage.switch_context(self.current)


class Chosen:
    """pytest plugin: runs these tests alone, in this order, and ends the process in one that hangs."""

    def __init__(self, tests: Sequence[str], baseline: Baseline) -> None:
        self.order = {test: index for index, test in enumerate(tests)}
        self.seconds = baseline.seconds

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        signal.alarm(_PATIENCE + 10 * math.ceil(self.seconds.get(nodeid, 0.0)))

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        found = [item for item in items if item.nodeid in self.order]
        if len(found) == len(self.order):  # else the fault changed their names, and all of their files run
            items[:] = sorted(found, key=lambda item: self.order[item.nodeid])


@contextlib.contextmanager
def copied_checkout() -> Iterator[Path]:
    """A copy of the checkout; in `site` beside it, the package as one folder under its name."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder).resolve() / "checkout"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=LEFT_OUT)
        for name in ("kernels", "tinyflux"):
            (copy / "moe_sampler" / name).symlink_to(f"../{name}")
        site = copy.parent / "site"
        site.mkdir()
        (site / "moe_sampler").symlink_to("../checkout/moe_sampler")
        yield copy


def _enter(copy: Path) -> None:
    """Make this process one that knows the copy instead of the checkout, and prints nothing."""
    os.setsid()  # with all that its tests start
    os.chdir(copy)
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS[:4]]:
        del sys.modules[name]
    site = str(copy.parent / "site")
    sys.path[:] = [site, *(path for path in sys.path if path not in ("", str(ROOT)))]
    os.environ["PYTHONPATH"] = site  # of processes that tests start
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)


def _pytest(arguments: Sequence[str], plugin: object) -> int:
    import pytest

    return int(pytest.main(["-q", "-p", "no:cacheprovider", "-W", "ignore", *arguments], plugins=[plugin]))


def _watch_tests(copy: Path, tests: Sequence[str], pipe: Any) -> None:
    import coverage  # pyright: ignore[reportMissingImports] - comes with mutmut, too

    _enter(copy)
    measured = coverage.Coverage(data_file=None, config_file=False, source=[str(copy)], messages=False)
    watch = Watch(measured)
    measured.start()
    code = _pytest(tests, watch)
    measured.stop()
    data = measured.get_data()
    lines = {
        Path(file).resolve().relative_to(copy).as_posix(): {
            line: set(names) for line, names in data.contexts_by_lineno(file).items()
        }
        for file in data.measured_files()
    }
    modules = [name for name in sys.modules if name.partition(".")[0] not in OURS]
    pipe.send((code == 0, lines, dict(watch.seconds), modules))
    os._exit(0)


def watch_tests(copy: Path, tests: Sequence[str]) -> Baseline:
    """Run the tests on the copy as it is; afterwards the libraries they import are imported here, too."""
    receiver, sender = _fork.Pipe(duplex=False)
    process = _fork.Process(target=_watch_tests, args=(copy, tests, sender))
    process.start()
    sender.close()
    baseline = Baseline(*receiver.recv())
    process.join()
    sys.path[:] = [path for path in sys.path if path not in ("", str(ROOT))]
    for name in baseline.modules:
        with contextlib.suppress(Exception), contextlib.redirect_stderr(None):
            importlib.import_module(name)
    gc.freeze()  # what every fork shares
    return baseline


def _run_chosen(copy: Path, tests: Sequence[str], baseline: Baseline) -> None:
    _enter(copy)
    signal.alarm(2 * _PATIENCE)
    sys.dont_write_bytecode = True  # a mutant's would outlive it
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os._exit(_pytest(["-x", *sorted({test.partition("::")[0] for test in tests})], Chosen(tests, baseline)))


def verdict(copy: Path, tests: Sequence[str], baseline: Baseline) -> str:
    """Whether tests of the copy fail, in a process of their own."""
    process = _fork.Process(target=_run_chosen, args=(copy, tests, baseline))
    process.start()
    assert process.pid is not None
    process.join()
    found = SURVIVED if process.exitcode == 0 else KILLED
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what its tests started
    return found


def verdict_on(mutant: Mutant, copy: Path, baseline: Baseline) -> str:
    """Plant a mutant in the copy, run its tests, take it out again."""
    tests = baseline.tests_of(mutant)
    if not tests:
        return UNREACHED
    file = copy / mutant.path
    kept = file.rename(file.with_suffix(".kept"))  # with its time, by which its bytecode goes
    file.write_text(mutant.source, encoding="utf-8")
    try:
        return verdict(copy, tests, baseline)
    finally:
        kept.replace(file)


# The command


def tests_beside(path: str) -> str:
    """The tests of a file or folder: the folder of the same name."""
    place = Path("tests") / Path(path).with_suffix("").as_posix().removeprefix("moe_sampler/")
    return next(each for each in (place, *place.parents) if (ROOT / each).is_dir()).as_posix()


def summary(verdicts: dict[Mutant, str]) -> str:
    """A line a file and one for all: how many of the mutants were killed."""
    lines = [f"{'':50}{KILLED:>10}{SURVIVED:>10}{UNREACHED:>10}{'score':>8}"]
    for path in (*sorted({mutant.path for mutant in verdicts}), "all"):
        count = Counter(found for mutant, found in verdicts.items() if path in (mutant.path, "all"))
        share = count[KILLED] / count.total()
        numbers = "".join(f"{count[each]:10}" for each in (KILLED, SURVIVED, UNREACHED))
        lines.append(f"{path:50}{numbers}{share:8.0%}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.mutants", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="a file or folder, from the repository's root"
    )
    parser.add_argument("--tests", nargs="+", help="what pytest runs (default: the mirrored folder of tests)")
    parser.add_argument("--sample", type=int, default=80, help="how many mutants (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (%(default)s)")
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="these instead, by number")
    options = parser.parse_args(arguments)
    missing = [path for path in options.paths if not (ROOT / path).exists()]
    if missing:
        parser.error(f"there is no {missing[0]} in {ROOT}")
    mutants = mutants_of(ROOT, options.paths)
    if options.only and not 0 <= min(options.only) <= max(options.only) < len(mutants):
        parser.error(f"mutants are numbered 0 to {len(mutants) - 1}")
    tests = options.tests or sorted({tests_beside(path) for path in options.paths})
    chosen = [mutants[n] for n in options.only or ()] or chosen_of(mutants, options.sample, options.seed)
    print(f"{len(chosen)} of {len(mutants)} mutants; tests: {' '.join(tests)}", flush=True)
    verdicts: dict[Mutant, str] = {}
    started = time.monotonic()
    with copied_checkout() as copy:
        baseline = watch_tests(copy, tests)
        if not baseline.passed:
            parser.exit(1, "the tests fail without any mutant: mend them first\n")
        few = sorted(baseline.seconds, key=baseline.seconds.__getitem__)[:20]
        if verdict(copy, few, baseline) != SURVIVED:
            parser.exit(1, "some tests fail when they run alone: mend them first\n")
        print(f"{len(baseline.seconds)} tests pass in {time.monotonic() - started:.0f} s", flush=True)
        for mutant in chosen:
            verdicts[mutant] = verdict_on(mutant, copy, baseline)
            if verdicts[mutant] != KILLED:
                print(f"\n{verdicts[mutant]}: {mutant}", flush=True)
    print(f"\n{summary(verdicts)}\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
