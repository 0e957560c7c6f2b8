"""CONTRIBUTING.md's recipes, followed to the letter in a copy of the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "kernels"))
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
PATCHES = re.findall(r"^```diff\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
COPIED = ("bench", "kernels", "moe_sampler", "tests", "tinyflux")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The checkout with every recipe followed, in `lib` under the names it is imported by."""
    if shutil.which("git") is None:
        pytest.skip("patches are applied by git")
    root = tmp_path_factory.mktemp("recipes")
    for folder in COPIED:
        shutil.copytree(
            ROOT / folder, root / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", root)
    for name, code in FILES:
        assert not (root / name).exists(), f"{name} is there already"
        (root / name).write_text(code, encoding="utf-8")
    for patch in PATCHES:
        done = subprocess.run(
            ["git", "apply", "-C1", "-"], cwd=root, input=patch, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{done.stderr}{patch}"
    (root / "lib").mkdir()
    (root / "lib" / "moe_sampler").symlink_to(root / "moe_sampler")
    for name in ("kernels", "tinyflux"):
        (root / "moe_sampler" / name).symlink_to(root / name)
    return root


def run_tests(root: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root / "lib"), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_are_four():
    recipes = TEXT.partition("\n## Recipes\n")[2]
    titles = re.findall(r"^### (.+)$", recipes, re.MULTILINE)
    assert titles == ["A solver", "A router", "A kind of expert", "A kernel"]
    assert sum("/test_" in name for name, _ in FILES) == len(titles)


def test_their_tests_pass(copy):
    written = [name for name, _ in FILES if "/test_" in name]
    alike = ["tests/kernels/test_aot.py::test_every_operation_has_cases", "tests/loading/test_presets.py"]
    assert " passed" in run_tests(copy, *written, *alike)


def test_the_kernel_agrees_with_its_twin_and_moves_each_byte_once(copy):
    pytest.importorskip("triton", reason="Triton is not available on this platform")
    files = ("tests/kernels/test_averages.py", "tests/kernels/test_traffic.py")
    out = run_tests(copy, "-m", "interpreter", "-k", "averages or ema", *files, TRITON_INTERPRET="1")
    assert " passed" in out


def test_the_kernel_compiles_without_spills(copy):
    pytest.importorskip("triton", reason="Triton is not available on this platform")
    out = run_tests(copy, "tests/kernels/test_aot.py", "-k", "ema")
    if "9 skipped" in out:  # by the same rule: fenced, but not this Triton's resources
        from aot_helpers import skip_unless_tuned

        skip_unless_tuned()
    assert "9 passed" in out
