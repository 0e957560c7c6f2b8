"""Training: every stage runs, continues to the bit after an interruption, and leaves a loadable folder."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moe_sampler.demo.stages import SHIPPED, Recipe, Workshop
from moe_sampler.demo.train import train_demo
from moe_sampler.demo.training import Schedule, Stage, read_tensors

_SHORT = Schedule(steps=4, learning_rate=1e-3, warmup=2, decay_share=0.5, save_every=3)
TINY = Recipe(
    scenes=12,
    width=8,
    decoder_width=8,
    channels=(8, 16, 16),
    autoencoder=_SHORT,
    autoencoder_batch=2,
    text=_SHORT,
    text_batch=4,
    decoder=_SHORT,
    decoder_batch=2,
    trunk=_SHORT,
    sol=_SHORT,
    lune=_SHORT,
    batch=2,
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


@pytest.mark.parametrize("name", ["autoencoder", "text", "decoder", "trunk", "sol", "lune"])
def test_an_interrupted_stage_continues_to_the_same_bits(trained, tmp_path, name):
    shop = dataclasses.replace(trained, folder=tmp_path)
    for source in ("scenes", "latents.npy", "scale.npy", "tokenizer"):
        (tmp_path / source).symlink_to(trained.folder / source)
    (tmp_path / "checkpoints").mkdir()
    for path in trained.checkpoints.glob("*.safetensors"):
        if path.stem != name:
            (tmp_path / "checkpoints" / path.name).symlink_to(path)
    shop.train(name, stop_at=2)
    assert not shop.finished(name)
    shop.train(name)
    assert shop.finished(name)
    whole, halves = (load_file(s.checkpoints / f"{name}.safetensors") for s in (trained, shop))
    assert whole.keys() == halves.keys()
    for key in whole:
        assert torch.equal(whole[key], halves[key]), key


def test_a_stage_killed_while_writing_keeps_its_last_checkpoint(trained, tmp_path, monkeypatch):
    shop = dataclasses.replace(trained, folder=tmp_path)
    (tmp_path / "scenes").symlink_to(trained.folder / "scenes")
    shop.train("autoencoder", stop_at=2)

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_sampler.demo.training.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        shop.train("autoencoder")
    assert Stage.finished(shop.checkpoints, "autoencoder", 2) and not shop.finished("autoencoder")
    monkeypatch.undo()
    shop.train("autoencoder")
    whole, halves = (
        read_tensors(s.checkpoints / "autoencoder.safetensors", "model.") for s in (trained, shop)
    )
    assert all(torch.equal(whole[key], halves[key]) for key in whole)


def test_every_stage_moves_its_weights_and_only_its_own(trained):
    trunk, sol, lune = (
        read_tensors(trained.checkpoints / f"{n}.safetensors", "ema.") for n in ("trunk", "sol", "lune")
    )
    assert any(not torch.equal(sol[key], lune[key]) for key in sol)
    assert any(not torch.equal(sol[key], trunk[key]) for key in sol)
    decoder = read_tensors(trained.checkpoints / "decoder.safetensors", "model.")
    assert all(key.startswith("decoder.") for key in decoder), (
        "latents must stay valid: the encoder is frozen"
    )


def test_latents_have_unit_variance(trained):
    latents = np.load(trained.latents_file)
    assert latents.shape == (12, 2, 4, 16, 16)
    np.testing.assert_allclose(latents[:, 0].std(), 1.0, rtol=1e-5)


def test_export_makes_a_folder_that_loads(trained, tmp_path):
    from diffusers import AutoencoderTiny, UNet2DConditionModel

    trained.export(tmp_path / "experts")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "experts" / "unet_lune")
    expected = trained.unet("lune").state_dict()
    for key, value in unet.state_dict().items():
        torch.testing.assert_close(value.float(), expected[key].half().float(), rtol=0, atol=0)
    vae = AutoencoderTiny.from_pretrained(tmp_path / "experts" / "vae")
    assert vae.config.scaling_factor == pytest.approx(trained.scaling_factor())
    assert not list(tmp_path.glob(".experts*")), "nothing half-written is left behind"


def test_wrong_arguments_say_so(tmp_path):
    with pytest.raises(ValueError, match="unknown stage"):
        train_demo(tmp_path / "out", work_dir=tmp_path / "work", stage="paint")
    with pytest.raises(ValueError, match='stage "sol" needs stage "scenes" first'):
        train_demo(tmp_path / "out", work_dir=tmp_path / "work", stage="sol", recipe=TINY)
    with pytest.raises(ValueError, match="another seed"):
        train_demo(tmp_path / "out", work_dir=tmp_path / "work", stage="sol", recipe=TINY, seed=9)
    assert not (tmp_path / "out").exists()


def test_the_learning_rate_warms_up_stays_and_decays():
    schedule = Schedule(steps=100, learning_rate=1.0, warmup=10, decay_share=0.5, floor=0.1)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[50] == 1.0
    assert all(a > b for a, b in pairwise(rates[51:]))
    assert 0.1 <= rates[-1] < 0.11
    assert SHIPPED.lune.steps > SHIPPED.sol.steps
