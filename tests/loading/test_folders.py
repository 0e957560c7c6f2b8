"""What a folder's files say: experts and their order, absurd sizes, shards, addresses in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load, load_file, save_file

from moe_sampler import HybridPipeline
from moe_sampler.demo import experts_path
from moe_sampler.errors import CheckpointError
from moe_sampler.loading.folders import (
    expert_names,
    load_component,
    load_strictly,
    read_config,
    read_model_index,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def index(*experts: str, **more) -> dict:
    return {f"unet_{name}": ["diffusers", "UNet2DConditionModel"] for name in experts} | more


@pytest.mark.parametrize(
    ("found", "order"),
    [
        (index("lune", "sol"), ["sol", "lune"]),
        (index("zoo", "lune", "apple", "sol"), ["sol", "lune", "apple", "zoo"]),
        (index("b", "a"), ["a", "b"]),
        (index("sol", "lune", experts=["lune", "sol"]), ["lune", "sol"]),
        (index("sol", "lune", experts="lune, sol"), ["lune", "sol"]),
        (index("sol", "b", "lune", "a", experts=["lune"]), ["lune", "a", "b", "sol"]),
        (index("sol", experts=["lune", "sol", "sol"]), ["sol"]),
        (index(vae=["diffusers", "AutoencoderKL"]), []),
    ],
)
def test_experts_go_from_noise_to_data(found, order):
    assert expert_names(found) == order


@pytest.mark.parametrize("experts", [{"sol": 1}, [1], [["sol"]], 3])
def test_an_order_of_experts_is_names(experts):
    with pytest.raises(CheckpointError, match="experts must be names"):
        expert_names(index("sol", experts=experts))


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"layers_per_block": 1000}, ""),
        ({"layers_per_block": 1001}, "layers_per_block is more than 1,000"),
        ({"layers_per_block": -1001}, "layers_per_block"),
        ({"num_layers": [2, 1001]}, "num_layers"),
        ({"transformer_layers_per_block": [[1], [1, 2000]]}, "transformer_layers_per_block"),
        ({"layer_norm_eps": 2000}, ""),
        ({"sample_size": 10**8}, ""),
        ({"sample_size": 10**8 + 1}, "sample_size is more than 100,000,000"),
        ({"sample_size": 1e12}, ""),
        ({"block_out_channels": [320, 10**9]}, "block_out_channels"),
        ({"text_config": {"num_hidden_layers": 1001}}, "num_hidden_layers"),
        ({"parts": [{"vocab_size": 10**10}]}, "vocab_size"),
    ],
)
def test_a_model_that_no_machine_can_hold_is_refused(tmp_path, config, refused):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not refused:
        assert read_config(tmp_path / "config.json") == config
        return
    with pytest.raises(CheckpointError, match=f"config.json: {refused}"):
        read_config(tmp_path / "config.json")


def test_what_is_missing_from_a_pipelines_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="absent is not a folder"):
        read_model_index(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"has no model_index\.json: it is not a diffusers"):
        read_model_index(tmp_path)
    folder = Path(shutil.copytree(experts_path(), tmp_path / "copy"))
    assert read_model_index(folder) == read_config(folder / "model_index.json")
    shutil.rmtree(folder / "scheduler_lune")
    (folder / "vae").rename(tmp_path / "vae")
    (folder / "vae").mkdir()
    with pytest.raises(CheckpointError, match=r"copy is incomplete: it has no vae/, scheduler_lune/$"):
        read_model_index(folder)
    assert read_model_index(folder, ["tokenizer", "unet_sol"])
    with pytest.raises(CheckpointError, match=r"does not name safety_checker$"):
        read_model_index(folder, ["tokenizer", "safety_checker"])
    (folder / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="names no unet_sol, unet_lune or other expert"):
        read_model_index(folder)


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/hosts", "deep/a.safetensors"])
def test_shards_lie_in_their_own_folder(tmp_path, name):
    """An index is a stranger's word: it can't name files elsewhere."""
    folder = Path(shutil.copytree(experts_path() / "unet_sol", tmp_path / "unet"))
    weights = folder / "diffusion_pytorch_model.safetensors"
    (folder / "deep").mkdir()
    for place in (tmp_path / "stolen.safetensors", folder / "deep" / "a.safetensors"):
        shutil.copy(weights, place)
    keys = list(load_file(weights))
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(keys, name)})
    )
    weights.unlink()
    with pytest.raises(CheckpointError, match=f"unet is incomplete: it has no {name}"):
        HybridPipeline.from_pretrained(experts_path(), sol=folder)


@pytest.mark.parametrize("pad", (0, 8, 24, 40))
def test_weights_lie_where_torchs_own_would(tmp_path, pad):
    """Wherever they begin in their file: a CPU's matrix products round by the address."""
    folder = Path(shutil.copytree(experts_path(), tmp_path / "copy"))
    for part in ("unet_sol", "vae"):
        file = folder / part / "diffusion_pytorch_model.safetensors"
        # In the dtype that is loaded: what is converted is copied anyway.
        save_file({key: t.float() for key, t in load_file(file).items()}, file, {"x": "y" * pad})
    pipe = HybridPipeline.from_pretrained(folder)
    for model in (pipe.unet_sol, pipe.vae):
        assert {parameter.data_ptr() % 64 for parameter in model.parameters()} == {0}


def test_a_component_is_loaded_strictly_and_to_be_used(tmp_path):
    vae = load_component(AutoencoderTiny, experts_path() / "vae", torch.float16)
    assert vae.dtype == torch.float16 and not vae.training
    folder = Path(shutil.copytree(experts_path() / "vae", tmp_path / "vae"))
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load(file.read_bytes())  # load_file's would lie in the file, which is written twice
    first = sorted(tensors)[0]
    for change, message in (
        ({key: t for key, t in tensors.items() if key != first}, f"missing: {first}"),
        ({**tensors, "a.stranger": torch.ones(1)}, "unexpected: a.stranger"),
    ):
        save_file(change, file)
        with pytest.raises(CheckpointError, match=message):
            load_component(AutoencoderTiny, folder)
    file.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="vae cannot be loaded as AutoencoderTiny"):
        load_component(AutoencoderTiny, folder)
    with pytest.raises(CheckpointError, match=r"x does not hold the tensors of its Y; mismatched: \('k'"):
        load_strictly(lambda *_, **__: (None, {"mismatched_keys": {("k", 1, 2)}}), "x", "Y")


@pytest.mark.parametrize("fails", [False, True])
def test_modules_are_filled_as_ever_outside_of_a_load(fails):
    seen, before = [], dict(vars(torch.nn.init))

    def load(*_, **__):
        seen.append(torch.nn.init.constant_(torch.zeros(2), 3.0).tolist())
        if fails:
            raise OSError("no")
        return None, {}

    try:
        load_strictly(load, "x", "Y")
    except CheckpointError:
        assert fails
    assert seen == [[0.0, 0.0]], "what a file fills isn't filled before"
    assert dict(vars(torch.nn.init)) == before
