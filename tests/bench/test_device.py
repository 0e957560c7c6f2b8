"""`python -m bench.device`: every part's code on a CPU, and what becomes of one that fails or is cut off."""

import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import module
from processes import run as run_process

from bench.device import PARTS, launches, models, page, providers, schedule, suite
from bench.device import __main__ as command
from bench.device.compiled import resident_blocks
from bench.device.results import DEVICE_LOST, HUNG, Results, read
from bench.device.twins import FORMULAS
from bench.tolerance import error_and_allowance

ROOT = Path(__file__).parents[2]
FOUND = {
    "card": {"card": 1, "ceilings": 2},
    "tests": {"tests": 1},
    "kernels": {"compiled": 1, "launches": 31, "calls": 15},
    "pipelines": {"unet": 1, "images": 9},
    "student": {"student": 4, "attention statistics": 2, "student training": 2},
}

PARTS_BY_COMMAND = ("card", "tests", "kernels")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """All parts' code at toy sizes: no typing error should cost a minute of a GPU.

    The command rehearses three; the last two run as it would start them, in one that has all imported."""
    folder = tmp_path_factory.mktemp("rehearsed")
    words = [sys.executable, "-m", "bench.device", str(folder), "--rehearse", "--minutes", "20", "--only"]
    done = subprocess.run([*words, *PARTS_BY_COMMAND], cwd=ROOT, capture_output=True, text=True)
    for part in [part for part in PARTS if part not in PARTS_BY_COMMAND]:
        own = [part, str(folder), str(time.time() + 600), "--rehearse"]
        ended = run_process(module, "bench.device.part", own, ROOT, CUDA_VISIBLE_DEVICES="")
        assert ended.codes == [0], ended
    return folder, done


@pytest.mark.parametrize("part", PARTS)
def test_a_rehearsal(part, rehearsed):
    folder, done = rehearsed
    found = read(folder, part)
    assert found["status"] == "done", (done.stdout, done.stderr, found.get("failures"))
    assert found["rehearsal"] and not found["failures"]
    counts = {name: len(rows) for name, rows in found["tables"].items()}
    assert FOUND[part].items() <= counts.items()
    for row in found["tables"].get("images", ()):
        assert row.get("difference", 0.0) < 1e-5
    shown = page.blocks({part: found})
    assert set(shown) == set(page.BLOCKS)


def test_a_rehearsal_leaves_its_results_and_no_page(rehearsed):
    folder, done = rehearsed
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert {path.name for path in folder.iterdir()} == {*(f"{part}.json" for part in PARTS), "tests.xml"}
    with pytest.raises(ValueError, match="holds a rehearsal"):
        page.write(folder)


# Results


def results(folder, **settings):
    return Results(folder, "card", time.time() + settings.pop("seconds", 100.0), rehearsal=True, **settings)


def broken():
    yield "numbers", {"value": 1}
    raise ZeroDivisionError("not today")


def test_what_was_found_before_a_failure_stays(tmp_path):
    found = results(tmp_path)
    found.attempt("first", broken)
    found.attempt("second", lambda: [("numbers", {"value": 2})])
    assert found.finish() == "failed"
    kept = read(tmp_path, "card")
    assert kept["tables"]["numbers"] == [{"value": 1}, {"value": 2}]
    assert "ZeroDivisionError: not today" in kept["failures"]["first"] and kept["attempted"] == [
        "first",
        "second",
    ]


def test_nothing_begins_after_the_deadline(tmp_path):
    found = results(tmp_path, seconds=0.0)
    found.attempt("late", broken)
    assert found.finish() == "cut off" and read(tmp_path, "card")["not_reached"] == ["late"]


def test_a_new_process_goes_on_behind_what_ended_the_last(tmp_path):
    """As if the second attempt had taken its process with it."""
    found = results(tmp_path)
    found.attempt("first", lambda: [("numbers", {"value": 1})])
    kept = read(tmp_path, "card") | {"current": "second"}
    (tmp_path / "card.json").write_text(json.dumps(kept))
    again = results(tmp_path, resume=True)
    for label in ("first", "second", "third"):
        again.attempt(label, lambda: [("numbers", {"value": 3})])
    assert again.finish() == "failed"
    kept = read(tmp_path, "card")
    assert kept["tables"]["numbers"] == [{"value": 1}, {"value": 3}] and list(kept["failures"]) == ["second"]


# The schedule

PART = """
import json, os, sys, time
from pathlib import Path
name, folder, until, *flags = sys.argv[1:]
path = Path(folder, "attempts")
path.write_text(path.read_text() + str(len(flags)) if path.exists() else "1")
def note(**found):
    base = {{"part": name, "current": None, "attempted": []}}
    base |= {{"tables": {{}}, "failures": {{}}, "not_reached": []}}
    Path(folder, name + ".json").write_text(json.dumps(base | found))
{body}
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A part whose process does as told."""

    def with_body(body, seconds=30.0, parts=("card",)):
        script = tmp_path / "part.py"
        script.write_text(PART.format(body=body))
        popen = subprocess.Popen

        def started(words, **settings):
            assert words[1:3] == ["-m", "bench.device.part"]
            return popen([words[0], str(script), *words[3:]], **settings)

        monkeypatch.setattr(schedule.subprocess, "Popen", started)
        folder = tmp_path / "out"
        folder.mkdir()
        return schedule.run_parts(parts, folder, seconds, rehearsal=False), folder

    return with_body


def test_a_part_that_raises_is_noted_with_what_it_said(run):
    statuses, folder = run("note(status='running')\nraise ImportError('no such thing')")
    assert statuses == {"card": "failed"}
    assert "ImportError: no such thing" in read(folder, "card")["failures"]["the process"]


@pytest.mark.parametrize("end", [f"sys.exit({DEVICE_LOST})", f"sys.exit({HUNG})", "os.kill(os.getpid(), 11)"])
def test_a_part_that_lost_its_device_goes_on_in_a_new_process(run, end):
    body = f"""
if '--resume' not in flags:
    note(status='running', current='one')
    {end}
note(status='failed', attempted=['one', 'two'], failures={{'one': 'the device was lost'}})
sys.exit(1)"""
    statuses, folder = run(body)
    assert statuses == {"card": "failed"} and read(folder, "card")["attempted"] == ["one", "two"]
    assert (folder / "attempts").read_text() == "11"


def test_a_part_that_gets_no_further_is_not_begun_for_ever(run):
    statuses, folder = run(f"note(status='running', current='one')\nsys.exit({DEVICE_LOST})")
    assert statuses == {"card": "failed"} and len((folder / "attempts").read_text()) == 2
    assert f"exit code {DEVICE_LOST}" in read(folder, "card")["failures"]["one"]


def test_a_part_that_takes_too_long_is_cut_off_and_the_next_begins(run):
    body = """
note(status='running', current='one', tables={'numbers': [{'value': 1}]})
if name == 'card':
    time.sleep(60)
note(status='done')"""
    statuses, folder = run(body, seconds=schedule._SPARE + 6, parts=("card", "student"))
    assert statuses == {"card": "cut off", "student": "done"}
    found = read(folder, "card")
    assert found["tables"]["numbers"] == [{"value": 1}] and found["not_reached"] == ["one"]


# The parts' own pieces


def test_the_files_with_gpu_tests():
    files = suite.gpu_files()
    assert {
        "tests/kernels/test_cuda.py",
        "tests/kernels/test_noise.py",
        "tests/sampling/test_loop.py",
    } <= set(files)
    assert not any("test_aot" in name or "tests/docs" in name for name in files)


def test_junit():
    outcomes = ("passed", "failed", "error", "skipped")
    tests = [
        {
            "id": f"tests/a.py::test[{i}]",
            "outcome": outcome,
            "seconds": 0.5,
            "text": f"why\n\x1b[31m{outcome}",
        }
        for i, outcome in enumerate(outcomes)
    ]
    (whole,) = ElementTree.fromstring(suite.junit(tests))
    assert [whole.get(name) for name in ("tests", "failures", "errors", "skipped", "time")] == [
        *"4111",
        "2.000",
    ]
    assert [[child.tag for child in case] for case in whole] == [[], ["failure"], ["error"], ["skipped"]]
    assert whole[1][0].get("message") == "?[31mfailed" and whole[1].get("classname") == "tests/a.py"


def test_the_rule():
    reference = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eager, result = (reference + 1e-3).half(), reference.half()
    error, allowed = error_and_allowance(result, eager, reference)
    assert error == 0 and allowed == pytest.approx(2 * (eager.double() - reference).abs().max().item() + 1e-6)
    capped = error_and_allowance(reference.float(), eager, reference, cap=1e-6)[1]
    assert capped == pytest.approx(3e-6)
    assert error_and_allowance(result * torch.nan, eager, reference)[0] == float("inf")


class Euler:
    """A launch of x ← x − step_down·velocity in torch, and then of something wrong."""

    kernel = SimpleNamespace(
        __name__="_euler_step_kernel", arg_names=("x_ptr", "velocity_ptr", "step_down", "numel")
    )

    def __init__(self, args, wrong):
        self.args, self.constants, self.wrong = args, {}, wrong

    def run(self, device):
        x, velocity, step_down, _ = self.args
        x.sub_(velocity, alpha=step_down)
        self.wrong(x)


@pytest.mark.parametrize(
    "wrong, verdict",
    [
        (lambda x: None, True),
        (lambda x: x[0, 3].add_(1e-4), False),
        (lambda x: x[1, 7].fill_(torch.nan), False),
    ],
    ids=["right", "a wrong element", "an element left unwritten"],
)
def test_one_wrong_element_is_found(wrong, verdict):
    x, velocity = torch.randn(2, 8), torch.randn(2, 8)
    launch = Euler((x, velocity, 0.1, x.numel()), wrong)
    found = launches.check(launches.Built(launch, (x, velocity), (x,)))
    assert (found["error"] < found["allowed"]) is verdict and found["worst"] == "x"


def test_every_kernel_of_the_cases_has_its_formula():
    kernels = {
        c.make(launches.Tensors("meta"), c.small, c.dtype).launch.kernel.__name__ for c in launches.cases()
    }
    assert kernels == set(FORMULAS)


def test_the_fastest_path_leaves_the_others_as_they_are():
    made = models.Models(models.TOY)

    def state():
        modules = [m for name in ("unet_sol", "unet_lune", "vae") for m in getattr(made.ours, name).modules()]
        layouts = [p.stride() for m in modules for p in m._parameters.values() if p is not None]
        return layouts, [(type(m), type(getattr(m, "processor", None))) for m in modules]

    before = state()
    assert providers._fastest(made).speed != "none" and state() == before


def test_occupancy():
    """By NVIDIA's occupancy calculator: 2048 threads, 65,536 registers, 228 KiB on an H100."""
    assert resident_blocks(32, 0, 4, 90) == 16  # all 64 warps
    assert resident_blocks(64, 0, 4, 90) == 8  # registers
    assert resident_blocks(33, 0, 4, 90) == 12  # 40 registers, as they are given out
    assert resident_blocks(32, 100 * 1024, 4, 90) == 2  # shared memory
    assert resident_blocks(16, 0, 1, 90) == 32  # blocks


# The page


def measured():
    """What a run on a card leaves, in short."""
    base = {"rehearsal": False, "status": "done", "failures": {}, "not_reached": []}
    launch = {"operation": "euler_step_", "variant": "", "dtype": "float16", "us": 3.21, "of_copy": 0.87}
    return {
        "card": base | {"tables": {"card": [{"name": "Toy GPU"}], "ceilings": []}},
        "kernels": base | {"tables": {"launches": [launch]}, "failures": {"a": "Traceback\nValueError: b"}},
        "pipelines": base
        | {
            "tables": {
                "unet": [{"batch": 1, "unet_ms": 20.0}],
                "images": [{"provider": "diffusers", "batch": 1, "images_per_s": 2.5, "host_waits": 0}],
            }
        },
    }


def test_the_page_is_renewed_from_a_folder_and_only_there(tmp_path):
    path, folder = tmp_path / "GPU.md", tmp_path / "out"
    path.write_text(page.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    folder.mkdir()
    for part, found in measured().items():
        (folder / f"{part}.json").write_text(json.dumps(found))
    page.write(folder, path)
    text = path.read_text(encoding="utf-8")
    assert "Measured on Toy GPU: card done, kernels done, pipelines done." in text
    assert "has been measured on a GPU yet" not in text
    assert "| float16 | 3.21 | 87% |" in text and "| diffusers | 1 | 2.50 | 0 | 20.00 |" in text
    assert "- kernels, a: `ValueError: b`" in text
    page.write(folder, path)
    assert path.read_text(encoding="utf-8") == text


def test_the_page_says_that_nothing_was_measured_or_shows_what_was():
    """Whoever writes numbers into it must have run the command."""
    text = page.PAGE.read_text(encoding="utf-8")
    unmeasured = "**Nothing on this page has been measured on a GPU yet.**" in text
    assert unmeasured == (text.count(page.NOTHING) == len(page.BLOCKS) - 1)


def test_the_page_needs_results(tmp_path):
    with pytest.raises(ValueError, match="holds no results"):
        page.write(tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give the folder"),
        (["out", "--page", "other"], "--page takes its folder"),
        (["out", "--minutes", "0", "--rehearse"], "--minutes must be positive"),
        (["out", "--only", "speed"], "invalid choice: 'speed'"),
    ],
)
def test_refusals(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what to do where there is no CUDA device")
def test_without_a_gpu_it_says_what_can_be_done(capsys, tmp_path):
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "out")])
    assert "--rehearse" in capsys.readouterr().err and not (tmp_path / "out").exists()
