"""One lookup for everything that may be on this machine or on the hub, with one text for each fault."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel

from moe_sampler import ExpertSource, HybridPipeline
from moe_sampler.cli.models import Model
from moe_sampler.demo import experts_path
from moe_sampler.errors import CheckpointError
from moe_sampler.loading.expert_files import find_training
from moe_sampler.loading.hub import Hub, component_patterns
from moe_sampler.loading.presets import training_config
from moe_sampler.tinyflux import StudentEncoders, TextEncoder, TinyFlux, TinyFluxConfig
from moe_sampler.tinyflux.sampling.fitting import default_side

SMALL = dict(hidden_size=32, num_attention_heads=2, attention_head_dim=16, num_double_layers=1)
SMALL |= dict(num_single_layers=1, axes_dims_rope=(4, 6, 6), in_channels=4)


@pytest.fixture
def cache(tmp_path, in_hub_cache) -> Path:
    """A hub's cache: a repository of the demo's experts, and one with a student in a folder of it."""
    files = [file for file in experts_path().rglob("*") if file.is_file()]
    in_hub_cache(tmp_path / "cache", "owner/experts", {str(f.relative_to(experts_path())): f for f in files})
    student = TinyFlux(TinyFluxConfig(**SMALL))
    student.save_pretrained(tmp_path / "student")
    files = {f"small/{file.name}": file for file in (tmp_path / "student").iterdir()}
    in_hub_cache(tmp_path / "cache", "owner/student", files, revision="v2")
    return tmp_path / "cache"


def offline(cache: Path) -> Hub:
    return Hub(cache_dir=cache, local_files_only=True)


def test_a_place(cache, tmp_path):
    place = offline(cache).look("owner/student", revision="v2", subfolder="small")
    assert not place.is_file and place.path is None and place.name == "student"
    assert place.local(["*.json"]).name == "small"
    found = place.need(["nothing.json", "config.json"])
    assert found.parent.name == "small" and found.name == "config.json"
    assert place.first(["nothing.json"]) is None
    file = offline(cache).look("owner/student:small/config.json", revision="v2")
    assert file.is_file and file.local() == found and file.name == "config.json"
    beside = file.need(["diffusion_pytorch_model.safetensors"])  # in the same folder of the repository
    assert beside.parent.name == "small"
    here = Hub().look(tmp_path / "student")
    assert here.local() == tmp_path / "student" and here.need(["config.json"]).is_file()
    assert Hub().look(tmp_path, subfolder="student").local() == tmp_path / "student"


def test_students_and_encoders_are_found_as_experts_are(cache, tmp_path):
    own = dict(cache_dir=cache, local_files_only=True, revision="v2")
    plain = TinyFlux.from_pretrained(tmp_path / "student")
    for source, more in (
        ("owner/student", {"subfolder": "small"}),
        ("owner/student:small/diffusion_pytorch_model.safetensors", {}),
    ):
        student = TinyFlux.from_pretrained(source, **own, **more)
        assert all(torch.equal(t, plain.state_dict()[name]) for name, t in student.state_dict().items())
    found = StudentEncoders.load("owner/experts", "owner/experts", hub=offline(cache))
    assert found.describe() == StudentEncoders.load(experts_path(), experts_path()).describe()
    assert default_side("owner/experts", offline(cache)) == 16


def every_way(source: str, hub: Hub) -> list:
    options = dict(cache_dir=hub.cache_dir, local_files_only=True)
    return [
        lambda: HybridPipeline.from_pretrained(source, **options),
        lambda: HybridPipeline.from_pretrained(experts_path(), lune=source, **options),
        lambda: TinyFlux.from_pretrained(source, **options),
        lambda: TextEncoder.load(CLIPTextModel, source, hub=hub),
        lambda: default_side(source, hub),
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "there is no nowhere; give a folder, a file, a hub id owner/name or a hub file"),
        ("owner/lost", r"owner/lost(:.*)? cannot be had from the hub: "),
    ],
)
def test_the_same_fault_has_the_same_text(cache, source, message):
    for load in every_way(source, offline(cache)):
        with pytest.raises(CheckpointError, match=message):
            load()


def test_a_file_is_no_base(cache):
    file = experts_path() / "unet_sol" / "config.json"
    for load in (lambda: HybridPipeline.from_pretrained(file), Model({"model": str(file)}).training):
        with pytest.raises(CheckpointError, match="is a file: the base is a folder or hub id"):
            load()


def test_what_a_file_was_trained_on_is_its_sources_word(cache):
    """Nothing is read of the file, and nothing beside it counts."""
    file = experts_path() / "unet_sol" / "diffusion_pytorch_model.safetensors"
    for place in (file, "owner/nowhere:sol.safetensors"):
        found = find_training("mine", ExpertSource(place, "lune"), offline(cache))
        assert found == training_config("lune")


def test_what_is_asked_of_the_hub(monkeypatch):
    asked = []

    def snapshot_download(repo, **arguments):
        asked.append((repo, arguments))
        raise OSError("enough")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for hub, expected in (
        (Hub(), {}),
        (Hub("here", True, "secret", True), dict(cache_dir="here", local_files_only=True, token="secret")),
        (Hub(token=False), {"token": False}),
    ):
        with pytest.raises(CheckpointError, match="owner/name cannot be had from the hub: enough"):
            hub.look("owner/name", revision="v3", subfolder="in").local(["*.json"])
        more = {"force_download": True} if hub.force_download else {}
        wanted = {"allow_patterns": ["in/*.json"], "revision": "v3", **expected, **more}
        assert asked.pop() == ("owner/name", wanted)


def test_what_is_replaced_is_not_downloaded(cache, monkeypatch):
    """Of the base on the hub the configs, the shared parts and its own experts' files alone."""
    from huggingface_hub import snapshot_download

    asked = []

    def asking(repo, *, allow_patterns, **arguments):
        asked.extend(allow_patterns)
        return snapshot_download(repo, allow_patterns=allow_patterns, **arguments)

    monkeypatch.setattr("huggingface_hub.snapshot_download", asking)
    local = dict(cache_dir=cache, local_files_only=True)
    for replaced in ({}, {"sol": experts_path() / "unet_sol"}):
        asked.clear()
        pipe = HybridPipeline.from_pretrained("owner/experts", **replaced, **local)
        assert pipe.expert_names == ("sol", "lune")
        parts = {pattern.partition("/")[0] for pattern in asked if pattern.endswith(".safetensors")}
        assert parts >= {"vae", "text_encoder", "unet_lune"} and ("unet_sol" in parts) == (not replaced)


def test_a_components_files():
    patterns = component_patterns("unet", "fp16")
    assert "unet/*.json" in patterns and "unet/diffusion_pytorch_model.fp16.safetensors" in patterns
    assert all(pattern.startswith("unet/") for pattern in patterns)
    assert "model-?????-of-?????.safetensors" in component_patterns()
