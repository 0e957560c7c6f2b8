"""LoRAs of the student: every format read, the product by hand, put on and taken off, merged; and trained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file, save_file
from tinyflux_helpers import demo_cache, inputs_of, new_config, trained
from typer.testing import CliRunner

from moe_sampler.cli import app
from moe_sampler.errors import CheckpointError
from moe_sampler.tinyflux import TinyFlux, TinyFluxConfig
from moe_sampler.tinyflux.model import lora
from moe_sampler.tinyflux.training.run import new_task, train
from moe_sampler.tinyflux.training.settings import StudentSettings
from moe_sampler.training import SettingsError
from moe_sampler.training.settings import from_tables

pytest.importorskip("peft")

QKV, FC = "double_blocks.1.attn.img_qkv", "single_blocks.0.mlp.fc1"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def pairs(seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of two layers, of ranks 3 and 5."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: 0.3 * torch.randn(*shape, generator=generator)  # noqa: E731
    return {QKV: (draw(3, 32), draw(96, 3)), FC: (draw(5, 32), draw(128, 5))}


def written(path: Path, style: str = "ours", alpha: float | None = 6.0, seed: int = 0) -> Path:
    tensors, metadata = {}, None
    for layer, (a, b) in pairs(seed).items():
        flat = layer.replace(".", "_")
        names = {
            "ours": (f"diffusion_model.{layer}.lora_A.weight", f"diffusion_model.{layer}.lora_B.weight"),
            "bare": (f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"),
            "peft": (f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"),
            "diffusers": (f"transformer.{layer}.lora_A.weight", f"transformer.{layer}.lora_B.weight"),
            "kohya": (f"lora_unet_{flat}.lora_down.weight", f"lora_unet_{flat}.lora_up.weight"),
            "upstream": (f"{flat}.lora_A", f"{flat}.lora_B"),
        }[style]
        tensors |= dict(zip(names, (a, b), strict=True))
        if alpha is not None:
            tensors[re.sub(r"\.lora_.*", ".alpha", names[0])] = torch.tensor(alpha)
    if style == "upstream":
        metadata = {"config_json": json.dumps({"defaults": {"rank": 3, "alpha": 3.0}, "targets": []})}
    save_file(tensors, path, metadata)
    return path


def by_hand(student: TinyFlux, scale: float = 1.0, alpha: float | None = 6.0, seed: int = 0) -> TinyFlux:
    """Another student, with scale·alpha/rank·B·A added."""
    made = TinyFlux(new_config()).eval()
    made.load_state_dict(student.state_dict())
    for layer, (a, b) in pairs(seed).items():
        factor = scale * (1.0 if alpha is None else alpha / len(a))
        with torch.no_grad():
            made.get_submodule(layer).weight.add_(factor * (b.double() @ a.double()).float())
    return made


def same(one: TinyFlux, other: TinyFlux) -> None:
    inputs = inputs_of(new_config())
    torch.testing.assert_close(one(**inputs).sample, other(**inputs).sample, **CLOSE)


@pytest.mark.parametrize("style", ["ours", "bare", "peft", "diffusers", "kohya", "upstream"])
def test_every_format_is_read(tmp_path, style):
    student = trained(new_config())
    alpha = None if style in ("upstream", "peft") else 6.0
    layers = lora.read_lora(written(tmp_path / "lora.safetensors", style, alpha), student)
    expected = by_hand(student, 0.5, alpha)
    lora.put_lora(student, layers, scale=0.5)
    same(student, expected)
    lora.take_lora(student)
    lora.merge_lora(student, layers, 0.5)
    same(student, expected)
    assert student.state_dict().keys() == expected.state_dict().keys()


def test_adapters_are_put_on_switched_and_taken_off(tmp_path):
    student = trained(new_config())
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    first, second = (written(tmp_path / f"{i}.safetensors", seed=i) for i in range(2))
    lora.put_lora(student, lora.read_lora(first, student), "a")
    lora.put_lora(student, lora.read_lora(second, student), "b", 0.3)
    plain = TinyFlux(new_config()).eval()
    plain.load_state_dict(before)
    same(student, by_hand(by_hand(plain), 0.3, seed=1))
    lora.set_scales(student, {"b": 2.0})
    same(student, by_hand(plain, 2.0, seed=1))
    lora.set_scales(student, {})
    same(student, plain)
    with pytest.raises(ValueError, match="no adapter 'c', but a, b"):
        lora.set_scales(student, {"c": 1.0})
    with pytest.raises(ValueError, match="'a' already"):
        lora.put_lora(student, lora.read_lora(first, student), "a")
    lora.take_lora(student)
    after = student.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    lora.put_lora(student, lora.read_lora(second, student), "b", 0.3)
    lora.fuse_lora(student)
    same(student, by_hand(plain, 0.3, seed=1))
    assert student.state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"diffusion_model.{QKV}.lora_B.weight"), f"half of a pair: {QKV}"),
        (lambda t: t.update(other=torch.zeros(1)), "of no layer: other"),
        (lambda t: t.update({f"{FC}.lora_A.weight": torch.zeros(5, 31)}), f"misshapen: {FC}"),
        (lambda t: t.clear() or t.update({f"{FC}.alpha": torch.ones(())}), "it has no adapters"),
    ],
)
def test_what_is_no_lora_of_this_student_is_refused(tmp_path, change, message):
    path = written(tmp_path / "lora.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"no LoRA of this TinyFlux; .*{re.escape(message)}"):
        lora.read_lora(path, trained(new_config()))
    with pytest.raises(CheckpointError, match="pytorch_lora_weights"):
        lora.read_lora(tmp_path, trained(new_config()))


def test_upstreams_alpha_is_in_its_settings(tmp_path):
    path = written(tmp_path / "lora.safetensors", "upstream", None)
    tensors = load(path.read_bytes())  # load_file's would lie in the file, which is written twice
    told = {"defaults": {"rank": 16, "alpha": 32.0}, "targets": []}
    save_file(tensors, path, {"config_json": json.dumps(told)})
    assert {layer.alpha for layer in lora.read_lora(path, trained(new_config())).values()} == {32.0}
    told["targets"] = [{"pattern": "single_blocks.*", "rank": 5}]
    save_file(tensors, path, {"config_json": json.dumps(told)})
    with pytest.raises(CheckpointError, match="several alphas"):
        lora.read_lora(path, trained(new_config()))


def test_new_adapters_change_nothing_and_are_all_that_is_trained():
    student = trained(new_config())
    plain = by_hand(student, 0.0)
    lora.add_lora(student, 4, targets=("qkv", "fc2"), seed=3)
    same(student, plain)
    trainable = {name for name, p in student.named_parameters() if p.requires_grad}
    layers = {re.sub(r"\.lora_[AB].*", "", name) for name in trainable}
    assert layers == {
        *(f"single_blocks.{i}.attn.qkv" for i in range(2)),
        *(f"single_blocks.{i}.mlp.fc2" for i in range(2)),
        *(f"double_blocks.{i}.{kind}_mlp.fc2" for i in range(2) for kind in ("img", "txt")),
    }
    with pytest.raises(ValueError, match="no layer of the blocks is called nothing"):
        lora.add_lora(trained(new_config()), 4, targets=("nothing",))


# A run, as a user has it


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return demo_cache(tmp_path_factory.mktemp("data") / "cache", 10, "--teachers", "none")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "student"
    trained(TinyFluxConfig.demo(num_double_layers=1, num_single_layers=1)).save_pretrained(folder)
    return folder


def settings(cache: Path, base: Path | None, folder: Path, **changes) -> StudentSettings:
    tables = {
        "training": {
            "output_dir": str(folder),
            "max_train_steps": 4,
            "train_batch_size": 4,
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
            "learning_rate": 1e-2,
            "checkpointing_steps": 2,
            "sample_steps": 0,
            "use_ema": False,
            "report_to": "none",
        },
        "data": {"caches": [str(cache)], "held_out": 2},
        "model": {} if base is None else {"init_from": str(base)},
        "lora": {"lora_rank": 3, "lora_alpha": 6.0},
        "objective": {"feature_input": 0.0},
        "validation": {"num_inference_steps": 2, "noise_levels": [0.5]},
    }
    for name, values in changes.items():
        tables[name] |= values
    return from_tables(StudentSettings, tables)


def test_a_run_leaves_a_lora_that_makes_the_student_it_trained(cache, base, tmp_path):
    folder = tmp_path / "lora"
    train(settings(cache, base, folder, training={"max_train_steps": 2}), quiet=True)
    train(settings(cache, base, folder), quiet=True)  # continued
    file = folder / lora.WEIGHTS
    tensors = load_file(file)
    assert {key.partition(".")[0] for key in tensors} == {"diffusion_model"}
    assert {float(tensors[key]) for key in tensors if key.endswith(".alpha")} == {6.0}
    assert not (folder / "config.json").exists() and not (folder / "best" / "config.json").exists()
    assert "LoRA of a TinyFlux student" in (folder / "README.md").read_text()
    # The checkpoint has the student with its adapters; the file on the base is the same.
    kept = load_file(folder / "checkpoint-4" / "model.safetensors")
    task = new_task(settings(cache, base, tmp_path / "other"))
    task.model.load_state_dict(kept)
    student = TinyFlux.from_pretrained(base)
    inputs = inputs_of(TinyFluxConfig.from_dict(dict(student.config)))
    plain = student(**inputs).sample
    merged = tmp_path / "merged"
    result = CliRunner().invoke(app, ["tinyflux", "merge", str(base), str(folder), "-o", str(merged)])
    assert result.exit_code == 0, result.output
    found = TinyFlux.from_pretrained(merged)(**inputs).sample
    torch.testing.assert_close(found, task.model.eval()(**inputs).sample, **CLOSE)
    assert (found - plain).abs().max() > 1e-3
    result = CliRunner().invoke(app, ["tinyflux", "merge", str(base), str(folder), "-o", str(merged)])
    assert result.exit_code == 2 and "exists already" in result.output

    def painted(scale: float) -> bytes:
        path = tmp_path / f"{scale}.png"
        words = ["tinyflux", "sample", "a castle", "--student", str(base), "--steps", "2", "-o", str(path)]
        result = CliRunner().invoke(app, [*words, "--lora", f"{folder}@{scale}"])
        assert result.exit_code == 0, result.output
        return Image.open(path).tobytes()

    assert painted(1.0) != painted(0.0)


def test_a_lora_is_of_a_student(cache, base, tmp_path):
    with pytest.raises(SettingsError, match="say of which student with init_from"):
        settings(cache, None, tmp_path)
    with pytest.raises(SettingsError, match="lora_targets: no layer"):
        new_task(settings(cache, base, tmp_path, lora={"lora_targets": ["nothing"]}))
