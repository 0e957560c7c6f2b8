"""The documentation site: `python -m sphinx -W -b html docs docs/_build`. Offline, from what is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer.cli
from typer.main import get_command

import moe_sampler
from moe_sampler.cli import app as command_line

if TYPE_CHECKING:
    from sphinx.application import Sphinx

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
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True


def _commands() -> str:
    """Markdown of every command, out of the command itself, its headings a level lower."""
    command = get_command(command_line)
    context = typer.Context(command, info_name="moe-sampler")
    text = typer.cli.get_docs_for_click(obj=command, ctx=context, name="moe-sampler")
    _, _, body = text.partition("\n")  # the page has its own title
    return body


# Pages that live outside this folder, where a reader of the repository looks for them.
_OUTSIDE = {
    "../CONTRIBUTING.md": "project/contributing.md",
    "../CHANGELOG.md": "project/changelog.md",
    "../bench/results/kernels.md": "project/kernel_report.md",
}


def _read(app: Sphinx, page: str, source: list[str]) -> None:
    text = source[0]
    if page == "COMMANDS":
        text = text.replace("<!-- commands -->", _commands())
    for outside, inside in _OUTSIDE.items():
        text = text.replace(f"]({outside})", f"]({inside})")
    source[0] = text


def setup(app: Sphinx) -> None:
    app.connect("source-read", _read)
