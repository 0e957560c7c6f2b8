"""Everything the README says to type works. CI runs its two installing lines; this runs the rest."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_sampler.cli import app

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    lines = "".join(blocks("bash")).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("moe-sampler ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all commands have run, in order."""
    path = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for arguments in commands():
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, (arguments, result.output)
            for line in result.stdout.split():
                if line.endswith(".png"):
                    assert (path / line).stat().st_size > 0
    return path


def test_commands(folder):
    assert len(commands()) >= 8
    for name in ("pictures-1.png", "lake.webp", "compare.png", "maps.png", "upstream/encodings.pt"):
        assert (folder / name).stat().st_size > 0


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[0])
def test_python(code, folder, monkeypatch):
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_the_printed_plan_is_the_commands_own():
    command = next(c for c in commands() if c[0] == "plan")
    assert CliRunner().invoke(app, command).stdout.strip() == blocks("text")[0].strip()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_two_lines():
    lines = "".join(blocks("bash"))
    assert (
        "pip install -c constraints.txt . && moe-sampler generate "
        '"a castle with two towers, at dusk" -o castle.png\n' in lines
    )
    assert 'pip install -c constraints.txt -e ".[test]" && pytest -n 2 --dist loadfile\n' in lines
