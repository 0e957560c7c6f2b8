"""Everything that a page says to type works, and its pictures are those that its commands make."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
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

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
)
GUIDES = [name for name in PAGES if name.startswith("docs/")]
WITH_BLOCKS = [
    name for name in PAGES if re.search(r"^```\w", (ROOT / name).read_text(encoding="utf-8"), re.M)
]
MEASURED = re.compile(r"<!-- measured: .*?<!-- end: [^>]+ -->", re.DOTALL)
BLOCK = re.compile(
    r"(<!-- not run: [^>]+ -->\n)?^```(bash|python|toml|text|diff)\n(.*?)^```", re.DOTALL | re.MULTILINE
)
LAUNCHER = "accelerate launch "
# .ci/run reads these lines out of their pages and runs them; test_recipes.py applies what is a patch.
MADE_BY_OTHERS = {
    "trace.png": "the sheet that the README's --trace makes",
    "ui.webp": "bench.page_picture",
    "demo_scenes.png": "bench.demo.sheet",
    "demo_comparison.png": "bench.demo.sheet",
    "demo_reproduction.png": "bench.demo.reproduction",
    "topics.png": "Python of its page",
    "student.png": "bench.demo.student",
    "card.webp": "bench.card_picture",
    "comfyui.webp": "bench.comfyui_picture",
}
RUN_BY_CI = ("&& pytest", "&& moe-sampler generate", "python -m bench.report", "python -m sphinx")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[bool, str, str]]:
    """(run?, language, code), in the page's order."""
    return [(not note, language, code) for note, language, code in BLOCK.findall(text_of(page))]


def lines(code: str) -> list[str]:
    joined = code.replace("\\\n", " ").splitlines()
    return [line for line in joined if line.strip() and not line.startswith("#")]


def command(line: str) -> list[str] | None:
    """The arguments of `moe-sampler`; a launcher's own options are its business."""
    if line.startswith(LAUNCHER):
        return shlex.split(line.partition(" -m moe_sampler.cli ")[2])
    words = shlex.split(line)
    return words[1:] if words[0] == "moe-sampler" else None


def parses(arguments: list[str]) -> None:
    """Whether the command knows these options, without doing anything."""
    group = typer.main.get_command(app)
    with group.make_context("moe-sampler", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, list(arguments))
        command.make_context(name, rest, parent=context)


def exists(line: str) -> None:
    """Whether the module and paths that a line names are there, without running it."""
    words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
    if words[:3] == ["python", "-m", "pip"]:  # who asks for pip's spec gets no setuptools from then on
        return
    if words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), line
    else:
        assert words[0] in ("pytest", "ruff", "pyright"), line
    for word in words[1:]:
        if word.startswith(("tests/", "bench/", "docs/")):
            assert (ROOT / word.partition("::")[0]).exists(), line


@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_a_page_from_top_to_bottom(page, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if page == "docs/HUB.md":
        request.getfixturevalue("hub")
    namespace = {"__name__": Path(page).stem}
    for wanted, language, code in blocks(page):
        if language == "toml":  # a file by the name in its first line
            (tmp_path / code.splitlines()[0].removeprefix("# ")).write_text(code, encoding="utf-8")
        elif re.match(r"# \S+\.py\n", code):  # a recipe's file: test_recipes.py
            continue
        elif language == "python":
            tree = ast.parse(code)
            if wanted:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    exec(compile(tree, page, "exec"), namespace)
        elif language == "bash":
            for line in lines(code):
                type_in(line, wanted)
    for name in pictures(page):
        made = tmp_path / ("steps.trace.png" if name == "trace.png" else name)
        if made.exists():
            assert_same_picture(made, ROOT / "docs" / "images" / name)


def type_in(line: str, wanted: bool) -> None:
    if any(part in line for part in RUN_BY_CI):
        return
    arguments = command(line)
    if arguments is None:
        assert not wanted, f"nothing runs this line: {line}"
        exists(line)
        return
    target = None
    if ">" in arguments[-2:-1]:  # the file that its output goes to
        *arguments, _, target = arguments
    parses(arguments)
    if wanted:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (arguments, result.output, result.exception)
        if target is not None:
            Path(target).write_text(result.stdout, encoding="utf-8")


def pictures(page: str) -> list[str]:
    """Those that the page's own commands make: not those of measurements, which take hours."""
    return re.findall(r"!\[[^\]]+\]\((?:docs/)?images/([^)]+)\)", MEASURED.sub("", text_of(page)))


def assert_same_picture(made: Path, shown: Path) -> None:
    """Nearly: another machine rounds differently, and a step may make more of it."""
    with Image.open(made) as ours, Image.open(shown) as theirs:
        assert ours.size == theirs.size
        ours, theirs = (np.asarray(image.convert("RGB")).astype(int) for image in (ours, theirs))
    assert np.abs(ours - theirs).mean() < 6, shown.name


@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_every_block_is_run_or_says_why_not(page):
    text = text_of(page)
    assert len(re.findall(r"^```\w+$", text, re.MULTILINE)) == len(blocks(page))
    assert text.count("<!-- not run: ") == sum(not wanted for wanted, _, _ in blocks(page))


@pytest.mark.parametrize("page", [name for name in WITH_BLOCKS if pictures(name)])
def test_pictures_are_small_and_made_by_a_command_of_the_page(page):
    typed = "".join(code for _, language, code in blocks(page) if language == "bash")
    for name in pictures(page):
        assert (ROOT / "docs" / "images" / name).stat().st_size < 400_000
        written = name if name.endswith(".png") else name.replace(".webp", ".png")
        made = re.search(rf"(-o|--image) {re.escape(written)}$", typed, re.MULTILINE)
        assert made or name in MADE_BY_OTHERS, name


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]+)?\)", text_of(page)):
        assert target.startswith("http") or ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", sorted({*GUIDES} - {"docs/index.md"}))
def test_a_page_opens_with_what_its_reader_will_be_able_to_do(page):
    opening = text_of(page).split("\n\n")[1]
    assert opening.startswith(("After this page you", "Here you can")), opening


def test_the_printed_plan_is_the_commands_own():
    shown = r"```bash\n(moe-sampler plan [^\n]*)\n```\n\n```text\n(.*?)```"
    typed, printed = re.search(shown, text_of("docs/GENERATE.md"), re.DOTALL).groups()
    assert CliRunner().invoke(app, shlex.split(typed)[1:]).stdout.strip() == printed.strip()


def test_ci_runs_the_lines_that_are_left_to_it():
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for part in RUN_BY_CI:
        assert part in steps, part
