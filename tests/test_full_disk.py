"""A full disk, wherever files are written: one line that names the file or folder, and no part of it left."""

from __future__ import annotations

import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moe_sampler import HybridPipeline, _files
from moe_sampler.cli import app
from moe_sampler.demo import experts_path
from moe_sampler.demo.export import export_experts
from moe_sampler.tinyflux import TinyFlux, TinyFluxConfig
from moe_sampler.training.run_folder import RunFolder

sys.path.insert(0, str(Path(__file__).parent / "training"))
from training_helpers import Points

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def full_disk(limit: int):
    """Files end at so many bytes, as they do in the middle of one on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def one_line(arguments, limit: int) -> str:
    with full_disk(limit):
        result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and "cannot be written: " in line
    return line.removeprefix("error: ").split(" cannot be written")[0]


MAKE = ["generate", "a castle", "--steps", 2, "--zoom", 1, "--device", "cpu"]


@pytest.mark.parametrize(
    ("command", "limit", "named", "left"),
    [
        ([*MAKE, "-o", "x.png"], 2000, "x.png", []),
        ([*MAKE, "-o", "x.jpg"], 500, "x.jpg", []),
        ([*MAKE, "-o", "x.webp"], 500, "x.webp", []),
        ([*MAKE, "-o", "x.safetensors"], 500, "x.safetensors", []),
        ([*MAKE, "--trace", "-o", "x.png"], 16_000, "x.trace.png", ["x.png"]),
        ([*MAKE, "--animate", "-o", "x.jpg"], 5000, "x.webp", ["x.jpg"]),
        (["compare", "a castle", "--steps", 2, "-o", "x.png"], 2000, "x.png", []),
        (["plan", "--image", "x.png"], 2000, "x.png", []),
    ],
    ids=["png", "jpeg", "webp", "latents", "trace", "animation", "comparison", "plan"],
)
def test_images(tmp_path, monkeypatch, command, limit, named, left):
    monkeypatch.chdir(tmp_path)
    assert one_line(command, limit) == named
    assert files(tmp_path) == left


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / "whole"
    result = CliRunner().invoke(app, ["tinyflux", "cache", str(folder), "--demo", "--count", "2"])
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize(
    ("limit", "named"), [(5, "c/building"), (300, "c/manifest.json"), (16_000, "c/shard-00000.safetensors")]
)
def test_caching_can_be_continued(tmp_path, monkeypatch, cache, limit, named):
    monkeypatch.chdir(tmp_path)
    command = ["tinyflux", "cache", "c", "--demo", "--count", "2"]
    assert one_line(command, limit) == named
    assert not [name for name in files(tmp_path) if name.endswith((".tmp", "safetensors"))]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "c/shard-00000.safetensors").read_bytes() == (
        cache / "shard-00000.safetensors"
    ).read_bytes()


def test_exporting_a_cache_writes_all_or_nothing(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    command = ["tinyflux", "export", cache, "-o", "up"]
    assert one_line(command, 20_000) == "up/encodings.pt"
    assert not files(tmp_path / "up")
    write = _files.write_whole

    def full_at_the_third(path, save):
        with full_disk(1000) if path.name == "sol.pt" else full_disk(2**40):
            write(path, save)

    with monkeypatch.context() as patch:
        patch.setattr("moe_sampler.tinyflux.features.exchange.write_whole", full_at_the_third)
        assert one_line(command, 2**40) == "up/sol.pt"
    assert not files(tmp_path / "up")
    assert CliRunner().invoke(app, [str(each) for each in command]).exit_code == 0
    assert one_line(["tinyflux", "import", "c", "up"], 3000) == "c/shard-00000.safetensors"
    assert one_line(["tinyflux", "show", cache, "-o", "maps.png"], 2000) == "maps.png"
    assert not [name for name in files(tmp_path) if name.endswith((".tmp", "maps.png", "0.safetensors"))]


@pytest.mark.parametrize("limit", [100, 3000])
@pytest.mark.parametrize("before", [False, True])
def test_saved_models(tmp_path, demo_pipeline, limit, before):
    """What was in the folder is untouched."""
    student = TinyFlux(TinyFluxConfig.demo(num_double_layers=1, num_single_layers=1))
    for name, saved in (("pipeline", demo_pipeline), ("student", student)):
        folder = tmp_path / name
        if before:
            folder.mkdir()
            (folder / "config.json").write_text("before")
        with full_disk(limit), pytest.raises(OSError, match=f"{name} cannot be written: ") as error:
            saved.save_pretrained(folder)
        assert len(str(error.value).splitlines()) == 1
    expected = ["pipeline", "pipeline/config.json", "student", "student/config.json"] if before else []
    assert files(tmp_path) == expected
    assert all((tmp_path / name).is_dir() or (tmp_path / name).read_text() == "before" for name in expected)


def test_a_saved_pipeline_keeps_its_card_and_permissions(tmp_path, demo_pipeline):
    demo_pipeline.save_pretrained(tmp_path / "p")
    (tmp_path / "p" / "README.md").write_text("mine")
    demo_pipeline.save_pretrained(tmp_path / "p")
    assert (tmp_path / "p" / "README.md").read_text() == "mine"
    (tmp_path / "plain").mkdir()
    for folder in ("p", "p/unet_sol"):
        assert (tmp_path / folder).stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("limit", [50, 300])
def test_the_best_and_the_final_model_of_a_run(tmp_path, limit):
    """The one before stays; the limit is met in the config (smaller) or in the weights."""
    run, tensors = RunFolder(tmp_path / "run", Points()), {"a": torch.rand(3 if limit == 50 else 3000)}
    run.begin(0, {})
    run.save_best({"a": torch.zeros(1)}, {"loss": 1.0})
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path) if (tmp_path / name).is_file()}
    with full_disk(limit), pytest.raises(OSError, match="run/best cannot be written: ") as error:
        run.save_best(tensors, {"loss": 0.5})
    assert len(str(error.value).splitlines()) == 1
    with full_disk(limit), pytest.raises(OSError, match="run cannot be written: "):
        run.save_final(tensors, "card")
    with full_disk(limit), pytest.raises(OSError, match=r"log\.jsonl cannot be written: "):
        run.log({"step": 1, "text": "x" * 400})
    (tmp_path / "run" / "log.jsonl").unlink()
    after = {name: (tmp_path / name).read_bytes() for name in files(tmp_path) if (tmp_path / name).is_file()}
    assert after == before


def test_a_config_that_does_not_fit_names_the_folder(tmp_path, monkeypatch):
    """A library's own writer doesn't say which file it was."""
    run = RunFolder(tmp_path / "run", Points())
    run.begin(0, {})

    def save_config(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.task.model, "save_config", save_config, raising=False)
    with pytest.raises(OSError, match="run/best cannot be written: No space left on device"):
        run.save_best({"a": torch.zeros(1)}, {})
    assert files(tmp_path / "run") == ["settings.json"]


def test_the_demos_export(tmp_path):
    pipe = HybridPipeline.from_pretrained(experts_path())
    parts = (pipe.vae, pipe.text_encoder, pipe.unet_sol, pipe.unet_lune)
    with full_disk(20_000), pytest.raises(OSError, match="experts cannot be written: ") as error:
        export_experts(tmp_path / "experts", *parts)
    assert len(str(error.value).splitlines()) == 1 and not files(tmp_path)
