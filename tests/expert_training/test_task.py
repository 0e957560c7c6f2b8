"""An expert's training from settings to a folder that the pipeline loads."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from moe_sampler import Expert, ExpertSource, HybridPipeline
from moe_sampler.data.folders import ImageFolder
from moe_sampler.data.scenes import DemoScenes
from moe_sampler.demo import experts_path
from moe_sampler.errors import CheckpointError
from moe_sampler.expert_training import (
    DavidSettings,
    ExpertSettings,
    ExpertTask,
    LatentImages,
    LevelSettings,
    TextStates,
)
from moe_sampler.expert_training.objectives import Objective
from moe_sampler.expert_training.run import load_base, new_task, train_expert
from moe_sampler.expert_training.settings import RunSettings
from moe_sampler.expert_training.task import VALIDATION_LEVELS
from moe_sampler.loading.expert_files import find_training
from moe_sampler.loading.hub import Hub
from moe_sampler.loading.state_dicts import header
from moe_sampler.publishing.upload import Address
from moe_sampler.training.draws import Draws
from moe_sampler.training.run_folder import RunFolder
from moe_sampler.training.settings import SettingsError
from moe_sampler.training.training_settings import TrainingSettings


def settings(folder, steps: int = 2, **groups) -> RunSettings:
    training = TrainingSettings(
        output_dir=folder,
        max_train_steps=steps,
        train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler="constant",
        lr_warmup_steps=0,
        checkpointing_steps=2,
        validation_steps=0,
        sample_steps=0,
        logging_steps=1,
        report_to="none",
    )
    groups.setdefault("expert", ExpertSettings(held_out=6, num_inference_steps=2, num_validation_images=2))
    return RunSettings(training, **groups)


@pytest.fixture(scope="module")
def base():
    return load_base(experts_path(), "new", "sol", seed=4)


def test_a_new_unet_is_the_seeds_and_has_the_bases_shape(base):
    again, other = (load_base(experts_path(), "new", "sol", seed=seed).unet for seed in (4, 5))
    state = base.unet.state_dict()
    assert all(torch.equal(state[key], value) for key, value in again.state_dict().items())
    assert any(not torch.equal(state[key], value) for key, value in other.state_dict().items())
    shipped = load_base(experts_path(), "base", "lune").unet
    expected = load_file(experts_path() / "unet_lune" / "diffusion_pytorch_model.safetensors")
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in expected.items()}
    for key, value in shipped.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[key].float())
    with pytest.raises(CheckpointError):
        load_base(experts_path() / "vae", "new", "sol")


def test_david_trains_along_and_a_stopped_run_goes_on_to_the_same_bits(tmp_path, base):
    """The probes and what they expect are in the checkpoints, too."""
    david = DavidSettings(use_david=True, structure_classes=3, probe_bins=4)
    made = {}
    for name, parts in (("whole", (4,)), ("halves", (2, 4))):
        for steps in parts:
            own = settings(tmp_path / name, steps, david=david)
            fresh = load_base(experts_path(), "base", "sol")
            task = new_task("sol", DemoScenes(20), fresh, own)
            before = {key: value.clone() for key, value in task.model.assessor.state_dict().items()}
            result = train_expert(task, own, quiet=True)
            assert result["step"] == steps
        made[name] = tmp_path / name
    files = ("diffusion_pytorch_model.safetensors", "assessor.safetensors")
    for file in files:
        whole, halves = (load_file(folder / file) for folder in made.values())
        assert whole.keys() == halves.keys()
        assert all(torch.equal(whole[key], halves[key]) for key in whole)
    assert whole.keys() == {f"assessor.{key}" for key in before}
    assert any(not torch.equal(whole[f"assessor.{key}"], value) for key, value in before.items())
    assert load_file(made["whole"] / files[0]).keys() == task.unet.state_dict().keys()
    tensors = task.model.state_dict()
    upload = RunFolder(tmp_path / "up", task, {}).save_upload(tensors, "card")
    assert load_file(upload / files[0]).keys() == task.unet.state_dict().keys()
    assert task.published(Address("up"), None).files == ("scheduler_config.json",), "and no assessor"
    mine = ExpertSource(upload)
    found = HybridPipeline.from_pretrained(experts_path(), experts={"mine": mine}).scheduler_mine.config
    assert found["prediction_type"] == "v_prediction", "its folder says how it was trained, whatever its name"
    pipe = HybridPipeline.from_pretrained(experts_path(), experts={"sol": ExpertSource(made["whole"])})
    trained = load_file(made["whole"] / files[0])
    for key, value in pipe.unet_sol.state_dict().items():
        assert torch.equal(value, trained[key])
    said, _ = header(made["whole"] / files[0])
    assert said["modelspec.prediction_type"] == "v" and said["modelspec.title"] == "whole"
    record = json.loads((made["whole"] / "settings.json").read_text())
    assert record["david"]["use_david"] and record["training"]["max_train_steps"] == 4


@pytest.mark.parametrize("kind, prediction", [("lune", "flow_prediction"), ("epsilon", "epsilon")])
def test_the_folder_says_what_the_expert_was_trained_on(tmp_path, kind, prediction):
    own = settings(tmp_path, 1, levels=LevelSettings(shift=2.5))
    task = new_task(kind, DemoScenes(12), load_base(experts_path(), "new", kind), own)
    result = train_expert(task, own, quiet=True)
    assert set(result["validation"]) == {"loss", *(f"x0_error/{level:g}" for level in VALIDATION_LEVELS)}
    assert list((tmp_path / "samples").glob("*.png"))
    for folder in (tmp_path, tmp_path / "best"):
        pipe = HybridPipeline.from_pretrained(experts_path(), experts={"mine": folder})
        mine = pipe.experts()[-1]
        assert (mine.name, mine.prediction) == ("mine", prediction)
        assert mine.shift == 2.5 or kind == "epsilon"
        said, _ = header(folder / "diffusion_pytorch_model.safetensors")
        assert said["modelspec.prediction_type"] == prediction.removesuffix("_prediction")
        alone = find_training("mine", folder / "diffusion_pytorch_model.safetensors", Hub())
        found = Expert.from_scheduler_config("mine", alone, mine.model, dtype=mine.dtype)
        assert found == dataclasses.replace(mine, guidance_scale=found.guidance_scale)


class Told:
    """A text encoder that remembers what it was told."""

    def __init__(self, one: torch.Tensor) -> None:
        self.one, self.texts, self.known = one, [], []

    def __call__(self, texts, device="cpu"):
        self.texts += texts
        return self.one.expand(len(texts), -1, -1)

    def table(self, texts):
        self.known = list(texts)
        return self

    def states(self, rows):
        return self([self.known[row] for row in rows])


def small_task(dropout: float = 0.25, **more) -> ExpertTask:
    unet = load_base(experts_path(), "new", "lune").unet
    generator = torch.Generator().manual_seed(0)
    data = LatentImages(torch.randn(40, 4, 8, 8, generator=generator), [f"{i}" for i in range(40)], {})
    states = torch.zeros(1, 4, unet.config.cross_attention_dim)
    own = ExpertSettings(caption_dropout=dropout)
    return ExpertTask(unet, Objective("lune"), data, Told(states), own, **more)


def test_captions_are_dropped_as_often_as_they_should():
    task = small_task()
    batch = torch.utils.data.default_collate([task.data[i] for i in range(40)])
    with torch.no_grad():
        for step in range(5):
            task.loss(task.model, batch, Draws(0, step, range(40), 40))
    texts = task.text.texts
    kept = [text for text in texts if text]
    assert 30 < len(texts) - len(kept) < 70, "a quarter of two hundred"
    assert all(text in ("", str(i % 40)) for i, text in enumerate(texts))


def test_a_batch_is_the_same_in_parts():
    """The loss of a global batch is the mean of its micro-batches', whichever process computes them."""
    task = small_task(0.5)
    task.model.eval()
    batch = torch.utils.data.default_collate([task.data[i] for i in range(8)])
    with torch.no_grad():
        whole = task.loss(task.model, batch, Draws(2, 1, range(8), 8))
        parts = [
            task.loss(
                task.model,
                {key: value[start : start + 4] for key, value in batch.items()},
                Draws(2, 1, range(start, start + 4), 8),
            )
            for start in (0, 4)
        ]
    torch.testing.assert_close(whole.per_sample, torch.cat([part.per_sample for part in parts]))
    assert torch.equal(whole.noise, torch.cat([part.noise for part in parts]))
    assert float(whole.loss) == pytest.approx(float(whole.per_sample.mean()), rel=1e-6)


def test_validation_is_that_of_a_perfect_and_of_an_ignorant_model():
    task = small_task()
    task.held_out = task.data
    x0 = task.data.latents

    class Perfect(torch.nn.Module):
        def __init__(self, right: bool) -> None:
            super().__init__()
            self.anchor, self.right, self.seen = torch.nn.Parameter(torch.zeros(())), right, 0

        def forward(self, sample, timestep, states, return_dict):
            start = self.seen % 40
            self.seen += len(sample)
            own, s = x0[start : start + len(sample)], (timestep / 1000).view(-1, 1, 1, 1)
            return ((sample - own) / s if self.right else sample / s,)  # u of the right x0, or of zero

    perfect, ignorant = (task.validate(Perfect(right)) for right in (True, False))
    assert perfect["loss"] < 1e-6 and max(perfect.values()) < 1e-6
    for level in VALIDATION_LEVELS:
        assert ignorant[f"x0_error/{level:g}"] == pytest.approx(float(x0.square().mean()), rel=1e-3)
    task.held_out = None
    assert task.validate(task.model) == {} and task.samples(task.model) == []


def test_validation_adds_a_noise_of_its_own_to_every_image():
    """The same one at every level and in every validation, so that their errors can be compared."""
    task = small_task()
    task.held_out = task.data
    x0 = task.data.latents

    class Seen(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchor, self.noise = torch.nn.Parameter(torch.zeros(())), []

        def forward(self, sample, timestep, states, return_dict):
            start, s = sum(map(len, self.noise)) % 40, (timestep / 1000).view(-1, 1, 1, 1)
            self.noise.append((sample - (1 - s) * x0[start : start + len(sample)]) / s)
            return (torch.zeros_like(sample),)

    model = Seen()
    for _ in range(2):
        task.validate(model)
    found = torch.cat(model.noise).view(2 * len(VALIDATION_LEVELS), 40, -1)
    torch.testing.assert_close(found, found[:1].expand_as(found), rtol=0, atol=1e-4)
    alike = torch.corrcoef(found[0]) - torch.eye(40)
    assert alike.abs().max() < 0.4, "256 numbers an image, and no two images share theirs"
    assert abs(float(found[0].mean())) < 0.05 and float(found[0].std()) == pytest.approx(1.0, abs=0.05)


def test_text_states_are_the_pipelines(demo_pipeline):
    texts = ["a castle", "", "a city street at night"]
    states = TextStates(demo_pipeline.text_encoder, demo_pipeline.tokenizer)(texts)
    torch.testing.assert_close(states, demo_pipeline.encode_texts(texts))


def test_what_does_not_fit_is_refused(base):
    objective = Objective("sol")
    text = base.text
    three = LatentImages(torch.zeros(2, 3, 8, 8), ["", ""], {})
    with pytest.raises(SettingsError, match="3 channels, the UNet takes 4"):
        ExpertTask(base.unet, objective, three, text)
    four = LatentImages(torch.zeros(2, 4, 8, 8), ["", ""], {})
    with pytest.raises(SettingsError, match="structure_below needs"):
        ExpertTask(base.unet, objective, four, text, ExpertSettings(structure_below=0.5))


def test_captions_that_are_cut_are_counted_once_a_run(tmp_path, base, caplog):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "abcd":
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("castle " * (60 if name in "bd" else 1))
    own = settings(tmp_path / "run", 2, expert=ExpertSettings(held_out=1, num_validation_images=0))
    for _ in range(2):  # encoded, and read again
        caplog.clear()
        task = new_task("sol", ImageFolder(folder), base, own)
        train_expert(task, own, quiet=True)
        assert [record.getMessage() for record in caplog.records if "longer" in record.getMessage()] == [
            f"2 of 4 captions are longer than CLIPTextModel's {base.text.tokenizer.model_max_length} tokens "
            "and are cut there: b.png, d.png"
        ]
