"""The documentation site: `python -m sphinx -W -b html docs docs/_build`. Offline, from what is installed."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

import typer.cli
from typer.main import get_command

import moe_sampler
from moe_sampler.cli import app as command_line

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]

project = "moe-sampler"
author = "The moe-sampler authors"
project_copyright = author
version = release = moe_sampler.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"moe-sampler {version}"

myst_heading_anchors = 3

# Docstrings are Google's style, with what Markdown calls code in single backticks.
default_role = "code"
napoleon_numpy_docstring = False
autodoc_inherit_docstrings = False
autodoc_member_order = "groupwise"
autodoc_typehints = "description"
autodoc_preserve_defaults = True


def _commands() -> str:
    """Markdown of every command, out of the command itself, its headings a level lower."""
    command = get_command(command_line)
    context = typer.Context(command, info_name="moe-sampler")
    text = typer.cli.get_docs_for_click(obj=command, ctx=context, name="moe-sampler")
    _, _, body = text.partition("\n")  # the page has its own title
    return body


# Pages whose text lives outside this folder, where a reader of the repository looks for it.
_OUTSIDE = {
    "project/contributing": "CONTRIBUTING.md",
    "project/changelog": "CHANGELOG.md",
    "project/kernel_report": "bench/results/kernels.md",
    "project/solver_table": "bench/results/solvers.md",
    "project/sampler_step_table": "bench/results/sampler_step.md",
    "project/noise_table": "bench/results/noise.md",
    "project/training_table": "bench/results/training.md",
}
_LINK = re.compile(r"\]\(([^)\s:#]+\.\w+)(#[^)]*)?\)")


def _relink(text: str, source: str, page: str) -> str:
    """The links of a text, paths from the file `source`, as they are from the page."""
    pages = {path: f"docs/{name}.md" for name, path in _OUTSIDE.items()}

    def relinked(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        target = posixpath.relpath(pages.get(path, path), posixpath.dirname(f"docs/{page}"))
        return f"]({target}{match[2] or ''})"

    return _LINK.sub(relinked, text)


def _read(app: Sphinx, page: str, source: list[str]) -> None:
    outside = _OUTSIDE.get(page)
    if outside is not None:
        source[0] = (ROOT / outside).read_text(encoding="utf-8")
        app.env.note_dependency(str(ROOT / outside))
    if page == "COMMANDS":
        source[0] = source[0].replace("<!-- commands -->", _commands())
    source[0] = _relink(source[0], outside or f"docs/{page}.md", page)


def _skip(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """A named tuple's fields are described with the tuple; None leaves the rest to autodoc."""
    return True if (obj.__doc__ or "").startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    app.connect("source-read", _read)
    app.connect("autodoc-skip-member", _skip)
