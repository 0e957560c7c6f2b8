"""How errors name things, and that there is one for everything that is read and written."""

from __future__ import annotations

import subprocess
import sys

from moe_sampler import training
from moe_sampler.errors import CheckpointError, first_line, listed


def test_one_error_for_models_and_checkpoints():
    assert training.CheckpointError is CheckpointError and issubclass(CheckpointError, ValueError)


def test_it_costs_no_torch(tmp_path):
    code = (
        "import sys, moe_sampler.errors, moe_sampler.architectures, moe_sampler.loading.hub\n"
        "assert not {'torch', 'diffusers', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_and_lines():
    assert listed(["a", "b"]) == "a, b" and listed(range(7)) == "0, 1, 2, 3, 4 and 2 more"
    assert first_line(OSError("one\ntwo")) == "one" and first_line(KeyError()) == "KeyError"
