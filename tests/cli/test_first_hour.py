"""The command as people try it first: short help, quiet, other image formats, strange words, devices."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from moe_sampler.cli import app
from moe_sampler.cli.demo_limits import strange_words
from moe_sampler.demo import known_words
from moe_sampler.viewing.images import check_room, read_settings, save_image

QUICK = ["--steps", "2", "--zoom", "1"]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", [(), ("generate",), ("plan",), ("experts", "train"), ("tinyflux",)])
def test_short_help_is_help(command):
    assert run(*command, "-h").stdout == run(*command, "--help").stdout


def test_as_a_module():
    made = subprocess.run(
        [sys.executable, "-m", "moe_sampler", "--version"], capture_output=True, text=True, check=True
    )
    assert made.stdout.startswith("moe-sampler ")


def test_quiet_prints_nothing_but_errors():
    result = run("generate", "a castle with a spaceship", "-q", "-o", "x.png", *QUICK)
    assert result.stdout == result.stderr == "" and Image.open("x.png").size == (64, 64)
    assert run("compare", "a castle", "--quiet", "--steps", "2", "-o", "y.png").output == ""
    assert "error: " in run("generate", "a castle", "-q", "--steps", "0", code=2).stderr


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp", ".JPG"])
def test_every_format_carries_its_settings(suffix):
    run("generate", "a castle", "--seed", "7", "-o", "x.png", *QUICK)
    run("generate", "a castle", "--seed", "7", "-o", f"x{suffix}", *QUICK)
    with Image.open(f"x{suffix}") as lossy, Image.open("x.png") as exact:
        assert lossy.format == {".webp": "WEBP"}.get(suffix, "JPEG")
        difference = np.asarray(lossy, dtype=float) - np.asarray(exact, dtype=float)
        assert np.abs(difference).mean() < 6
    assert read_settings(f"x{suffix}") == read_settings("x.png")
    run("generate", "--like", f"x{suffix}", "-o", "again.png")
    np.testing.assert_array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open("x.png")))


def test_a_comparison_in_other_formats():
    run("compare", "a castle", "--steps", "2", "-o", "sheet.webp")
    assert read_settings("sheet.webp")["prompts"] == ["a castle"]


def test_settings_of_any_language_and_of_others(tmp_path):
    image, settings = Image.new("RGB", (8, 8)), {"prompt": "ein Schloß 城 🏰"}
    for name in ("x.jpg", "x.webp", "x.png"):
        save_image(image, tmp_path / name, settings)
        assert read_settings(tmp_path / name) == settings
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + json.dumps({"other": 1}).encode()
    image.save("other.jpg", exif=exif)
    with pytest.raises(ValueError, match="no moe-sampler settings"):
        read_settings(tmp_path / "other.jpg")


def test_more_than_a_jpeg_holds_is_refused_before_any_work(tmp_path):
    long = {"prompt": "a castle " * 8000}
    check_room(tmp_path / "x.webp", long)
    with pytest.raises(ValueError, match="64 kB"):
        check_room(tmp_path / "x.jpg", long)
    result = run("generate", "a castle " * 8000, "-o", "x.jpg", *QUICK, code=2)
    assert "64 kB" in result.stderr and not list(tmp_path.iterdir())
    save_image(Image.new("RGB", (8, 8)), tmp_path / "x.webp", long)
    assert read_settings(tmp_path / "x.webp") == long


def test_an_animation_does_not_overwrite_its_image(tmp_path):
    assert "another ending" in run("generate", "a castle", "--animate", "-o", "x.webp", code=2).stderr
    assert not list(tmp_path.iterdir())


def warnings(result):
    return [line for line in result.stderr.splitlines() if line.startswith("warning")]


def test_strange_words_are_named_once():
    texts = ["a castle with a dragon", "a Dragon and a wyvern", "a castle"]
    negative = ["--negative", "a hat", "--negative", "lune=a spaceship"]
    (warning,) = warnings(run("generate", *texts, *negative, "-o", "x.png", *QUICK))
    assert "these words: dragon, wyvern, spaceship (" in warning
    assert not warnings(run("generate", "a castle at dusk", "-o", "y.png", *QUICK))


def test_sizes_that_the_demo_was_not_trained_on_are_named(tmp_path):
    (warning,) = warnings(run("generate", "a castle", "--width", "96", "-o", "x.png", *QUICK))
    assert "64x64 pixels alone; with this size " in warning and "cut off: 96x64 (" in warning
    assert not warnings(run("generate", "a castle", "--height", "64", "-o", "y.png", *QUICK))
    Image.new("RGB", (32, 32)).save("start.png")
    begun = ["--image", "start.png", "--strength", "0.5"]
    (warning,) = warnings(run("generate", "a castle", "--height", "48", *begun, "-o", "z.png", *QUICK))
    assert "48x48" in warning


def test_a_file_of_prompts_says_all_that_the_demo_does_not_know():
    rows = [
        {"prompt": "a castle", "width": 96},
        {"prompt": "a portrait", "negative_prompt": "a dragon"},
        {"prompt": "a castle", "height": 48, "width": 48},
    ]
    with open("rows.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    made = run("generate", "--prompts", "rows.jsonl", "--output-dir", "pictures", *QUICK)
    words, sizes = warnings(made)
    assert "this word: dragon (" in words and "these sizes " in sizes and ": 96x64, 48x48 (" in sizes


def test_the_demo_s_student_has_the_same_limits():
    asked = ["a castle with a dragon", "--width", "96", "-o", "x.png"]
    words, sizes = warnings(run("tinyflux", "sample", *asked, *QUICK))
    assert "this word: dragon (" in words and ": 96x64 (" in sizes
    assert not warnings(run("tinyflux", "sample", *asked, *QUICK, "-q"))


def test_no_known_word_is_strange_and_letters_are_no_words():
    assert strange_words([" ".join(known_words()).upper(), "a 2, 3 b"]) == []


@pytest.mark.parametrize(
    "device", ["gpu", "", "cuda:", "cuda:99", "cuda:99999999999999999999", "cpu,cuda", "meta", "mps", "xpu:0"]
)
def test_a_device_that_is_none_is_one_line(device, tmp_path):
    result = run("generate", "a castle", "--device", device, "-o", "x.png", code=2)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())
