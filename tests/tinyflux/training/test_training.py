"""Training a student as a user does: a cache, a TOML file, a command; then sampling with what came of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import command, run
from safetensors.torch import load_file
from tinyflux_helpers import demo_cache, tables
from typer.testing import CliRunner

from moe_sampler.cli import app
from moe_sampler.kernels import philox_normal
from moe_sampler.tinyflux import FeatureCache, LiveTeachers, ObjectiveSettings, TinyFlux
from moe_sampler.tinyflux.training.run import _check_data, new_task, train
from moe_sampler.tinyflux.training.settings import StudentSettings
from moe_sampler.training import Draws, SettingsError
from moe_sampler.training.settings import from_tables, help_of, to_tables


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """20 scenes as 8×8 latents."""
    return demo_cache(tmp_path_factory.mktemp("data") / "cache", 20, "--dtype", "float32")


def settings(cache: Path, folder: Path, **changes) -> StudentSettings:
    return from_tables(StudentSettings, tables(cache, folder, **changes))


def toml(values: dict) -> str:
    return "\n".join(
        f"[{name}]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in group.items())
        for name, group in values.items()
    )


def test_the_command_trains_a_student_that_samples(cache, tmp_path):
    config, folder = tmp_path / "student.toml", tmp_path / "student"
    config.write_text(toml(tables(cache, tmp_path / "elsewhere", objective={"distill_weight": 0.5})))
    flags = ["--output-dir", str(folder), "--max-train-steps", "3", "--sol-weight-map", "0.5"]
    result = CliRunner().invoke(app, ["tinyflux", "train", str(config), *flags])
    assert result.exit_code == 0, result.output
    assert (
        "trained to step 3" in result.output
        and "noise 0.7" in result.output
        and not (tmp_path / "elsewhere").exists()
    )
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert trained[-1].keys() >= {"velocity", "lune", "sol_stats", "sol_map", "distill", "by_noise"}
    assert lines[-1]["validation"].keys() == {"loss", "noise 0.3", "noise 0.7"}
    assert Image.open(folder / "samples" / "step-000003.png").size == (64, 64)  # four of 32 pixels
    card = (folder / "README.md").read_text()
    for said in ("objective.distill_weight | 0.5", "demo scenes", "held-out samples | 4", "validation loss"):
        assert said in card
    student = TinyFlux.from_pretrained(folder)
    average = load_file(folder / "checkpoint-3" / "ema.safetensors")
    assert torch.equal(student.state_dict()["img_in.weight"], average["img_in.weight"])
    assert not torch.equal(
        average["img_in.weight"], load_file(folder / "checkpoint-3" / "model.safetensors")["img_in.weight"]
    )
    words = [
        "tinyflux",
        "sample",
        "a castle",
        "--student",
        str(folder),
        "--steps",
        "2",
        "-o",
        str(tmp_path / "a.png"),
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "a.png").size == (512, 512)  # enlarged to be looked at


class PowerCut(BaseException):
    pass


def test_a_student_resumes_to_the_same_bits(cache, tmp_path, monkeypatch):
    """With everything that draws random numbers: dropout, live teachers, routed experts, a sheet."""
    changes = {
        "objective": {"distill_weight": 0.5, "velocity_loss": "huber", "min_snr_gamma": 5.0},
        "teachers": {"features": "live"},
        "training": {"sample_steps": 2, "validation_steps": 2},
    }
    whole, broken = (settings(cache, tmp_path / name, **changes) for name in ("whole", "broken"))
    train(whole, quiet=True)
    task = new_task(broken)
    loss = type(task).loss

    def cut(self, model, batch, draws):
        if draws.step == 3:
            raise PowerCut
        return loss(self, model, batch, draws)

    monkeypatch.setattr(type(task), "loss", cut)
    with pytest.raises(PowerCut):
        train(broken, quiet=True)
    monkeypatch.undo()
    train(broken, quiet=True)
    for name in ("model", "ema", "optimizer", "random-0"):
        ours, theirs = (
            (tmp_path / run / "checkpoint-4" / f"{name}.safetensors").read_bytes()
            for run in ("whole", "broken")
        )
        assert ours == theirs, name


def test_activations_computed_twice_train_the_same(cache, tmp_path):
    for name, twice in (("kept", False), ("twice", True)):
        changes = {"gradient_checkpointing": twice, "max_train_steps": 2}
        train(
            settings(cache, tmp_path / name, training=changes, validation={"prompts": ["a castle"]}),
            quiet=True,
        )
    kept, twice = (
        load_file(tmp_path / name / "checkpoint-2" / "model.safetensors") for name in ("kept", "twice")
    )
    for name, tensor in kept.items():
        torch.testing.assert_close(twice[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_live_and_cached_teachers_make_the_same_loss(cache, tmp_path):
    cached = new_task(settings(cache, tmp_path / "a"))
    live = new_task(settings(cache, tmp_path / "a", teachers={"features": "live"}))
    manifest = FeatureCache(cache).manifest
    live.teachers = LiveTeachers(
        live.teachers._experts, t_buckets=manifest.t_buckets, seed=manifest.settings["seed"]
    )
    batch = torch.utils.data.default_collate([cached.data[i] for i in range(6)])
    draws = Draws(0, 0, range(6), 6)
    with torch.no_grad():
        ours, theirs = (task.loss(task.model.eval(), batch, draws) for task in (cached, live))
    assert ours.terms.keys() == theirs.terms.keys() == {"velocity", "lune", "sol_stats", "sol_map"}
    for name, value in ours.terms.items():
        assert value.item() == pytest.approx(theirs.terms[name].item(), rel=1e-3, abs=1e-5)


def test_validation_is_the_velocitys_error_on_held_out_samples(cache, tmp_path):
    """A new student answers zero, so its error is the mean square of data - noise itself."""
    task = new_task(settings(cache, tmp_path / "a"))
    found = task.validate(task.model.eval())
    data = FeatureCache(cache)
    held = torch.stack([data[i]["latents"] for i in range(16, 20)]).double()
    noise = philox_normal(held.shape, [2**40 + i for i in range(4)]).double()
    expected = (held - noise).square().mean().item()
    assert found["noise 0.3"] == pytest.approx(expected, rel=1e-5)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found == task.validate(task.model)
    for size in (1, 3):  # a sample's noise is its own, whatever it is computed with
        task.validation_batch_size = size
        assert task.validate(task.model) == pytest.approx(found, rel=1e-5)
    for nothing in (None, []):
        task.held_out = nothing
        assert task.validate(task.model) == {} and task.describe()["held-out samples"] == 0


def replicated(two: dict, folder: Path) -> None:
    """The command, with the variables that `accelerate launch` sets."""
    (folder / "two.toml").write_text(toml(two))
    done = run(command, ["tinyflux", "train", str(folder / "two.toml")], processes=2)
    assert done.codes == [0, 0], done.stderr[-3000:]


def sharded(two: dict, folder: Path) -> None:
    done = run(train, from_tables(StudentSettings, two), processes=2, ACCELERATE_USE_FSDP="true")
    assert done.codes == [0, 0], done.stderr[-3000:]


@pytest.mark.parametrize(("steps", "begin"), [(20, replicated), (3, sharded)], ids=["DDP", "FSDP"])
def test_two_processes_train_as_one(cache, tmp_path, steps, begin):
    """With the same global batch, by gloo. The checkpoint of two, FSDP's too, goes on in one process."""
    changes = {"model": {"preset": "demo", "lune_dropout": 0.5}, "data": {"held_out": 0}}
    changes["validation"] = {"prompts": ["a castle"]}
    shared = {"max_train_steps": steps, "checkpointing_steps": steps}
    begin(tables(cache, tmp_path / "two", training=shared | {"train_batch_size": 2}, **changes), tmp_path)
    train(settings(cache, tmp_path / "one", training=shared | {"train_batch_size": 4}, **changes), quiet=True)
    state = json.loads((tmp_path / "two" / f"checkpoint-{steps}" / "state.json").read_text())
    assert (state["processes"], state["samples_a_step"]) == (2, 4)
    ours, theirs = (
        load_file(tmp_path / name / f"checkpoint-{steps}" / "model.safetensors") for name in ("two", "one")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4, msg=name)
    more = {"max_train_steps": steps + 1, "train_batch_size": 4}
    continued = settings(cache, tmp_path / "two", training=shared | more, **changes)
    assert train(continued, quiet=True)["step"] == steps + 1


SIZES = {
    "latents": ("in_channels", 1),
    "prompt_embeds": ("joint_attention_dim", -1),
    "pooled_prompt_embeds": ("pooled_projection_dim", -1),
    "lune": ("lune_expert_dim", -1),
    "sol_maps": ("sol_spatial_size", -1),
}


def test_every_size_of_a_cache_is_the_students(cache, tmp_path):
    model = new_task(settings(cache, tmp_path / "run")).model
    for name, (setting, axis) in SIZES.items():
        data = FeatureCache(cache, verify=False)
        data.shapes = {name: [*shape] for name, shape in data.shapes.items()}
        _check_data(model, data)
        data.shapes[name][axis] += 1
        wrong, right = data.shapes[name][axis], model.config[setting]
        said = rf"has {name} of {wrong}, but the student's {setting} is {right}: these data are of other"
        with pytest.raises(SettingsError, match=said):
            _check_data(model, data)
        del data.shapes[name]  # what a cache doesn't have fits
        _check_data(model, data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"held_out": 20}}, "there are 20 samples in all"),
        ({"data": {"caches": []}}, "give caches"),
        ({"model": {"preset": "demo", "init_from": "x", "qk_norm": True}}, "leave out qk_norm"),
        ({"model": {"preset": "demo", "use_lune_expert": False}}, "set lune_weight to 0"),
        ({"objective": {"distill_weight": 2.0}}, "between 0 and 1"),
        ({"validation": {"noise_levels": [1.0]}}, "between 0 and 1"),
        ({"validation": {"prompts": ["a", "night \udcff"]}}, "prompts holds half a surrogate pair"),
        ({"objective": {"lune_wieght": 1.0}}, 'did you mean "lune_weight"'),
    ],
)
def test_what_cannot_work_is_said_before_any_work(cache, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(settings(cache, tmp_path / "run", **changes), quiet=True)
    assert not (tmp_path / "run").exists()


def test_experts_of_another_latent_space_are_refused(cache, tmp_path):
    path = tmp_path / "copy"
    path.mkdir()
    for file in cache.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["encoders"]["vae"]["fingerprint"] = "0" * 64
    (path / "manifest.json").write_text(json.dumps(manifest))
    changes = {"objective": {"distill_weight": 0.5}}
    with pytest.raises(ValueError, match="another VAE"):
        train(settings(path, tmp_path / "run", **changes), quiet=True)


def test_all_settings_are_explained_and_go_to_tables_and_back(cache, tmp_path):
    for _, (group, _) in help_of(StudentSettings).items():
        assert all(len(text) > 5 for _, text in help_of(group).values()), group
    whole = settings(cache, tmp_path, objective=to_tables(ObjectiveSettings()))
    assert from_tables(StudentSettings, to_tables(whole)) == whole
    with pytest.raises(SettingsError, match=r"training\.output_dir"):
        from_tables(StudentSettings, {"training": {}, "data": {"caches": ["x"]}})


def test_an_epoch_has_some_caches_more_often(cache, tmp_path):
    data = {"caches": [str(cache), str(cache)], "repeats": [1, 3], "held_out": 5}
    task = new_task(settings(cache, tmp_path, data=data))
    assert [*task.data.indices] == [*range(20), *[*range(20, 35)] * 3]
    assert [*task.held_out.indices] == [*range(35, 40)]
    assert task.describe()["repeats"] == [1, 3]
    for repeats, message in (([1], "repeats has 1 numbers for 2 caches"), ([1, 0], "at least 1")):
        with pytest.raises(SettingsError, match=message):
            settings(cache, tmp_path, data=data | {"repeats": repeats})
