"""`generate --prompts`, as a user runs it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from moe_sampler import HybridPipeline
from moe_sampler.cli import app, main
from moe_sampler.cli.asked import Asked
from moe_sampler.data.sources import open_source
from moe_sampler.demo import experts_path
from moe_sampler.errors import NonFiniteError
from moe_sampler.viewing.images import read_settings

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ("a castle", "a portrait", "a city street at night", "a castle by a lake", "a castle at dusk")


@pytest.fixture
def pipe(demo_pipeline):
    return demo_pipeline


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch, pipe):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Asked, "load", lambda self: pipe)


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def make(file: object, folder: object, *arguments: object, code: int = 0):
    return run("--prompts", file, "--output-dir", folder, "--steps", 2, *arguments, code=code)


def prompts(name: str = "p.txt", texts=PROMPTS) -> str:
    Path(name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return name


def listed(folder: str) -> list[dict]:
    text = Path(folder, "metadata.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def contents(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_a_folder_is_a_data_set_and_every_picture_can_be_made_alone():
    shown = make(prompts(), "out", "--seed", 7, "--handoff", 0.8).stdout
    assert shown.splitlines()[-1] == "out: 5 pictures"
    assert [(row["file_name"], row["text"], row["row"], row["seed"]) for row in listed("out")] == [
        (f"{i + 1:06d}.png", text, i + 1, 7 + i) for i, text in enumerate(PROMPTS)
    ]
    assert json.loads(listed("out")[2]["settings"])["handoff"] == 0.8
    source = open_source("out")
    assert [source[i].caption for i in range(5)] == list(PROMPTS)
    run("--like", "out/000003.png", "-o", "alone.png")
    assert np.abs(pixels("alone.png") - pixels("out/000003.png")).max() <= 1  # rounded in another batch
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("imagefolder", data_dir="out", split="train", cache_dir="cache")
    assert loaded["text"][:] == list(PROMPTS) and loaded[0]["image"].size == (64, 64)


def test_columns_are_the_options_of_a_row():
    rows = [
        {"prompt": "a castle", "seed": 5, "guidance": {"lune": 4}, "handoff": 0.8, "negative": "a hat"},
        {"prompt": "a portrait", "num_inference_steps": 3, "file_name": "face.jpg", "id": "x7"},
        {"prompt": "a castle", "seed": 5, "guidance_window": [0.9, 0.3], "solver": {"lune": "dpmpp_2m"}},
        {"prompt": "a castle", "images": 2, "sol_steps": 1, "lune_steps": 2, "height": 32, "zoom": 2},
    ]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make("p.jsonl", "out", "--guidance", 3, "--keep-column", "id")
    (first, face, third, one, two) = listed("out")
    assert [row["id"] for row in listed("out")] == [None, "x7", None, None, None]
    assert face["file_name"] == "face.jpg" and read_settings("out/face.jpg")["num_inference_steps"] == 3
    settings = json.loads(first["settings"])
    assert settings["guidance_scale"] == {"sol": 3.0, "lune": 4.0} and settings["negative_prompt"] == "a hat"
    assert json.loads(third["settings"])["guidance_window"] == [0.9, 0.3]
    assert (one["file_name"], two["file_name"]) == ("000004-1.png", "000004-2.png")
    assert (one["seed"], two["seed"]) == (3, 4), "they count up over all rows before"
    assert Image.open("out/000004-1.png").size == (128, 64)
    told = Image.open("out/000001.png").info["parameters"]  # what other programs read
    assert told.startswith("a castle\nNegative prompt: a hat\nSteps: 2, ") and "lune CFG scale: 4" in told
    same = ("--seed", 5, "--guidance", 3, "--guidance", "lune=4", "--handoff", 0.8, "--negative", "a hat")
    run("a castle", "--steps", 2, "--zoom", 1, *same, "-o", "same.png")
    assert np.abs(pixels("same.png") - pixels("out/000001.png")).max() <= 1
    run("a castle", "--steps", 2, "--zoom", 1, "--seed", 5, "--guidance", 3, "-o", "other.png")
    assert (pixels("other.png") != pixels("out/000001.png")).any()


def test_a_row_starts_from_its_own_image():
    Path("lists").mkdir()
    Image.new("RGB", (64, 64), "teal").save("lists/teal.png")
    Path("lists/p.csv").write_text(
        "prompt,image,strength\na castle,teal.png,0.5\na castle,,\na castle,no.png,\n"
    )
    result = make("lists/p.csv", "out", code=1)
    assert "row 3 (p.csv:4): lists/no.png cannot be read" in result.stderr
    assert [json.loads(row["settings"]).get("strength") for row in listed("out")] == [0.5, None]
    assert read_settings("out/000001.png")["image"] == str(Path("lists/teal.png").resolve())


def test_bad_rows_are_reported_and_made_once_they_are_good():
    header = "prompt,steps,handoff,guidance,seed,file_name\n"
    rows = [
        "a castle,,,,,a",
        ",,,,,",
        "x,abc,,,,",
        "x,,1.8,,,",
        "x,,,nobody=3,,",
        "x,,,,1.5,",
        "x,,,,,a",
        "x,1",
    ]
    Path("p.csv").write_text(header + "\n".join([*rows, "a portrait,,,,,"]))
    result = make("p.csv", "out", code=1)
    words = (
        "no prompt",
        "--steps abc",
        "handoff",
        "nobody",
        "seed",
        "a.png is that of row 1",
        "fewer fields",
    )
    for number, word in enumerate(words, 2):
        (line,) = [line for line in result.stderr.splitlines() if line.startswith(f"row {number} ")]
        assert f"(p.csv:{number + 1})" in line and word in line
    errors = [json.loads(line) for line in Path("out/errors.jsonl").read_text().splitlines()]
    assert [error["row"] for error in errors] == list(range(2, 9)) and "7 rows failed" in result.stderr
    assert [row["file_name"] for row in listed("out")] == ["a.png", "000009.png"]
    before = os.stat("out/a.png").st_mtime_ns
    rows = ["a castle,,,,,a", *["a castle at noon,,,,,"] * 7, "a portrait,,,,,"]
    Path("p.csv").write_text(header + "\n".join(rows))
    assert "9 pictures, 2 of them were there" in make("p.csv", "out").stdout
    assert os.stat("out/a.png").st_mtime_ns == before and not Path("out/errors.jsonl").exists()
    # As if they had been good from the beginning: a picture's batch is the file's.
    make("p.csv", "whole")
    assert len(listed("out")) == 9
    for name in contents("whole").keys() - {"metadata.jsonl", ".moe-sampler"}:
        assert np.abs(pixels(f"whole/{name}") - pixels(f"out/{name}")).max() <= 1


def test_a_row_that_fails_as_it_is_made_stops_no_other(pipe, monkeypatch):
    make(prompts(), "whole", "--batch-size", 1)
    encode = pipe.encode_texts

    def failing(texts, *arguments, **named):
        if "a portrait" in texts:
            raise NonFiniteError("the prompts' features hold NaN")
        return encode(texts, *arguments, **named)

    monkeypatch.setattr(pipe, "encode_texts", failing)
    result = make("p.txt", "out", code=1)
    assert "row 2 (p.txt:2): the prompts' features hold NaN" in result.stderr
    assert [row["row"] for row in listed("out")] == [1, 3, 4, 5]
    assert contents("out")["000001.png"] == contents("whole")["000001.png"], "of a failed batch, made alone"
    monkeypatch.setattr(pipe, "encode_texts", encode)
    make("p.txt", "out")
    assert [row["row"] for row in listed("out")] == [1, 2, 3, 4, 5]


WRONG = {
    "kind": (["--prompts", "p.doc", "--output-dir", "out"], "are read from .txt, .jsonl, .csv or .parquet"),
    "nothing": (["--prompts", "no.txt", "--output-dir", "out"], "No such file"),
    "both": (["a castle", "--prompts", "p.txt", "--output-dir", "out"], "not both"),
    "no folder": (["--prompts", "p.txt"], "give --output-dir"),
    "no file": (["a castle", "--output-dir", "out"], "for --prompts FILE"),
    "output": (["--prompts", "p.txt", "--output-dir", "out", "-o", "x.png"], "--output-dir"),
    "format": (["--prompts", "p.txt", "--output-dir", "out", "--image-format", "bmp"], "png, jpg or webp"),
    "typo": (["--prompts", "typo.csv", "--output-dir", "out"], "did you mean guidance?"),
    "of all": (["--prompts", "model.csv", "--output-dir", "out"], "give --model"),
    "no prompts": (["--prompts", "none.csv", "--output-dir", "out"], "--prompt-column"),
    "twice": (["--prompts", "twice.csv", "--output-dir", "out"], "two columns give steps"),
    "empty": (["--prompts", "empty.txt", "--output-dir", "out"], "has no rows"),
    "foreign": (["--prompts", "p.txt", "--output-dir", "mine"], "is not the folder of a file of prompts"),
    "keep": (["--prompts", "p.txt", "--output-dir", "out", "--keep-column", "id"], "the columns are prompt"),
}


@pytest.mark.parametrize(("arguments", "said"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_said_before_any_work(arguments, said):
    prompts()
    for name, text in {
        "p.doc": "x",
        "typo.csv": "prompt,guidence\nx,3\n",
        "model.csv": "prompt,model\nx,y\n",
        "none.csv": "words\nx\n",
        "twice.csv": "prompt,steps,num_inference_steps\nx,1,1\n",
        "empty.txt": "\n\n",
    }.items():
        Path(name).write_text(text)
    Path("mine").mkdir()
    Path("mine/holiday.png").write_bytes(b"")
    result = run(*arguments, code=2)
    assert said in " ".join(result.stderr.split()) and not Path("out").exists()


def test_a_rerun_with_other_settings_is_refused():
    make(prompts(), "out")
    for arguments, said in (
        (["--guidance", 4], "guidance_scale"),
        (["--seed", 1], "seed"),
        (["--shard-size", 2], "not in shards"),
    ):
        assert said in make("p.txt", "out", *arguments, code=2).stderr
    prompts(texts=PROMPTS[1:])
    assert "000005.png, which no row asks for" in make("p.txt", "out", code=2).stderr


def test_shards_are_web_data_sets_of_the_same_bytes_however_they_came_about(pipe, monkeypatch):
    make(prompts(), "whole", "--shard-size", 2)
    assert sorted(contents("whole")) == [".moe-sampler", "000000.tar", "000001.tar", "000002.tar"]
    source = open_source("whole")
    assert [source[i].caption for i in range(5)] == list(PROMPTS)
    decode, calls = pipe.decode_latents, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(pipe, "decode_latents", killed)
    make("p.txt", "out", "--shard-size", 2, "--batch-size", 1, code=130)
    assert sorted(contents("out")) == [".moe-sampler"] and Path("out/.unfinished/000001.png").exists()
    monkeypatch.setattr(pipe, "decode_latents", decode)
    make("p.txt", "out", "--shard-size", 2, "--batch-size", 1)
    make("p.txt", "once", "--shard-size", 2, "--batch-size", 1)
    assert contents("out") == contents("once") and not Path("out/.unfinished").exists()


def test_offload_takes_the_whole_queue_through_an_expert(monkeypatch):
    from moe_sampler.pipelines.offload import ExpertOffload

    own = HybridPipeline.from_pretrained(experts_path(), offload="expert")
    monkeypatch.setattr(Asked, "load", lambda self: own)
    used: list[set[str]] = []
    use = ExpertOffload.use
    monkeypatch.setattr(
        ExpertOffload, "use", lambda self, names: use(self, used.append(set(names)) or used[-1])
    )
    make(prompts(), "out", "--offload", "expert", "--batch-size", 2)
    assert [names for names in used if names] == [{"sol"}, {"lune"}], "three batches, each expert once"


COUNT = 2


def command(rank: int, port: int, arguments: list[str]) -> None:
    """One of the processes that a launcher starts."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # what other tests left
    shared = {"WORLD_SIZE": COUNT, "LOCAL_WORLD_SIZE": COUNT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own = {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1}
    os.environ |= {name: str(value) for name, value in (shared | own).items()}
    sys.argv = ["moe-sampler", *arguments]
    main()


def launched(arguments: list[str]) -> list[Any]:
    """Two processes that share the work; forked, as starting Python anew takes longer than the work."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=command, args=(rank, port, arguments)) for rank in range(COUNT)]
    for process in started:
        process.start()
    return started


def ended(processes: list[Any]) -> list[int]:
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.mark.processes
def test_two_processes_one_of_which_is_killed():
    texts = [f"a castle with {n} trees" for n in ("no", "two", "three", "four", "five", "six")]
    arguments = ["generate", "--prompts", prompts(texts=texts), "--steps", "16", "--batch-size", "1", "-q"]
    started, deadline = launched([*arguments, "--output-dir", "out"]), time.monotonic() + 120
    while len(list(Path().glob("out/*.png"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(started[1].pid, signal.SIGKILL)
    codes = ended(started)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, 2), "the other one does its share, and says so"
    kept = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("*.png")}
    assert 2 <= len(kept) < 6 and {row["file_name"] for row in listed("out")} == kept.keys()
    assert ended(launched([*arguments, "--output-dir", "out"])) == [0, 0]
    assert kept.items() <= {p.name: p.stat().st_mtime_ns for p in Path("out").glob("*.png")}.items()
    run(*arguments[1:], "--output-dir", "alone")
    assert contents("out") == contents("alone")
