"""Ctrl-C: one word, exit code 130, and what was finished is kept, whatever the command makes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from moe_sampler import HybridPipeline
from moe_sampler import cli as commands
from moe_sampler.cli import app, root
from moe_sampler.tinyflux import StudentPipeline, TinyFlux, TinyFluxConfig

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--steps", "2", "--batch-size", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    TinyFlux(TinyFluxConfig.demo(num_double_layers=1, num_single_layers=1)).save_pretrained(folder)
    return str(folder)


def run(arguments, code: int):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize(
    ("command", "name", "kept"),
    [
        (("generate", "a castle", "-n", "3", "--zoom", "1"), "a.png", ["a-1.png"]),
        (("generate", "a castle", "a portrait", "a street", "--zoom", "1"), "a.jpg", ["a-1.jpg"]),
        (("generate", "a castle", "-n", "3"), "a.safetensors", ["a-1.safetensors"]),
        (("generate", "a castle", "-n", "3", "--animate", "--zoom", "1"), "a.png", ["a-1.png", "a-1.webp"]),
        (
            ("tinyflux", "sample", "--student", "STUDENT", "a castle", "-n", "3", "--zoom", "1"),
            "a.png",
            ["a-1.png"],
        ),
        (
            ("tinyflux", "sample", "--student", "STUDENT", "a castle", "-n", "3"),
            "a.safetensors",
            ["a-1.safetensors"],
        ),
    ],
    ids=["images", "prompts", "latents", "animations", "student", "student's latents"],
)
def test_what_was_finished_is_kept(tmp_path, monkeypatch, student, command, name, kept):
    """To the bit what it is in a whole run."""
    command = [student if part == "STUDENT" else part for part in command]
    whole = tmp_path / "whole"
    for folder in (whole, tmp_path / "cut"):
        folder.mkdir()
    monkeypatch.chdir(whole)
    run([*command, *QUICK, "-o", name], 0)
    monkeypatch.chdir(tmp_path / "cut")
    for pipeline in (HybridPipeline, StudentPipeline):
        monkeypatch.setattr(pipeline, "decode_latents", interrupted_after(pipeline, tmp_path / "cut", kept))
    result = run([*command, *QUICK, "-o", name], 130)
    assert result.stderr.splitlines()[-1] == "interrupted" and "Traceback" not in result.output
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == kept
    for each in kept:
        assert (tmp_path / "cut" / each).read_bytes() == (whole / each).read_bytes()


def interrupted_after(pipeline, folder, kept):
    """`decode_latents`, but Ctrl-C once these files are there."""
    decode = pipeline.decode_latents

    def decode_latents(pipe, *arguments, **named):
        if all((folder / each).exists() for each in kept):
            raise KeyboardInterrupt
        return decode(pipe, *arguments, **named)

    return decode_latents


def test_a_comparison_keeps_the_columns_and_rows_it_has(tmp_path, monkeypatch):
    def compare(name: str, code: int) -> np.ndarray:
        tile = ("--tile", "64", "-o", name)
        result = run(["compare", "a castle", "a portrait", *QUICK, *tile], code)
        assert (result.stderr.strip().endswith("interrupted")) == (code == 130)
        return np.asarray(Image.open(name))

    def interrupted(pipe, latents, output_type):
        calls.append(output_type)
        if calls.count("pil") > 3:  # Sol's column and the first row of Lune's
            raise KeyboardInterrupt
        return decode(pipe, latents, output_type)

    calls, decode = [], HybridPipeline.decode_latents
    monkeypatch.chdir(tmp_path)
    whole = compare("whole.png", 0)
    monkeypatch.setattr(HybridPipeline, "decode_latents", interrupted)
    part = compare("part.png", 130)
    assert part.shape == whole.shape and not list(tmp_path.glob(".*"))
    different = (part != whole).any(axis=-1)
    columns = np.flatnonzero(different.any(axis=0))
    # Titles and labels are there; missing are the second half of the sheet, and one tile before it.
    assert whole.shape[1] * 0.25 < columns.min() < whole.shape[1] * 0.5
    tiles = different.sum() / 64**2
    assert 4 < tiles <= 5
    background = part[different]
    assert (background == background[0]).all()


def test_ctrl_c_before_the_first_line_of_a_command(monkeypatch, capsys):
    """While the command is imported, and where typer has the word."""

    class Importing:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "moe_sampler.cli.root", Importing())
        patch.delattr(commands, "root")
        with pytest.raises(SystemExit) as ended:
            commands.main()
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted\n")
    own = typer.Typer()

    @own.command()
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(root, "app", lambda prog_name: own([], prog_name=prog_name))
    monkeypatch.setattr(root, "end_with_signals", lambda: None)
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_other_ends_are_their_own(monkeypatch, capsys):
    fake = SimpleNamespace(app=lambda prog_name: (_ for _ in ()).throw(SystemExit(2)))
    monkeypatch.setattr(root, "app", fake.app)
    monkeypatch.setattr(root, "end_with_signals", lambda: None)
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert (ended.value.code, capsys.readouterr().err) == (2, "")
