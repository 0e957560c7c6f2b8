"""Prove it on a GPU, in minutes:

    python -m bench.device OUT --minutes 9      # every part, on CUDA
    python -m bench.device OUT --only kernels   # one of them
    python -m bench.device OUT --rehearse       # every part's code, toy-sized, on a CPU
    python -m bench.device --page OUT           # docs/GPU.md's tables from OUT

Each part writes what it finds to OUT as it finds it, so that a run cut off anywhere loses nothing. The exit
code is 0 if every part is done, 1 if something failed or the time ran out.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from bench.device import PARTS, page
from bench.device.schedule import run_parts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.device", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default 9)")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on a CPU")
    parser.add_argument(
        "--page", type=Path, metavar="OUT", help="write docs/GPU.md's tables from this folder"
    )
    return parser


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.page is not None:
        if options.out is not None or options.only or options.rehearse:
            parser.error("--page takes its folder and nothing else")
        try:
            page.write(options.page)
        except ValueError as error:
            parser.error(str(error))
        return
    if options.out is None:
        parser.error("give the folder for the results: python -m bench.device OUT")
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive, got {options.minutes:g}")
    if not options.rehearse:
        import torch

        if not torch.cuda.is_available():
            parser.error("torch sees no CUDA device here; --rehearse runs everything toy-sized on a CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _stop)
    parts = [part for part in PARTS if options.only is None or part in options.only]
    folder, seconds = options.out.resolve(), 60 * options.minutes
    statuses = run_parts(parts, folder, seconds, rehearsal=options.rehearse)
    print(", ".join(f"{part} {status}" for part, status in statuses.items()))
    sys.exit(any(status != "done" for status in statuses.values()))


if __name__ == "__main__":
    main()
