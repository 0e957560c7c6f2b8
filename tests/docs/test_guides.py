"""Everything the guides say to type works, and their pictures are those that their commands make."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from moe_sampler.cli import app

DOCS = Path(__file__).parents[2] / "docs"
GUIDES = ("GENERATE", "CHECKPOINTS", "SCHEDULERS", "SOLVERS", "TINYFLUX", "EXPERTS")
MEASURED = re.compile(r"<!-- measured: .*?<!-- end: [^>]+ -->", re.DOTALL)
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?^```(bash|python|toml)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LAUNCHER = "accelerate launch "


def text_of(guide: str) -> str:
    return (DOCS / f"{guide}.md").read_text(encoding="utf-8")


def blocks(guide: str) -> list[tuple[bool, str, str]]:
    """(run?, language, code), in the page's order."""
    return [(not note, language, code) for note, language, code in BLOCK.findall(text_of(guide))]


def commands(code: str) -> list[list[str]]:
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        if line.startswith("#"):
            continue
        # A launcher's own options are its business.
        _, launched, rest = (
            line.partition(" -m moe_sampler.cli ") if line.startswith(LAUNCHER) else ("", "", line)
        )
        words = shlex.split(rest)
        assert launched or words[0] == "moe-sampler", line
        found.append(words if launched else words[1:])
    return found


def redirected(arguments: list[str]) -> tuple[list[str], str | None]:
    """A command's words, and the file its output goes to."""
    return (arguments[:-2], arguments[-1]) if ">" in arguments[-2:-1] else (arguments, None)


def parses(arguments: list[str]) -> None:
    """Whether the command knows these options, without doing anything."""
    group = typer.main.get_command(app)
    with group.make_context("moe-sampler", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, list(arguments))
        command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("guide", GUIDES)
def test_a_page_from_top_to_bottom(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": guide}
    for wanted, language, code in blocks(guide):
        if language == "toml":  # a file by the name in its first line
            (tmp_path / code.splitlines()[0].removeprefix("# ")).write_text(code, encoding="utf-8")
            continue
        if language == "python":
            tree = ast.parse(code)
            if wanted:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    exec(compile(tree, f"{guide}.md", "exec"), namespace)
            continue
        for words in commands(code):
            arguments, target = redirected(words)
            parses(arguments)
            if wanted:
                result = CliRunner().invoke(app, arguments)
                assert result.exit_code == 0, (arguments, result.output, result.exception)
                if target is not None:
                    (tmp_path / target).write_text(result.stdout, encoding="utf-8")
    for name in pictures(guide):
        made = tmp_path / name
        if made.exists():
            assert_same_picture(made, DOCS / "images" / name)


def pictures(guide: str) -> list[str]:
    """Those that the page's own commands make: not those of measurements, which take hours."""
    return re.findall(r"!\[[^\]]+\]\(images/([^)]+)\)", MEASURED.sub("", text_of(guide)))


def assert_same_picture(made: Path, shown: Path) -> None:
    """Nearly: another machine rounds differently, and a step may make more of it."""
    with Image.open(made) as ours, Image.open(shown) as theirs:
        assert ours.size == theirs.size
        ours, theirs = (np.asarray(image.convert("RGB")).astype(int) for image in (ours, theirs))
    assert np.abs(ours - theirs).mean() < 6, shown.name


@pytest.mark.parametrize("guide", GUIDES)
def test_every_block_is_run_or_says_why_not(guide):
    text = text_of(guide)
    fences = re.findall(r"^```(\w+)$", text, re.MULTILINE)
    assert len(fences) == len(blocks(guide)) and set(fences) <= {"bash", "python", "toml"}
    assert text.count("<!-- not run: ") == sum(not wanted for wanted, _, _ in blocks(guide))


@pytest.mark.parametrize("guide", GUIDES)
def test_pictures_are_small_and_made_by_a_command_of_the_page(guide):
    typed = "".join(code for wanted, language, code in blocks(guide) if wanted and language == "bash")
    for name in pictures(guide):
        assert (DOCS / "images" / name).stat().st_size < 400_000
        written = name if name.endswith(".png") else name.replace(".webp", ".png")
        assert re.search(rf"(-o|--image) {re.escape(written)}$", typed, re.MULTILINE), name


@pytest.mark.parametrize("guide", GUIDES)
def test_links_lead_somewhere(guide):
    for target in re.findall(r"\]\(([^)#]+)\)", text_of(guide)):
        assert target.startswith("http") or (DOCS / target).exists(), target
