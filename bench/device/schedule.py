"""Parts one after the other, each in a process of its own, within the time that all of them have."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.device import PARTS
from bench.device.results import DEVICE_LOST, HUNG, read, write_whole

__all__ = ["run_parts"]

ROOT = Path(__file__).parents[2]
_SPARE = 3.0  # seconds: a part's for its last words, and in the end this process's for its own


def run_parts(parts: Sequence[str], folder: Path, seconds: float, *, rehearsal: bool) -> dict[str, str]:
    """Every part's status: done, failed (something in it failed), or cut off (its time ran out)."""
    end, statuses = time.time() + seconds - _SPARE, {}
    for i, part in enumerate(parts):
        left = end - time.time()
        share = PARTS[part] / sum(PARTS[later] for later in parts[i:])
        print(f"{part}: {left * share:.0f} s", flush=True)
        statuses[part] = _run(part, folder, left * share, rehearsal)
        print(f"{part}: {_summary(folder, part)}", flush=True)
    return statuses


def _run(part: str, folder: Path, seconds: float, rehearsal: bool) -> str:
    """One part, begun anew behind what ended its process as long as it gets further."""
    (folder / f"{part}.json").unlink(missing_ok=True)
    end, attempted, resume = time.time() + seconds, -1, False
    while True:
        code, output = _process(part, folder, end, rehearsal, resume)
        found = read(folder, part)
        if found.get("status") in ("done", "failed", "cut off") and code in (0, 1):
            return found["status"]
        count = len(found.get("attempted", ())) + (found.get("current") is not None)
        again = code in (DEVICE_LOST, HUNG) or (code is not None and code < 0)
        if not again or count <= attempted or time.time() > end:
            return _note(folder, part, found, "cut off" if code is None else "failed", code, output)
        attempted, resume = count, True


def _process(part: str, folder: Path, end: float, rehearsal: bool, resume: bool) -> tuple[int | None, str]:
    """(exit code, or None if the time ran out; the end of what it said)"""
    command = [sys.executable, "-m", "bench.device.part", part, str(folder), f"{end - _SPARE:.1f}"]
    command += ["--rehearse"] * rehearsal + ["--resume"] * resume
    environment = dict(os.environ)
    if rehearsal:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        if part == "kernels":
            environment["TRITON_INTERPRET"] = "1"  # the kernels themselves, on a CPU
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            code = process.wait(max(end - time.time(), 0.1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Whatever it started goes with it, also when this process is told to end.
            _kill(process.pid)
            process.wait()
        output.seek(0)
        return code, output.read()[-6000:]


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _note(folder: Path, part: str, found: dict[str, Any], status: str, code: int | None, output: str) -> str:
    """Write what the process itself could not."""
    found = {"part": part, "tables": {}, "failures": {}, "not_reached": []} | found | {"status": status}
    if status == "cut off":
        found["not_reached"].append(found.get("current") or "the end")
    else:
        found["failures"][found.get("current") or "the process"] = f"exit code {code}\n{output}"
    found["current"] = None
    write_whole(folder / f"{part}.json", json.dumps(found, indent=1) + "\n")
    return status


def _summary(folder: Path, part: str) -> str:
    found = read(folder, part)
    rows = sum(len(rows) for rows in found["tables"].values())
    parts = [f"{found['status']}, {rows} rows in {found.get('seconds', 0)} s"]
    if found["not_reached"]:
        parts.append(f"not reached: {', '.join(found['not_reached'])}")
    parts += [f"FAILED {label}: {text.strip().splitlines()[-1]}" for label, text in found["failures"].items()]
    return "\n    ".join(parts)
