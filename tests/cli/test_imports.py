"""How the command imports."""

from __future__ import annotations

import gc
import importlib.metadata
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from diffusers.utils import is_peft_available
from safetensors.torch import save_file

from moe_sampler.cli import imports
from moe_sampler.cli.imports import import_pipelines, sparing, without_collecting

COMPILING = ("torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy")


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_looked_for_afterwards_as_before(collects, monkeypatch, tmp_path):
    """Also where an import fails; what has been imported is left alone, and nothing else."""
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    (tmp_path / "a_module_of_this_test.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(ImportError), without_collecting():
            assert not gc.isenabled()
            import no_module_of_this_name  # noqa: F401  # pyright: ignore[reportMissingImports]
        assert (gc.isenabled(), frozen) == (collects, [])
        with without_collecting():
            import a_module_of_this_test  # noqa: F401  # pyright: ignore[reportMissingImports]
        assert (gc.isenabled(), frozen) == (collects, [False])
    finally:
        (gc.enable if before else gc.disable)()
        sys.modules.pop("a_module_of_this_test", None)


def test_a_package_is_as_if_absent_for_a_while(monkeypatch, tmp_path):
    (tmp_path / "a_module_of_this_test.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError), sparing("a_module_of_this_test", "sys"):
        with pytest.raises(ModuleNotFoundError):
            import a_module_of_this_test  # pyright: ignore[reportMissingImports]
        import sys as known

        assert known is sys, "what is there already stays"
        raise RuntimeError
    import a_module_of_this_test  # noqa: F401  # pyright: ignore[reportMissingImports]

    del sys.modules["a_module_of_this_test"]


def test_a_process_that_ends_with_its_command_imports_less():
    """Unasked for, all of these would be there; they are there for what wants them afterwards."""
    code = """
import sys
from moe_sampler.cli import imports
imports.end_with_command()
imports.import_pipelines(loras=False, compiles=False)
from moe_sampler.demo import experts_path
from moe_sampler import HybridPipeline
pipe = HybridPipeline.from_pretrained(experts_path())
pipe("a castle", num_inference_steps=2)
spared = {"scipy", "peft", "torch._dynamo.convert_frame", "sympy.core", "torch.distributed.tensor"}
print(*sorted({*spared, "diffusers"} & sys.modules.keys()))
import scipy, peft, sympy, torch, transformers
listed = sys.modules["transformers.models"]
assert type(listed) is imports._StandIn and transformers.AutoConfig.for_model("bert").hidden_size == 768
assert transformers.models.t5.T5Config() and sys.modules["transformers.models"] is not listed
from torch.fx.experimental import symbolic_shapes
assert torch._dynamo.config.recompile_limit and torch._dynamo.eval_frame.OptimizedModule.__init__
assert isinstance(sympy.Symbol("x") + 1, sympy.Basic) and symbolic_shapes.ShapeEnv()
assert torch.fx.experimental.symbolic_shapes.expect_true.__module__.endswith("symbolic_shapes")
assert torch.compile(lambda x: x + 1, backend="eager", dynamic=True)(torch.ones(3)).tolist() == [2, 2, 2]
assert torch.distributed.is_available()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["diffusers"]


@pytest.mark.skipif(not is_peft_available(), reason="peft is not installed")
def test_a_process_that_ends_with_its_command_has_what_adapters_want(tmp_path):
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    halves = {f"{layer}.lora_A.weight": torch.ones(2, 96), f"{layer}.lora_B.weight": torch.ones(96, 2)}
    save_file(halves, tmp_path / "style.safetensors")
    command = "-m moe_sampler generate castle -q --steps 2 --lora lune=style.safetensors -o styled.png"
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["generate", "a castle", "--quiet", "--steps", "4", "--reuse", "2"], []),
        (["generate", "a castle", "--quiet", "--steps", "4", "--solver", "sol=dpmpp_2m_beta"], ["scipy"]),
        (["plan", "--budget", "9"], []),
    ],
)
def test_a_plan_that_needs_diffusers_brings_nothing_else(tmp_path, arguments, wanted):
    """What reuse costs is asked of diffusers' models, and a borrowed solver is one of its schedulers."""
    code = f"""
import sys
from moe_sampler.cli import main
sys.argv[1:] = {arguments}
try:
    main()
except SystemExit as end:
    assert not end.code
finally:
    spared = {{"scipy", "peft", "torch._dynamo.convert_frame", "torch.distributed.tensor"}}
    print("and imported", *sorted(spared & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split()[2:] == wanted


@pytest.mark.parametrize(
    "ends, loras, compiles, spared",
    [
        (True, False, False, ("scipy", "peft", *COMPILING, "transformers.models")),
        (True, True, False, ("scipy", *COMPILING, "transformers.models")),
        (True, False, True, ("scipy", "peft", "transformers.models")),
        (False, False, False, ()),
    ],
)
def test_what_is_wanted_is_imported(monkeypatch, ends, loras, compiles, spared):
    """And a version that can't do without the others gets them, after an import that failed."""
    asked = []

    def refusing(*names):
        asked.append(names)
        raise RuntimeError("Failed to import diffusers.somewhere")

    monkeypatch.setattr(imports, "_ends_with_command", ends)
    monkeypatch.setattr(imports, "sparing", refusing)
    with nullcontext() if spared else pytest.raises(RuntimeError):
        import_pipelines(loras=loras, compiles=compiles)
    assert asked == [spared]


def test_what_is_installed_is_listed_when_it_is_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: asked.append(1) or {"a": ["b"]})
    with imports._distributions_when_asked():
        found = importlib.metadata.packages_distributions()
    assert not asked and found["a"] == ["b"] and "c" not in found and len(asked) == len(found) == 1
    assert importlib.metadata.packages_distributions() == {"a": ["b"]} and len(asked) == 2
