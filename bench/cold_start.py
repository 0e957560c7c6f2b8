"""A first picture, and a plan, from a process that starts cold: seconds until the command is done.

`python -m bench.cold_start` starts every command several times, the providers taking turns, writes
bench/results/cold_start.csv and renews docs/PERFORMANCE.md. Processor time counts, because it is what a start
costs whatever else the machine does; a first start of each, which fills Python's and the disk's caches,
doesn't. Beside them: the script that one would write without this package, and what it takes to import torch
and the classes of which a pipeline is made, below which nothing can come that uses them.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence

from bench.measure import environment, in_turn
from bench.pages import PERFORMANCE, renew_page
from bench.report import RESULTS, markdown, write_csv
from moe_sampler.demo import experts_path

STEPS, PROMPT, TURNS = 10, "a castle with two towers, at dusk", 5
DIFFUSERS = f"""
from pathlib import Path
import torch
from diffusers import AutoencoderTiny, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
folder = Path({str(experts_path())!r})
unet = UNet2DConditionModel.from_pretrained(folder / "unet_sol")
vae = AutoencoderTiny.from_pretrained(folder / "vae")
text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
scheduler = DDPMScheduler.from_pretrained(folder / "scheduler_sol")
pipe = StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, None, None, None, False)
image = pipe({PROMPT!r}, num_inference_steps={STEPS}, generator=torch.Generator().manual_seed(0)).images[0]
image.save("picture.png")
"""
CLASSES = "from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel\n"
CLASSES += "from transformers import CLIPTextModel, CLIPTokenizer"
GENERATE = ["-m", "moe_sampler", "generate", PROMPT, "-o", "picture.png", f"--steps={STEPS}", "--seed=0"]
COMMANDS: dict[str, list[str]] = {
    "moe-sampler generate": GENERATE,
    "a script with diffusers": ["-c", DIFFUSERS],
    "only imports of that script": ["-c", CLASSES],
    "only import torch": ["-c", "import torch"],
    "moe-sampler plan": ["-m", "moe_sampler", "plan", f"--steps={STEPS}"],
}
"""By name, what Python is started with."""
CACHING = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""An environment in which Python keeps what it compiled, as it does unless told otherwise."""
CAUSES = {
    "moe_sampler": "with NumPy and Pillow",
    "typer": "the command line, with rich and pydantic",
    "torch": "",
    "torch._dynamo": "a stand-in, for one decorator in diffusers.utils",
    "diffusers": "all of its models, whichever is asked for",
    "transformers": "the text encoder's base class, and a list of all models",
    "peft": "by diffusers' hooks, where it is installed",
    "scipy": "by diffusers' schedulers and transformers' losses, where it is installed",
    "accelerate": "by diffusers",
    "huggingface_hub": "by diffusers, with its clients for HTTP",
}
"""Packages that imports are put down to, and why they are imported."""
LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \| (\s*)(\S+)\s*$")


def started(arguments: Sequence[str]) -> tuple[float, float]:
    """Seconds of processor (user and system) and of the clock that Python with these arguments takes.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=CACHING,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime, wall


def rows(commands: Mapping[str, Sequence[str]], turns: int) -> list[dict[str, object]]:
    """One row a command: medians over the turns, in each of which every command is started once."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for turn, name in in_turn(list(commands), turns + 1):
        took = started(commands[name])
        if turn:
            taken[name].append(took)
    found = []
    for name, each in taken.items():
        cpu, wall = (statistics.median(seconds) for seconds in zip(*each, strict=True))
        row = {"command": name, "cpu_seconds": f"{cpu:.2f}", "wall_seconds": f"{wall:.2f}"}
        found.append({**row, "turns": turns, **environment()})
    return found


def import_seconds(lines: Iterable[str]) -> dict[str, float]:
    """Seconds of imports by what in `CAUSES` they are put down to, the longest first: a module's package, or
    else what imported it first.

    lines: of `python -X importtime`, where a module comes after those it imported, which are indented more.
    """
    modules = [
        (int(match[1]), len(match[2]), match[3]) for line in lines if (match := LINE.search(line)) is not None
    ]
    found: dict[str, float] = {}
    importers: list[tuple[int, str]] = []
    for microseconds, depth, name in reversed(modules):
        while importers and importers[-1][0] >= depth:
            importers.pop()
        by = importers[-1][1] if importers else "others"
        named = [each for each in CAUSES if f"{name}.".startswith(f"{each}.")]
        cause = named[-1] if named else by  # of torch and torch._dynamo the latter, which comes later
        if by.startswith(f"{cause}."):  # torch.fx for torch._dynamo
            cause = by
        importers.append((depth, cause))
        found[cause] = found.get(cause, 0) + microseconds / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def imports() -> dict[str, float]:
    """`import_seconds` of `moe-sampler generate`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-X", "importtime", *GENERATE]
        done = subprocess.run(
            command, cwd=folder, env=CACHING, check=True, capture_output=True, text=True, errors="replace"
        )
    return import_seconds(done.stderr.splitlines())


def block(table: Sequence[dict[str, object]], seconds: Mapping[str, float]) -> str:
    """What docs/PERFORMANCE.md shows."""
    row = table[0]
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "diffusers", "numpy"))
    whole = sum(seconds.values())
    parts = [
        {"imported": f"`{name}`" if name in CAUSES else name, "why": CAUSES.get(name, "")}
        | {"seconds": f"{took:.2f}", "share": f"{took / whole:.0%}"}
        for name, took in seconds.items()
    ]
    return "\n\n".join(
        [
            f"{row['machine']}, {versions}; medians of {row['turns']} starts.",
            markdown(table, ["command", "cpu_seconds", "wall_seconds"]),
            "Where a cold picture's time goes: "
            f"{whole:.1f} s of imports, as `python -X importtime` sees them, "
            "each put down to its package, or else to the one that imported it.",
            markdown(parts, ["imported", "seconds", "share", "why"]),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cold_start", description="Starts from cold.")
    parser.add_argument("--turns", type=int, default=TURNS, help="Starts of each command that count.")
    options = parser.parse_args(arguments)
    table = rows(COMMANDS, options.turns)
    write_csv(table, RESULTS / "cold_start.csv")
    text = block(table, imports())
    renew_page(PERFORMANCE, "cold start", text)
    print(text)


if __name__ == "__main__":
    main()
