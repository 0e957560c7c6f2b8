"""No step of a student's training waits for the device."""

from typing import ClassVar

import pytest
import torch
import unets
from diffusers import UNet2DConditionModel
from tinyflux_helpers import new_config, trained
from waits import waits_are_errors

from moe_sampler import Boundary, Expert
from moe_sampler.sampling.paths import FlowPath, VPPath
from moe_sampler.tinyflux.features.block_maps import BlockMaps
from moe_sampler.tinyflux.features.extraction import ExpertFeatures
from moe_sampler.tinyflux.training.alignment import Alignment, CachedMaps, LiveMaps
from moe_sampler.tinyflux.training.alignment_settings import AlignmentSettings
from moe_sampler.tinyflux.training.objective_settings import ObjectiveSettings
from moe_sampler.tinyflux.training.routed import RoutedTeachers
from moe_sampler.tinyflux.training.task import StudentTask
from moe_sampler.tinyflux.training.teachers import CachedTeachers, LiveTeachers
from moe_sampler.tinyflux.training.time_settings import TimeSettings
from moe_sampler.training import Trainer, TrainingSettings
from moe_sampler.training.interrupts import Interrupts


class Items(torch.utils.data.Dataset):
    """What a cache's items hold, with features at two times."""

    has_lune = has_sol = has_maps = True
    maps_made: ClassVar = {"expert": "lune", "block": "mid_block", "t": [0.5, 0.9]}
    shapes: ClassVar = {"block_maps": ["float32", 2, 40, 4, 4]}
    t_buckets = torch.tensor([0.2, 0.8])

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        return {
            "index": index,
            "latents": draw(4, 8, 8),
            "prompt_embeds": draw(5, 24),
            "prompt_mask": torch.ones(5, dtype=torch.bool),
            "pooled_prompt_embeds": draw(20),
            "caption": f"caption {index}",
            "lune": draw(2, 40),
            "block_maps": draw(2, 40, 4, 4),
            "sol_stats": draw(2, 3).sigmoid(),
            "sol_maps": draw(2, 64).softmax(-1).view(2, 8, 8),
        }


def unet() -> UNet2DConditionModel:
    own = {"block_out_channels": [8, 40], "cross_attention_dim": 24, "attention_head_dim": 2}
    with torch.random.fork_rng():
        return unets.unet(ends_in=unets.CROSS, **own)


def routed(model: UNet2DConditionModel) -> RoutedTeachers:
    def call(sample, timestep, prompt_embeds):
        return model(sample, timestep, prompt_embeds, return_dict=False)[0]

    return RoutedTeachers([Expert.sol(call), Expert.lune(call)], Boundary("sol", "lune", 0.5))


class Caches:
    """A MultiSource of one."""

    def __init__(self) -> None:
        self.caches = [Items()]
        self.has_maps, self.maps_made = True, Items.maps_made


def alignment(maps: str, model: UNet2DConditionModel) -> Alignment:
    settings = AlignmentSettings(align_weight=0.5, align_warmup_steps=5, align_noise="0:0.1, 1:0.5")
    path = VPPath.linear() if maps == "sol" else FlowPath()
    teacher = CachedMaps(Caches(), settings) if maps == "cached" else LiveMaps(BlockMaps("lune", model, path))
    return Alignment(settings, teacher)


def trainer(folder, teachers: str, device: str, maps: str | None = None, **objective) -> Trainer:
    model = unet().to(device)
    aligned = None if maps is None else alignment(maps, model)
    taught = {
        "cached": lambda: CachedTeachers(Items()),
        "live": lambda: LiveTeachers(ExpertFeatures(sol=model, lune=model)),
        "matched": lambda: LiveTeachers(ExpertFeatures(sol=model, lune=model), t_buckets=(0.2, 0.8), seed=3),
    }[teachers]()
    student = trained(new_config())
    if aligned is not None:
        aligned.prepare(student)
    task = StudentTask(
        student,
        Items(),
        objective=ObjectiveSettings(**objective),
        time=TimeSettings(),
        teachers=taught,
        routed=routed(model) if objective.get("distill_weight") else None,
        alignment=aligned,
    )
    settings = TrainingSettings(
        folder, max_train_steps=9, train_batch_size=4, lr_warmup_steps=0, report_to="none"
    )
    return Trainer(task, settings, quiet=True)


@pytest.mark.parametrize(
    "teachers, objective",
    [
        ("cached", {"sol_weight_map": 0.5, "min_snr_gamma": 5.0}),
        ("cached", {"distill_weight": 0.5}),
        ("live", {}),
        ("matched", {}),
        ("cached", {"maps": "cached"}),
        ("cached", {"maps": "lune"}),
        ("cached", {"maps": "sol"}),
    ],
)
def test_a_step_reads_nothing(tmp_path, silent_device, teachers, objective):
    training = trainer(tmp_path, teachers, "meta", **objective)
    batches = iter(training.loader())
    for step in range(2):
        with silent_device() as waits:
            training.make_step(batches, 1e-4, Interrupts())
        # The first step brings tables to the device.
        assert step == 0 or waits.found == []


@pytest.mark.gpu
@pytest.mark.parametrize(
    "teachers, objective",
    [
        ("cached", {"distill_weight": 0.5}),
        ("live", {}),
        ("cached", {"maps": "cached"}),
        ("cached", {"maps": "lune"}),
        ("cached", {"maps": "sol"}),
    ],
)
def test_on_cuda_a_step_does_not_synchronise(tmp_path, teachers, objective):
    training = trainer(tmp_path, teachers, "cuda", **objective)
    batches = iter(training.loader())
    training.make_step(batches, 1e-4, Interrupts())
    with waits_are_errors():
        training.make_step(batches, 1e-4, Interrupts())
    training.read_window()
