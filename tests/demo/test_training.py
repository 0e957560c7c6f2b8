"""Training: every stage runs, continues to the bit after an interruption, and leaves a loadable folder."""

import dataclasses
import multiprocessing
import shutil
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.demo.evaluator import new_evaluator, train_evaluator
from moe_sampler._files import claim
from moe_sampler.demo import stages
from moe_sampler.demo.attributes import labels
from moe_sampler.demo.captions import describe
from moe_sampler.demo.experts import new_unet
from moe_sampler.demo.record import RunRecord
from moe_sampler.demo.scene_task import run_stage, stage_settings
from moe_sampler.demo.scenes import draw_scene
from moe_sampler.demo.stages import QUICK, SHARES, SHIPPED, TRAINED, Recipe, Workshop
from moe_sampler.demo.text import tokenize
from moe_sampler.demo.tokenizer import MAX_LENGTH
from moe_sampler.demo.train import _child, _Run, train_demo
from moe_sampler.demo.weights import read_average, trained_steps
from moe_sampler.demo.words import CAPTIONS
from moe_sampler.expert_training import Captions
from moe_sampler.training import Trainer
from moe_sampler.training.interrupts import Interrupts
from moe_sampler.training.optimization import learning_rate
from moe_sampler.training.training_settings import TrainingSettings


def _short(batch: int) -> dict:
    settings = stage_settings(4, 1e-3, batch, warmup=2, decay_share=0.5)
    return {**settings, "checkpointing_steps": 2, "logging_steps": 1}


TINY = Recipe(
    scenes=12,
    width=8,
    decoder_width=8,
    channels=(8, 16, 16),
    stages={name: _short(4 if name == "text" else 2) for name in TRAINED},
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Workshop:
    """All stages in this process, each without interruption."""
    shop = Workshop(tmp_path_factory.mktemp("whole"), seed=3, recipe=TINY)
    shop.scenes().render(workers=1)
    for name in ("autoencoder", "text"):
        shop.train(name)
    shop.encode()
    for name in ("decoder", "trunk", "sol", "lune"):
        shop.train(name)
    return shop


class Stopped(Exception):
    pass


@pytest.mark.parametrize("name", ["text", "decoder", "sol"])
def test_an_interrupted_stage_continues_to_the_same_bits(trained, tmp_path, name):
    shop = dataclasses.replace(trained, folder=tmp_path)
    for source in ("scenes", "latents.npy", "scale.npy", "text_states.npy", "tokenizer"):
        (tmp_path / source).symlink_to(trained.folder / source)
    shop.checkpoints.mkdir()
    for path in trained.checkpoints.glob("*.safetensors"):
        if path.stem != name:
            (shop.checkpoints / path.name).symlink_to(path)
    task = shop.task(name)
    whole_loss = task.loss

    def loss(model, batch, draws):
        if draws.step == 3:
            raise Stopped
        return whole_loss(model, batch, draws)

    task.loss = loss
    with pytest.raises(Stopped):
        run_stage(task, shop.checkpoints, shop.stage_seed(name), TINY.stages[name])
    assert not shop.finished(name)
    shop.train(name)
    assert shop.finished(name)
    whole, halves = (load_file(s.checkpoints / f"{name}.safetensors") for s in (trained, shop))
    assert whole and whole.keys() == halves.keys()
    for key in whole:
        assert torch.equal(whole[key], halves[key]), key


def test_every_stage_moves_its_weights_and_only_its_own(trained):
    trunk, sol, lune = (
        read_average(trained.checkpoints / f"{name}.safetensors") for name in ("trunk", "sol", "lune")
    )
    assert any(not torch.equal(sol[key], lune[key]) for key in sol)
    assert any(not torch.equal(sol[key], trunk[key]) for key in sol)
    decoder = read_average(trained.checkpoints / "decoder.safetensors")
    assert decoder and all(key.startswith("decoder.") for key in decoder), (
        "latents must stay valid: the encoder is frozen"
    )


def test_sol_alone_sees_structure_pictures(trained):
    """Where there is little noise, and there instead of the full ones."""
    from moe_sampler.training.draws import Draws

    latents = np.load(trained.latents_file)
    for name in ("trunk", "sol", "lune"):
        task = trained.task(name)
        batch = torch.utils.data.default_collate([task.data[i % 12] for i in range(60)])
        levels = task.objective.draw(Draws(0, 0, range(60), 60))
        flat = (levels.noise < 0.65) & (name == "sol")
        assert 10 < int((levels.noise < 0.65).sum()) < 50
        shown = task._data(batch["latents"], batch.get("structure"), levels)
        expected = latents[np.arange(60) % 12, flat.long().numpy()]
        np.testing.assert_array_equal(shown.numpy(), expected)


def test_latents_have_unit_variance(trained):
    latents = np.load(trained.latents_file)
    assert latents.shape == (12, 2, 4, 16, 16)
    np.testing.assert_allclose(latents[:, 0].std(), 1.0, rtol=1e-5)


def test_export_makes_a_folder_that_loads(trained, tmp_path):
    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from safetensors import safe_open
    from transformers import CLIPTextModel

    trained.export(tmp_path / "experts")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "experts" / "unet_lune")
    expected = trained.unet("lune").state_dict()
    for key, value in unet.state_dict().items():
        torch.testing.assert_close(value.float(), expected[key].half().float(), rtol=0, atol=0)
    vae = AutoencoderTiny.from_pretrained(tmp_path / "experts" / "vae")
    assert vae.config.scaling_factor == pytest.approx(trained.scaling_factor())
    with safe_open(tmp_path / "experts" / "text_encoder" / "model.safetensors", framework="pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys()), "as published ones"  # noqa: SIM118
    text = CLIPTextModel.from_pretrained(tmp_path / "experts" / "text_encoder")
    exported = {name: value.float() for name, value in text.state_dict().items()}
    expected = trained.text_trainer().text.state_dict()
    torch.testing.assert_close(exported, {k: v.half().float() for k, v in expected.items()}, rtol=0, atol=0)
    assert not list(tmp_path.glob(".experts*")), "nothing half-written is left behind"


def test_wrong_arguments_say_so(tmp_path):
    with pytest.raises(ValueError, match="minutes must be positive"):
        train_demo(tmp_path / "out", work_dir=tmp_path / "work", minutes=0)
    with pytest.raises(ValueError, match="unknown device"):
        train_demo(tmp_path / "out", work_dir=tmp_path / "work", device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds no CUDA device"):
            train_demo(tmp_path / "out", work_dir=tmp_path / "work", device="cuda")
    assert not (tmp_path / "work").exists(), "before any work"
    with pytest.raises(ValueError, match="unknown stage"):
        train_demo(tmp_path / "out", work_dir=tmp_path / "work", stage="paint")
    with pytest.raises(ValueError, match='stage "sol" needs stage "scenes" first'):
        train_demo(tmp_path / "out", work_dir=tmp_path / "work", stage="sol", recipe=TINY)
    with pytest.raises(ValueError, match="another seed"):
        train_demo(tmp_path / "out", work_dir=tmp_path / "work", stage="sol", recipe=TINY, seed=9)
    assert not (tmp_path / "out").exists()


def test_words_are_the_scenes_own(trained):
    """Texts that are true, their tokens, and classes with one more for what a text leaves out."""
    words, tokenizer = trained.scenes().words, trained.tokenizer()
    assert words.tokens.shape == words.strange.shape == (12, CAPTIONS, MAX_LENGTH)
    for index in (0, 11):
        scene = draw_scene(index)
        for k in range(CAPTIONS):
            text, said = describe(scene, np.random.default_rng([index, 3 + k]))
            assert words.texts[index][k] == text
            np.testing.assert_array_equal(words.tokens[index, k], tokenize(tokenizer, [text])[0].numpy())
            expected = labels([scene], [said])[0].numpy()
            np.testing.assert_array_equal(words.said[index, k], expected)
    assert (words.labels <= words.said.max(1)).all() and (words.strange != words.tokens).any()


def test_text_states_ahead_are_those_of_the_texts(trained):
    states = np.load(trained.states_file)
    captions = Captions.of(trained.scenes().words.texts)
    assert states.dtype == np.float16 and len(states) == len(captions.texts)
    text = trained.text()
    for row in (0, 1, len(states) - 1):
        expected = text([captions.texts[row]])[0].numpy()
        np.testing.assert_allclose(states[row], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", TRAINED)
def test_no_stages_step_waits(trained, silent_device, name):
    task = trained.task(name)
    arguments = TrainingSettings(
        output_dir=trained.folder / f"silent-{name}", seed=0, **trained.settings(name)
    )
    trainer = Trainer(task, arguments, quiet=True)
    batches = iter(trainer.loader())
    for step in range(2):
        with silent_device() as waits:
            trainer.make_step(batches, 1e-4, Interrupts())
        assert step == 0 or waits.found == []  # the first step brings tables to the device


def test_a_timed_run_ends_with_what_fits_and_is_finished(tmp_path):
    """In this process: stages take the time they are given, whatever the recipe says of steps."""
    endless = {**TINY.stages["autoencoder"], "max_train_steps": 10_000}
    recipe = dataclasses.replace(TINY, stages={**TINY.stages, "autoencoder": endless})
    shop = Workshop(tmp_path, seed=3, recipe=recipe, timed=True)
    assert shop.scenes().render(workers=1, until=0.0) == 12, "one shard a worker, however late"
    assert not shop.finished("autoencoder")
    shop.train("autoencoder", deadline=time.time() + 1)
    assert shop.finished("autoencoder")
    assert 1 <= trained_steps(shop.checkpoints / "autoencoder.safetensors") < 10_000


def test_time_is_shared_out_among_the_stages_that_are_left(tmp_path):
    run = _Run(tmp_path, 0, TINY, "cpu", 100.0)
    now = time.time()
    found = run.deadlines([("sol", "decoder"), ("lune",)])
    rest = SHARES["lune"] + SHARES["export"]
    assert found["decoder"] - now == pytest.approx(6000 * SHARES["lune"] / rest, abs=5)
    assert found["lune"] == pytest.approx(found["decoder"], abs=1e-3)
    half = SHARES["sol"] / (SHARES["sol"] + SHARES["decoder"])
    assert found["sol"] - now == pytest.approx(half * (found["lune"] - now), abs=5)
    first = run.deadlines([("scenes",)])["scenes"] - now
    assert first == pytest.approx(6000 * SHARES["scenes"], rel=0.05), "shares add up to about one"
    assert _Run(tmp_path / "x", 0, TINY, "cpu", None).deadlines([("lune",)]) == {}


def test_a_work_folder_remembers_its_run(tmp_path):
    run = _Run(tmp_path, 7, TINY, "cpu", 1.0)
    run.settle_scenes(8)
    record = RunRecord.read(tmp_path)
    assert (record.seed, record.timed, record.large, record.scenes) == (7, True, False, 8)
    dataclasses.replace(record, spent=45.0).write(tmp_path)
    again = _Run(tmp_path, 7, TINY, "cpu", 1.0)
    assert again.workshop.recipe.scenes == 8
    end = max(again.deadlines([("export",)]).values())
    assert end - time.time() == pytest.approx(15, abs=3), "what earlier commands took counts"
    with pytest.raises(ValueError, match="another seed"):
        _Run(tmp_path, 8, TINY, "cpu", 1.0)
    with pytest.raises(ValueError, match="run with --minutes"):
        _Run(tmp_path, 7, TINY, "cpu", None)


def test_a_gpus_settings(tmp_path):
    """Large batches belong to the run, precision to the device."""
    shop = Workshop(tmp_path, recipe=SHIPPED, device="cuda", timed=True)
    lune = TrainingSettings(output_dir=tmp_path, **shop.settings("lune"))
    assert (lune.train_batch_size, lune.mixed_precision) == (512, "bf16")
    here = dataclasses.replace(shop, device="cpu").settings("lune")
    assert here["train_batch_size"] == 512 and "mixed_precision" not in here
    assert dataclasses.replace(shop, recipe=QUICK).settings("lune")["train_batch_size"] == 24


@pytest.mark.parametrize("minutes", [None, 1.0, 9.0])
def test_a_run_keeps_the_recipe_of_the_device_it_began_on(tmp_path, minutes):
    for first, other, recipe in (("cuda", "cpu", SHIPPED), ("cpu", "cuda", QUICK)):
        begun = _Run(tmp_path / first, 0, None, first, minutes).workshop
        later = _Run(tmp_path / first, 0, None, other, minutes).workshop
        assert begun.recipe == later.recipe == recipe
        on_gpu = begun if first == "cuda" else later
        assert on_gpu.compiled == (minutes == 9.0 or (minutes is None and recipe is SHIPPED))
        assert not (begun if first == "cpu" else later).compiled
    assert not _Run(tmp_path / "own", 0, TINY, "cuda", None).workshop.compiled


def test_the_recipes_differ_in_length_and_in_the_optimizer():
    assert dataclasses.replace(QUICK, stages=SHIPPED.stages) == SHIPPED
    lengths = {"max_train_steps", "train_batch_size", "lr_decay_steps"}
    for name in TRAINED:
        quick, shipped = QUICK.stages[name], SHIPPED.stages[name]
        optimizer = {"optimizer", "learning_rate"} if name in ("sol", "lune") else {"optimizer"}
        assert {key for key in quick if quick[key] != shipped.get(key)} == lengths | optimizer
        shares = [own["lr_decay_steps"] / own["max_train_steps"] for own in (quick, shipped)]
        assert shares[0] == pytest.approx(shares[1]), name


@pytest.mark.parametrize("name", ["lune", "sol"])
def test_what_is_compiled_ahead_is_what_the_stage_runs(trained, monkeypatch, name):
    """The same shapes and dtypes, of the same settings: else it would be compiled once more."""
    seen: list = []

    def watched(channels):
        unet = new_unet(channels)
        unet.register_forward_pre_hook(
            lambda module, inputs, named: seen.append(
                [(v.shape, v.dtype, v.stride()) for v in (*inputs, *named.values()) if torch.is_tensor(v)]
            ),
            with_kwargs=True,
        )
        return unet

    monkeypatch.setattr(stages, "new_unet", watched)
    trained.precompile(name)
    settings = {**trained.settings(name), "output_dir": trained.folder / "unused"}
    trainer = Trainer(trained.task(name), TrainingSettings(**settings), quiet=True)
    trainer.make_step(iter(trainer.loader()), 1e-3, Interrupts())
    assert len(seen) == 2 and seen[0] and seen[0] == seen[1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["text", "decoder", "lune"])
def test_what_began_on_cuda_goes_on_on_a_cpu(trained, tmp_path, name):
    """And the other way round; each in a process of its own, as Accelerate keeps one device."""
    for source in ("scenes", "latents.npy", "scale.npy", "text_states.npy", "tokenizer"):
        (tmp_path / source).symlink_to(trained.folder / source)
    (tmp_path / "checkpoints").mkdir()
    for path in trained.checkpoints.glob("*.safetensors"):
        if path.stem != name:
            (tmp_path / "checkpoints" / path.name).symlink_to(path)
    for steps, device in ((4, "cuda"), (5, "cpu"), (6, "cuda")):
        stages = {**TINY.stages, name: {**TINY.stages[name], "max_train_steps": steps}}
        recipe = dataclasses.replace(TINY, stages=stages)
        shop = Workshop(tmp_path, 3, recipe, device)
        process = multiprocessing.get_context("spawn").Process(
            target=_child, args=(shop, (name,), tmp_path / "out", 1, {})
        )
        process.start()
        process.join()
        assert process.exitcode == 0
        assert trained_steps(shop.checkpoints / f"{name}.safetensors") == steps


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_stage_in_a_process_of_its_own(trained, tmp_path, device):
    """As `train_demo` runs them, with its progress read from the log."""
    work = tmp_path / "work"
    claim(work, "demo training")
    for source in ("scenes", "tokenizer"):
        shutil.copytree(trained.folder / source, work / source)
    wanted: dict = {"stage": "autoencoder", "seed": 3, "recipe": TINY, "device": device, "quiet": True}
    made = train_demo(tmp_path / "out", work_dir=work, **wanted)
    assert made == tmp_path / "out"
    theirs, ours = (
        load_file(folder / "checkpoints" / "autoencoder.safetensors") for folder in (work, trained.folder)
    )
    # In bfloat16 a GPU's weights differ from a CPU's, but not by much.
    tolerance = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 0.1, "atol": 0.02}
    torch.testing.assert_close(theirs, ours, **tolerance)


def test_the_learning_rate_warms_up_stays_and_decays(tmp_path):
    settings = stage_settings(100, 1.0, 1, warmup=10, decay_share=0.5, floor=0.1)
    rate = learning_rate(TrainingSettings(output_dir=tmp_path, **settings))
    step = np.arange(100)
    cosine = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * np.clip((step - 50) / 50, 0, 1)))
    expected = np.minimum(1, (step + 1) / 10) * cosine
    # A step sooner or later: the largest slope of the cosine.
    np.testing.assert_allclose([rate(int(i)) for i in step], expected, atol=0.9 * 0.5 * np.pi / 50 + 1e-9)
    assert rate(99) >= 0.1
    assert SHIPPED.steps("lune") > SHIPPED.steps("sol")


def test_a_judge_that_is_trained_is_only_loaded(tmp_path):
    """Also from a file that holds more than the averages."""
    judge = new_evaluator()
    average = {name: torch.full_like(p, 0.25) for name, p in judge.named_parameters()}
    tensors = {f"ema.{name}": value for name, value in average.items()}
    tensors |= {f"model.{name}": torch.zeros_like(value) for name, value in average.items()}
    path = tmp_path / "evaluator.safetensors"
    save_file(tensors, path, {"step": "6000"})
    assert trained_steps(path) == 6000 and trained_steps(tmp_path / "absent.safetensors") == 0
    loaded = train_evaluator(None, tmp_path)
    assert not loaded.training
    assert all(bool((p == 0.25).all()) for p in loaded.parameters())
