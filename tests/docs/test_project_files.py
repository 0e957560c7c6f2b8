"""The files around the package: what they name is there, and they say the same."""

from __future__ import annotations

import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_one_version():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == PROJECT["version"]
    assert citation["title"] == PROJECT["name"] and citation["license"] == PROJECT["license"]
    assert {"cff-version", "message", "authors"} <= citation.keys()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_is_there(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    typed = "\n".join(step.get("run", "") for step in steps)
    for script in re.findall(r"\.ci/\w+", typed):
        assert (ROOT / script).stat().st_mode & 0o100, script
    if path.stem == "ci":
        assert ".ci/run" in typed
    if path.stem == "docs":  # as CI builds it
        assert re.search(r"`(.*python -m sphinx.*?)`", read("README.md"))[1] in typed


def test_hooks_are_the_checks_of_ci_at_its_versions():
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"
    tools = {hook["entry"].split()[0] for hook in repository["hooks"]}
    assert tools == {"ruff", "pyright"}
    for tool in tools:
        assert re.search(rf"^ *{tool}\b", read(".ci/run"), re.MULTILINE)
        assert re.search(rf"^{tool}==", read("constraints.txt"), re.MULTILINE)


def test_extras_are_pinned():
    pinned = {line.partition("==")[0] for line in read("constraints.txt").splitlines() if "==" in line}
    wanted = [name for extra in PROJECT["optional-dependencies"].values() for name in extra]
    names = {re.match(r"[\w-]+", name)[0] for name in (*PROJECT["dependencies"], *wanted)}
    assert names - {"moe-sampler"} <= pinned, names - pinned


def test_every_page_is_in_the_sites_index():
    listed = set(re.findall(r"^[\w./]+$", read("docs/index.md"), re.MULTILINE))
    found = (page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts)
    pages = {page.relative_to(ROOT / "docs").with_suffix("").as_posix() for page in found}
    assert pages - {"index"} <= listed, pages - listed


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "api").glob("*.md")), ids=lambda page: page.stem)
def test_the_reference_has_every_public_name(page):
    """autodoc shows what has a docstring of its own; a page describes the others."""
    package, text = importlib.import_module(page.stem), page.read_text(encoding="utf-8")
    assert f".. automodule:: {page.stem}\n   :members:\n" in text
    for name in package.__all__:
        public = getattr(package, name)
        own = inspect.isroutine(public) or inspect.isclass(public)
        assert (own and public.__doc__) or f".. autodata:: {page.stem}.{name}\n" in text, name
