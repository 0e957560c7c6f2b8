"""The process of one part: `python -m bench.device.part NAME OUT UNTIL [--rehearse] [--resume]`.

A process of its own, so that whatever a part does to its device ends with it, and can be ended.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from bench.device import PARTS
from bench.device.results import DEVICE_LOST, DeviceLost, Results

MODULES = {"card": "card", "tests": "suite", "kernels": "launches", "pipelines": "images", "student": "steps"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("until", type=float, help="seconds since the epoch")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    results = Results(
        options.folder,
        options.part,
        options.until,
        rehearsal=options.rehearse,
        resume=options.resume,
    )
    try:
        importlib.import_module(f"bench.device.{MODULES[options.part]}").measure(results)
    except DeviceLost as error:
        print(f"{options.part}: {error}", file=sys.stderr)
        sys.exit(DEVICE_LOST)
    sys.exit(results.finish() == "failed")


if __name__ == "__main__":
    main()
