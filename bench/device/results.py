"""What a part found, in a file that is whole at every moment and renewed with every finding."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

__all__ = ["DEVICE_LOST", "HUNG", "DeviceLost", "Results", "Row", "read", "write_whole"]

Row = dict[str, Any]
DEVICE_LOST, HUNG = 3, 4
"""Exit codes of a part's process that cannot go on, while a new one can."""


class DeviceLost(RuntimeError):
    """CUDA answers no more in this process."""


def write_whole(path: Path, text: str) -> None:
    """Put a file in its place at once: a reader finds the old one or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def read(folder: Path, part: str) -> dict[str, Any]:
    """What a part has found so far; empty before it began."""
    path = folder / f"{part}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


class Results:
    """One part's findings.

    Args:
        folder: where `<part>.json` lies.
        part: its name.
        until: when the part's time is over, in seconds since the epoch, which all processes share. Attempts
            that would begin later are noted as not reached.
        rehearsal: whether everything is toy-sized, on a CPU.
        resume: go on behind what an earlier process of this part has attempted; else begin anew.
    """

    def __init__(
        self, folder: Path, part: str, until: float, *, rehearsal: bool, resume: bool = False
    ) -> None:
        self.folder, self.rehearsal, self._until = folder, rehearsal, until
        self._path = folder / f"{part}.json"
        self._found = read(folder, part) if resume else {}
        if not self._found:
            self._found = {
                "part": part,
                "rehearsal": rehearsal,
                "status": "running",
                "seconds": 0.0,
                "current": None,
                "attempted": [],
                "tables": {},
                "failures": {},
                "not_reached": [],
            }
        self._before = self._found["seconds"]
        self._start = time.monotonic()
        if self._found["current"] is not None:
            self._fail(self._found["current"], "The process ended here: killed, hung or crashed.")
        self.write()

    def write(self) -> None:
        self._found["seconds"] = round(self._before + time.monotonic() - self._start, 1)
        write_whole(self._path, json.dumps(self._found, indent=1) + "\n")

    def left(self) -> float:
        """Seconds until the part's time is over; negative after that."""
        return self._until - time.time()

    def replace(self, table: str, rows: list[Row]) -> None:
        """Renew a whole table that grows while it is measured."""
        self._found["tables"][table] = rows
        self.write()

    def attempt(self, label: str, work: Callable[[], Iterable[tuple[str, Row]]], limit: float = 60.0) -> None:
        """Note the rows (table, row) that `work` finds, or how it failed.

        limit: seconds after which the process counts as hung and ends, to be begun anew behind this attempt.

        Raises:
            DeviceLost: it failed in a way after which CUDA answers no more.
        """
        if label in self._found["attempted"]:
            return
        if self.left() <= 0:
            self._found["not_reached"].append(label)
            return
        self._found["current"] = label
        self.write()
        watch = threading.Timer(max(limit, 600 * self.rehearsal), os._exit, [HUNG])
        watch.daemon = True
        watch.start()
        try:
            for table, row in work():
                self._found["tables"].setdefault(table, []).append(row)
        except Exception:
            self._fail(label, traceback.format_exc())
            self._check_device()
        else:
            self._found["attempted"].append(label)
            self._found["current"] = None
        finally:
            watch.cancel()
            self.write()

    def finish(self) -> str:
        """Note that nothing is left to do; the part's status."""
        status = "failed" if self._found["failures"] else "done"
        self._found["status"] = "cut off" if self._found["not_reached"] and status == "done" else status
        self.write()
        return self._found["status"]

    def _fail(self, label: str, text: str) -> None:
        self._found["failures"][label] = text
        self._found["attempted"].append(label)
        self._found["current"] = None

    def _check_device(self) -> None:
        gc.collect()  # the traceback held what had filled the memory
        if not torch.cuda.is_initialized():
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(str(error)) from error
