"""Students come back from folders, files, trainers' checkpoints and the hub, or say why not."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from tinyflux_helpers import inputs_of, new_config, trained, v4_config
from torch.testing import assert_close

from moe_sampler.errors import CheckpointError
from moe_sampler.loading.folders import load_component
from moe_sampler.tinyflux import TinyFlux, TinyFluxConfig, load_tinyflux
from moe_sampler.tinyflux.model.loading import config_from_state_dict

KEYS = json.loads((Path(__file__).parents[2] / "fixtures/tinyflux_deep_keys.json").read_text())
UPSTREAM = {name: v4_config().to_dict()[name] for name in KEYS["config"]}
"""A config.json as upstream writes it."""


def same(model, expected):
    """Equal tensors and, as the config counts too, equal outputs."""
    assert not model.training
    assert {n: v for n, v in model.config.items() if not n.startswith("_")} == {
        n: v for n, v in expected.config.items() if not n.startswith("_")
    }
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    inputs = inputs_of(expected.config)
    assert torch.equal(model(**inputs).sample, expected(**inputs).sample)


@pytest.fixture(scope="module")
def published():
    return trained(v4_config())


@pytest.fixture(scope="module")
def averaged():
    return trained(v4_config(), seed=7)


@pytest.fixture
def upstreams(tmp_path, published):
    """A folder as upstream's repository is."""
    (tmp_path / "config.json").write_text(json.dumps(UPSTREAM | {"_metadata": {"step": 3}}))
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("config", [v4_config(), new_config()], ids=["published", "new"])
def test_save_pretrained_round_trip(tmp_path, config):
    model = trained(config)
    model.save_pretrained(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "tinyflux.py",
    ]
    same(TinyFlux.from_pretrained(tmp_path), model)
    same(load_tinyflux(tmp_path), model)
    same(load_component(TinyFlux, tmp_path), model)


def test_diffusers_own_arguments(tmp_path):
    model = trained(new_config())
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    same(TinyFlux.from_pretrained(tmp_path, variant="fp16"), model)
    loaded = TinyFlux.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and loaded.rope.freqs_1.dtype == torch.float32
    (tmp_path / "config.json").write_text(json.dumps(new_config(num_single_layers=3).to_dict()))
    with pytest.raises(CheckpointError, match=r"missing: single_blocks\.2"):
        TinyFlux.from_pretrained(tmp_path, variant="fp16")


def test_precision(upstreams, published):
    for load in (load_tinyflux, TinyFlux.from_pretrained):
        model = load(upstreams, torch_dtype=torch.bfloat16)
        assert model.dtype == torch.bfloat16
        assert torch.equal(model.rope.freqs_2, published.rope.freqs_2)
    stored = {name: tensor.bfloat16() for name, tensor in published.state_dict().items()}
    save_file(stored, upstreams / "model.safetensors")
    model = load_tinyflux(upstreams)
    assert model.dtype == torch.float32
    assert torch.equal(model.rope.freqs_2, stored["rope.freqs_2"].float())  # what it was trained with


def test_upstreams_folder(upstreams, published):
    same(TinyFlux.from_pretrained(upstreams), published)
    same(load_tinyflux(upstreams.parent, subfolder=upstreams.name), published)


def test_single_file(upstreams, published):
    same(TinyFlux.from_pretrained(upstreams / "model.safetensors"), published)  # config.json beside it
    (upstreams / "config.json").unlink()
    same(TinyFlux.from_pretrained(upstreams / "model.safetensors", config=v4_config()), published)
    metadata = {"config": json.dumps(UPSTREAM)}
    save_file(published.state_dict(), upstreams / "model.safetensors", metadata)
    same(TinyFlux.from_pretrained(upstreams / "model.safetensors"), published)


CONFIGS = {
    "published": v4_config(),
    "Lune alone": v4_config(use_sol_prior=False, sol_hidden_dim=256, sol_qk_scale=False),
    "Sol alone": v4_config(
        use_lune_expert=False, use_t5_vec=False, lune_expert_dim=1280, lune_hidden_dim=512
    ),
    "wide": v4_config(hidden_size=48, num_attention_heads=3, mlp_ratio=2.5, sol_spatial_size=5),
    "without the unused tensors": v4_config(sol_qk_scale=False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_say_what_a_published_checkpoint_is(tmp_path, name):
    model = trained(CONFIGS[name])
    save_file(model.state_dict(), tmp_path / "any.safetensors")
    expected = CONFIGS[name]
    assert config_from_state_dict(model.state_dict()) == expected
    loaded = TinyFlux.from_pretrained(tmp_path / "any.safetensors")
    assert torch.equal(loaded(**inputs_of(expected)).sample, model(**inputs_of(expected)).sample)


def test_new_models_need_their_config(tmp_path):
    save_file(trained(new_config()).state_dict(), tmp_path / "any.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_tinyflux(tmp_path / "any.safetensors")
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a TinyFlux"):
        load_tinyflux(tmp_path / "other.safetensors")


def test_without_sols_prior_its_unused_factors_may_be_there(tmp_path):
    """Some of upstream's versions wrote them all the same."""
    config = v4_config(use_sol_prior=False)
    model = trained(config)
    state = model.state_dict() | {"double_blocks.0.attn.spatial_to_mod.bias": torch.zeros(2)}
    save_file(state, tmp_path / "any.safetensors")
    loaded = load_tinyflux(tmp_path / "any.safetensors", config=config)
    assert torch.equal(loaded(**inputs_of(config)).sample, model(**inputs_of(config)).sample)
    TinyFlux(config).load_state_dict(state)


# Trainers' checkpoints


def prefixed(model, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_trainers_file(tmp_path, published, key, prefix):
    state = prefixed(published, prefix)
    torch.save(
        state if key is None else {"step": 3, key: state, "optimizer": {"state": {}}}, tmp_path / "step_3.pt"
    )
    same(TinyFlux.from_pretrained(tmp_path / "step_3.pt"), published)


def test_trainers_file_says_its_config(tmp_path):
    model = trained(new_config())
    content = {"model": model.state_dict(), "model_config": new_config().to_dict()}
    torch.save(content, tmp_path / "step_3.pt")
    same(TinyFlux.from_pretrained(tmp_path / "step_3.pt"), model)


def test_pickles_run_no_code(tmp_path, published):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": published.state_dict(), "trap": Trap()}, tmp_path / "step_3.pt")
    with pytest.raises(CheckpointError, match="weights_only=True"):
        TinyFlux.from_pretrained(tmp_path / "step_3.pt")
    assert not (tmp_path / "ran").exists()


# Averages


@pytest.mark.parametrize("name", ["ema.safetensors", "model_ema.safetensors", "best_ema.safetensors"])
def test_average_in_a_folder(upstreams, averaged, published, name):
    save_file(averaged.state_dict(), upstreams / name)
    same(TinyFlux.from_pretrained(upstreams, ema=True), averaged)
    same(TinyFlux.from_pretrained(upstreams, ema=name), averaged)
    same(TinyFlux.from_pretrained(upstreams / "model.safetensors", ema=name), averaged)
    same(TinyFlux.from_pretrained(upstreams), published)


def test_average_in_a_trainers_file(tmp_path, averaged, published):
    content = {"model": published.state_dict(), "ema": {"shadow": averaged.state_dict(), "decay": 0.999}}
    torch.save(content, tmp_path / "best.pt")
    same(TinyFlux.from_pretrained(tmp_path / "best.pt", ema=True), averaged)
    same(TinyFlux.from_pretrained(tmp_path / "best.pt"), published)
    save_file(averaged.state_dict(), tmp_path / "best_ema.safetensors")
    same(TinyFlux.from_pretrained(tmp_path / "best.pt", ema=True), averaged)


def test_no_average(upstreams, published):
    with pytest.raises(CheckpointError, match=r"ema\.safetensors"):
        load_tinyflux(upstreams, ema=True)
    with pytest.raises(CheckpointError, match=r"best_ema\.safetensors"):
        load_tinyflux(upstreams, ema="best_ema.safetensors")
    with pytest.raises(CheckpointError, match=r"model_ema\.safetensors"):
        load_tinyflux(upstreams / "model.safetensors", ema=True)
    for content in ({"model": published.state_dict()}, published.state_dict()):
        torch.save(content, upstreams / "best.pt")
        with pytest.raises(CheckpointError, match="averaged"):
            load_tinyflux(upstreams / "best.pt", ema=True)
    for name in ("a_ema.safetensors", "b_ema.safetensors"):
        save_file(published.state_dict(), upstreams / name)
    with pytest.raises(CheckpointError, match=r"a_ema\.safetensors, b_ema\.safetensors"):
        load_tinyflux(upstreams, ema=True)


# The hub


@pytest.fixture
def hub(upstreams, averaged, monkeypatch):
    """A repository `owner/student` that serves the folder's files, and a list of what was asked for."""
    save_file(averaged.state_dict(), upstreams / "ema.safetensors")
    asked = []

    def download(repository, name, subfolder=None, **kwargs):
        asked.append((repository, name, kwargs))
        if not (upstreams / name).is_file():
            raise EntryNotFoundError(f"{repository} has no {name}")
        return str(upstreams / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


def test_hub(hub, published, averaged):
    same(TinyFlux.from_pretrained("owner/student", revision="main"), published)
    assert hub[0] == ("owner/student", "model_index.json", {"revision": "main"})  # a whole pipeline's
    assert hub[1] == ("owner/student", "diffusion_pytorch_model.safetensors", {"revision": "main"})
    assert [name for _, name, _ in hub[-2:]] == ["model.safetensors", "config.json"]
    same(load_tinyflux("owner/student", ema=True), averaged)
    with pytest.raises(CheckpointError, match="best_ema"):
        load_tinyflux("owner/student", ema="best_ema.safetensors")


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such/place at all; give a folder, a file, a hub id"):
        load_tinyflux("no such/place at all")
    with pytest.raises(CheckpointError, match="there is no"):
        load_tinyflux(tmp_path)
    with pytest.raises(CheckpointError, match="nobody/has-this-student"):
        load_tinyflux("nobody/has-this-student")  # offline


def test_a_trainers_folder(tmp_path, published, averaged):
    """Upstream's: `final`, or the last step's, or the best weights, with their averages."""
    for kind in ("safetensors", "pt"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(UPSTREAM))

        def write(name, model, folder=folder, kind=kind):
            state = {n: tensor.clone() for n, tensor in model.state_dict().items()}
            if kind == "pt":
                torch.save({"model": state, "step": 3}, folder / f"{name}.pt")
            else:
                save_file(state, folder / f"{name}.safetensors")

        for name in ("best", "epoch_2", "step_900"):
            write(name, averaged)
        write("step_1000", published)
        save_file(averaged.state_dict(), folder / "step_1000_ema.safetensors")
        save_file(published.state_dict(), folder / "best_ema.safetensors")
        same(load_tinyflux(folder), published)
        same(load_tinyflux(folder, ema=True), averaged)
        write("final", averaged)
        same(load_tinyflux(folder), averaged)
        for name in (f"final.{kind}", f"step_1000.{kind}", f"step_900.{kind}", f"epoch_2.{kind}"):
            (folder / name).unlink()
        same(load_tinyflux(folder), averaged)


def test_upstreams_v3(tmp_path):
    """Its predictor has another name, and its gate one dimension."""
    config = v4_config(use_sol_prior=False, use_t5_vec=False, sol_qk_scale=False, sol_hidden_dim=256)
    model = trained(config)
    state = {n.replace("lune_predictor", "expert_predictor"): t for n, t in model.state_dict().items()}
    state["expert_predictor.expert_gate"] = state["expert_predictor.expert_gate"].view(1)
    save_file(state, tmp_path / "model.safetensors")
    same(load_tinyflux(tmp_path / "model.safetensors"), model)
    names = {"lune_expert_dim": "expert_dim", "lune_hidden_dim": "expert_hidden_dim"}
    own = [name for name in UPSTREAM if not name.startswith(("lune_", "sol_", "use_", "freeze_"))]
    v3 = {name: config.to_dict()[name] for name in own} | {"use_expert_predictor": True}
    v3 |= {old: getattr(config, name) for name, old in names.items()}
    (tmp_path / "config.json").write_text(json.dumps(v3))
    same(load_tinyflux(tmp_path), model)


def test_a_file_on_the_hub_has_its_config_at_the_top(upstreams, published, monkeypatch):
    import huggingface_hub

    files = {"runs/step_7.safetensors": "model.safetensors", "config.json": "config.json"}

    def download(repo, file, **_):
        if file not in files:
            raise EntryNotFoundError(file)
        return str(upstreams / files[file])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    same(TinyFlux.from_pretrained("owner/student:runs/step_7.safetensors"), published)


# What is refused


def change(folder, **tensors):
    state = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("beside", [True, False], ids=["config.json", "shapes"])
def test_tensors_are_named(upstreams, beside):
    if not beside:
        (upstreams / "config.json").unlink()
    change(upstreams, **{"final_norm.weight": None, "extra.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"missing: final_norm\.weight; unexpected: extra\.weight"):
        TinyFlux.from_pretrained(upstreams)
    change(upstreams, **{"final_norm.weight": torch.zeros(31), "extra.weight": None})
    with pytest.raises(CheckpointError, match=r"misshapen: final_norm\.weight \(31 instead of 32\)"):
        TinyFlux.from_pretrained(upstreams)


def test_five_of_many_are_named(upstreams):
    (upstreams / "config.json").write_text(json.dumps(UPSTREAM | {"num_single_layers": 3}))
    with pytest.raises(CheckpointError, match=r"missing: (single_blocks\.2\.[\w.]+, ){4}.* and 7 more"):
        TinyFlux.from_pretrained(upstreams)


def test_unreadable(upstreams):
    (upstreams / "config.json").write_text(json.dumps(UPSTREAM | {"depth": 3}))
    with pytest.raises(CheckpointError, match="depth"):
        TinyFlux.from_pretrained(upstreams)
    (upstreams / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged: no JSON"):
        TinyFlux.from_pretrained(upstreams)
    (upstreams / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match="cannot be read"):
        TinyFlux.from_pretrained(upstreams)
    (upstreams / "step_3.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"step_3\.pt is damaged or not a torch file"):
        TinyFlux.from_pretrained(upstreams / "step_3.pt")


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="depth"):
        TinyFlux.from_config(new_config().to_dict(), depth=3)
    model = TinyFlux.from_config(new_config(), num_single_layers=1)
    assert len(model.single_blocks) == model.config.num_single_layers == 1


def test_loading_leaves_the_random_state_alone(upstreams):
    before = torch.get_rng_state()
    load_tinyflux(upstreams)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_deep_model_loads_unchanged(tmp_path):
    """All 683 tensors of the published size, in bfloat16 as they are published, strict."""
    torch.manual_seed(0)
    state = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in KEYS["tensors"].items()}
    save_file(state, tmp_path / "model.safetensors")
    model = TinyFlux.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert TinyFluxConfig.from_dict(dict(model.config)) == TinyFluxConfig.deep_v4()
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert_close(loaded[name], tensor, rtol=0, atol=0, check_dtype=False)
