"""No step of an expert's training waits for the device."""

import dataclasses

import pytest
import torch
from waits import waits_are_errors

from moe_sampler.architectures.unet import UNET
from moe_sampler.demo import experts_path
from moe_sampler.expert_training import (
    BlockProbes,
    DavidSettings,
    ExpertSettings,
    ExpertTask,
    LatentImages,
    LevelSettings,
    Objective,
    images,
)
from moe_sampler.expert_training.run import load_base
from moe_sampler.training import Trainer, TrainingSettings
from moe_sampler.training.interrupts import Interrupts


def trainer(folder, kind: str, david: bool, levels: LevelSettings) -> Trainer:
    base = load_base(experts_path(), "new", kind)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(6, 4, 16, 16, generator=generator)
    data = LatentImages(latents, [(f"a castle {i}", "a street") for i in range(6)], {}, latents.clone())
    own = DavidSettings(structure_classes=2)
    task = ExpertTask(
        base.unet,
        Objective(kind, levels=levels),
        data,
        base.text,
        ExpertSettings(structure_below=0.5),
        assessor=BlockProbes(UNET.block_channels(base.unet), own) if david else None,
        david=own,
    )
    settings = TrainingSettings(folder, max_train_steps=9, lr_warmup_steps=0, report_to="none")
    return Trainer(task, dataclasses.replace(settings, train_batch_size=2), quiet=True)


@pytest.mark.parametrize(
    "kind, david, levels",
    [
        ("lune", False, LevelSettings(density="focus")),
        ("sol", False, LevelSettings(min_snr_gamma=5.0)),
        ("sol", True, LevelSettings()),
        ("epsilon", False, LevelSettings()),
    ],
)
@pytest.mark.parametrize("resident", [True, False])
def test_a_step_reads_nothing(tmp_path, silent_device, monkeypatch, kind, david, levels, resident):
    if not resident:
        monkeypatch.setattr(images, "RESIDENT_BYTES", 0)
    training = trainer(tmp_path, kind, david, levels)
    batches = iter(training.loader())
    for step in range(3):
        with silent_device() as waits:
            training.make_step(batches, 1e-4, Interrupts())
        # The first step brings tables and the text encoder to the device.
        assert step == 0 or waits.found == []


def test_batches_are_the_same_whether_they_are_gathered_on_the_device_or_before(monkeypatch):
    latents = torch.arange(5.0).view(5, 1, 1, 1)
    for limit in (images.RESIDENT_BYTES, 0):
        monkeypatch.setattr(images, "RESIDENT_BYTES", limit)
        data = LatentImages(latents, ["text"] * 5, {}, latents + 10)
        batch = data.__getitems__([3, 0])
        assert ("latents" in batch) == (limit == 0)
        full, flat = data.tensors(batch)
        assert full.flatten().tolist() == [3, 0] and flat.flatten().tolist() == [13, 10]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["lune", "sol"])
def test_on_cuda_a_step_does_not_synchronise(tmp_path, kind):
    training = trainer(tmp_path, kind, False, LevelSettings())
    batches = iter(training.loader())
    training.make_step(batches, 1e-4, Interrupts())
    with waits_are_errors():
        training.make_step(batches, 1e-4, Interrupts())
    training.read_window()
