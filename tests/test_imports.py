"""What importing does, seen from a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import moe_sampler.kernels
import moe_sampler.tinyflux
import moe_sampler.training


def python(code: str, cwd) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_hugging_faces_kernels_works_beside_ours(tmp_path):
    python(
        """
import kernels, moe_sampler.kernels
assert kernels.__file__ != moe_sampler.kernels.__file__
from kernels import LayerRepository, LocalLayerRepository, get_kernel, has_kernel
from moe_sampler.kernels import sampler_step_

# Hugging Face's package does its work: a layer that is mapped to no kernel stays as it is. For a GPU, which
# nothing here touches: before 0.12 it refuses others.
import torch
from kernels import Mode, kernelize, register_kernel_mapping, use_kernel_forward_from_hub, use_kernel_mapping

@use_kernel_forward_from_hub("Doubling")
class Doubling(torch.nn.Module):
    def forward(self, x):
        return 2 * x

with use_kernel_mapping({}, inherit_mapping=False):
    layer = kernelize(Doubling(), mode=Mode.INFERENCE, device="cuda")
assert layer(torch.ones(2)).tolist() == [2, 2]

import diffusers.utils.import_utils as utils
assert utils.is_kernels_available()
""",
        tmp_path,
    )


def test_import_is_quiet(tmp_path):
    """No CUDA context, no network, no file written or opened for anything but code, no diffusers."""
    python(
        """
import sys, torch

def deny(name):
    def hook(*args, **kwargs):
        raise AssertionError(name)
    return hook

torch.cuda.init = torch.cuda._lazy_init = deny("CUDA was initialised")
CODE = (".py", ".pyc", ".so", ".pth", ".egg-link")

def audit(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.mkdir", "os.remove"):
        raise AssertionError(f"{event} {args}")
    if event == "open":
        path, mode, flags = args
        compiled = isinstance(path, str) and "__pycache__" in path
        if mode and set("wax+") & set(str(mode)) and not compiled:
            raise AssertionError(f"wrote {path}")
        if isinstance(path, str) and not path.endswith(CODE) and not compiled and "dist-info" not in path:
            raise AssertionError(f"read {path}")

before = set(sys.modules)
sys.addaudithook(audit)
import moe_sampler, moe_sampler.kernels, moe_sampler.tinyflux, moe_sampler.demo, moe_sampler.sampling
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"diffusers", "transformers", "accelerate", "huggingface_hub", "PIL", "typer"}, new
assert not torch.cuda.is_initialized()
""",
        tmp_path,
    )


def imported_by(command: list[str], cwd) -> set[str]:
    """Full names of what a command has imported by its end."""
    code = f"""
import atexit, sys
atexit.register(lambda: print("IMPORTED", *sys.modules))
sys.argv = ["moe-sampler", *{command!r}]
from moe_sampler.cli import main
main()
"""
    *_, last = (line for line in python(code, cwd).splitlines() if line.startswith("IMPORTED"))
    return set(last.split())


def test_a_plan_is_made_without_torch(tmp_path):
    """Nor anything else that takes longer to import than all of the planning."""
    heavy = {"torch", "triton", "diffusers", "transformers", "accelerate", "peft", "scipy", "huggingface_hub"}
    heavy |= {"moe_sampler.cli.experts", "moe_sampler.cli.student"}  # the flags of other commands
    for options in (["--json"], ["--image", "plan.png", "--router", "crossfade 0.8 0.6"]):
        assert not imported_by(["plan", *options], tmp_path) & heavy, options
    assert (tmp_path / "plan.png").is_file()


def test_the_package_is_typed_and_versioned():
    from importlib.metadata import version
    from importlib.resources import files

    import moe_sampler

    assert files("moe_sampler").joinpath("py.typed").is_file()
    assert moe_sampler.__version__ == version("moe-sampler")
    for name in moe_sampler.__all__:
        assert getattr(moe_sampler, name) is not None


def test_a_type_checker_sees_what_an_import_gives():
    """The links in `typings` are those that package-dir stands for; lazy names are, for the checker, the same
    as at run time."""
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    checked = {(root / folder).resolve() for folder in project["pyright"]["include"]}
    for package, folder in project["setuptools"]["package-dir"].items():
        link = root / project["pyright"]["extraPaths"][0] / package.replace(".", "/")
        assert (link if "." in package else root / package).resolve() == root / folder
        assert root / folder in checked

    for module in (moe_sampler, moe_sampler.kernels, moe_sampler.tinyflux, moe_sampler.training):
        told = {}
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
                for line in node.body:
                    source = (line.module or "").removeprefix(module.__name__).lstrip(".")
                    source = source.removeprefix("moe_sampler.")
                    told |= {alias.name: source for alias in line.names}
        found = {name: source.lstrip(".") for source, names in module._NAMES.items() for name in names}
        assert told == found and set(found) <= set(module.__all__)


ROOT = Path(__file__).parents[1]
PACKAGES = {
    "moe_sampler": "moe_sampler",
    "moe_sampler.kernels": "kernels",
    "moe_sampler.tinyflux": "tinyflux",
}


def imported(file: Path, module: str) -> set[str]:
    """Full names of what a module imports, wherever in it; of `from a import b` also `a.b`."""
    package = module.split(".") if file.stem == "__init__" else module.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def modules() -> dict[str, set[str]]:
    """Every module by its installed name, with what it imports."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            if not (file.parent / "__init__.py").is_file():  # what a saved folder holds for diffusers
                continue
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = imported(file, name)
    return found


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_imports_go_one_way():
    """kernels <- moe_sampler <- tinyflux, and nobody imports the command line but the page."""
    found = modules()
    assert {"moe_sampler.kernels.rows", "moe_sampler.tinyflux.sampling.pipeline"} <= found.keys()
    assert "moe_sampler.tinyflux.sampling.pipeline" in found["moe_sampler.cli.student_sample"]
    assert "moe_sampler.sampling.plan" in found["moe_sampler.pipelines.queue"]
    cli, kernels, tinyflux = (f"moe_sampler.{name}" for name in ("cli", "kernels", "tinyflux"))
    page = "moe_sampler.ui"
    for module, names in found.items():
        ours = {name for name in names if under(name, "moe_sampler")}
        assert module == f"{cli}.ui" or under(module, page) or not any(under(name, page) for name in ours), (
            module
        )
        used = under(module, cli) or under(module, page) or module == "moe_sampler.__main__"  # the command
        if not used:
            assert not [name for name in ours if under(name, cli)], module
            if not under(module, tinyflux):
                assert not [name for name in ours if under(name, tinyflux)], module
        if under(module, kernels):
            shared = {"moe_sampler", "moe_sampler._lazy", "moe_sampler._lazy.lazy_names"}  # not the sampler
            others = {name for name in ours if not under(name, kernels)} - shared
            assert not others, (module, others)
