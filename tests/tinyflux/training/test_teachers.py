"""Teachers in a cache and in the loop say the same; where they are absent they say nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from moe_sampler.data.scenes import DemoScenes
from moe_sampler.kernels import philox_normal
from moe_sampler.tinyflux.features.cache_build import build_cache
from moe_sampler.tinyflux.features.cache_read import FeatureCache, MultiSource
from moe_sampler.tinyflux.features.encoders import StudentEncoders, TextEncoder
from moe_sampler.tinyflux.features.extraction import ExpertFeatures
from moe_sampler.tinyflux.features.teachers import Teachers
from moe_sampler.tinyflux.model.config import TinyFluxConfig
from moe_sampler.tinyflux.model.tinyflux import TinyFlux
from moe_sampler.tinyflux.training.objective_settings import ObjectiveSettings, check_objective
from moe_sampler.tinyflux.training.objectives import student_loss
from moe_sampler.tinyflux.training.routed import RoutedTeachers
from moe_sampler.tinyflux.training.teachers import (
    CachedTeachers,
    LiveTeachers,
    check_shared_latents,
    resident,
)
from moe_sampler.tinyflux.training.time_settings import TimeSettings
from moe_sampler.training.draws import Draws

BUCKETS = (0.1, 0.3, 0.9)
SEED = 11
SETTINGS = {"height": 32, "width": 32, "t_buckets": BUCKETS, "dtype": "float32", "seed": SEED}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def caches(tmp_path_factory, demo_pipeline) -> dict[str, FeatureCache]:
    """Of the same encoders: with both experts, with Sol alone, without any."""
    encoders = StudentEncoders(
        demo_pipeline.vae, TextEncoder(demo_pipeline.text_encoder, demo_pipeline.tokenizer)
    )
    folder = tmp_path_factory.mktemp("caches")
    teachers = {
        "both": Teachers.from_pipeline(demo_pipeline),
        "sol": Teachers.from_pipeline(demo_pipeline, ("sol",)),
        "none": None,
    }
    for name, teacher in teachers.items():
        build_cache(folder / name, DemoScenes(4), encoders, teacher, **SETTINGS)
    return {name: FeatureCache(folder / name) for name in teachers}


@pytest.fixture(scope="module")
def experts(demo_pipeline) -> ExpertFeatures:
    return ExpertFeatures.from_pipeline(demo_pipeline)


def draws(count: int) -> Draws:
    return Draws(5, 2, range(count), count)


def batch_of(data, indices) -> dict:
    return default_collate([data[i] for i in indices])


def close(found, expected, tolerance=1e-3) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("text", ["captions", "the batch's states"])
def test_live_and_cached_teachers_give_the_same_targets(caches, experts, text):
    """At the buckets, between them and beyond them; whichever samples a batch is made of."""
    if text != "captions":
        experts = ExpertFeatures(sol=experts.sol, lune=experts.lune)
    live = LiveTeachers(experts, t_buckets=BUCKETS, seed=SEED)
    cached = CachedTeachers(caches["both"])
    assert live.teaches == cached.teaches == ("sol", "lune")
    t = torch.tensor([0.3, 0.1, 0.62, 0.97])
    batch = batch_of(caches["both"], [2, 0, 3, 1])
    if text == "captions":  # the student's text states are none of theirs
        batch["prompt_embeds"] = torch.zeros_like(batch["prompt_embeds"])
    found, expected = live.features(batch, t, draws(4)), cached.features(batch, t, draws(4))
    close(found, expected)
    assert found.has_lune.all() and expected.has_sol.all()
    # What makes them equal are the cache's own noises.
    other = LiveTeachers(experts, t_buckets=BUCKETS, seed=SEED + 1).features(batch, t, draws(4))
    assert (other.lune - expected.lune).abs().max() > 0.1


def test_cached_features_are_those_of_the_buckets_around(caches):
    batch = batch_of(caches["both"], [0, 1, 2])
    taught = CachedTeachers(caches["both"]).features(batch, torch.tensor([0.1, 0.2, 0.75]), draws(3))
    lune, maps = batch["lune"], batch["sol_maps"]
    expected = torch.stack([lune[0, 0], (lune[1, 0] + lune[1, 1]) / 2, lune[2, 1] * 0.25 + lune[2, 2] * 0.75])
    torch.testing.assert_close(taught.lune, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(taught.sol_map[2], maps[2, 1] * 0.25 + maps[2, 2] * 0.75)
    assert taught.lune.dtype == taught.sol_stats.dtype == taught.sol_map.dtype == torch.float32


def test_live_teachers_see_what_the_student_sees(caches, experts):
    """Its noise, at its very time: one sample alone at a shared time says the same."""
    batch = batch_of(caches["none"], [1, 3, 0])
    t = torch.tensor([0.15, 0.5, 0.87])
    found = LiveTeachers(experts).features(batch, t, draws(3))
    seeds = draws(3).seeds("noise")
    for i in range(3):
        one = experts(
            batch["latents"][i : i + 1], [batch["caption"][i]], seeds=seeds[i : i + 1], t=[t[i].item()]
        )
        close((found.lune[i], found.sol_stats[i], found.sol_map[i]), [part[0, 0] for part in one], 1e-4)
    noise = philox_normal(batch["latents"].shape, seeds)
    x = (t.view(-1, 1, 1, 1) * batch["latents"] + (1 - t).view(-1, 1, 1, 1) * noise)[1:2]
    pooled = []
    handle = experts.lune.mid_block.register_forward_hook(lambda _m, _a, out: pooled.append(out.mean((2, 3))))
    with torch.no_grad():
        experts.lune(x, torch.tensor(500.0), experts.encode_prompt([batch["caption"][1]]))
    handle.remove()
    torch.testing.assert_close(found.lune[1:2], pooled[0], rtol=1e-3, atol=1e-3)


def test_live_teachers_keep_their_dtype_and_give_no_gradient(caches, experts):
    batch, t = batch_of(caches["none"], [0, 1]), torch.tensor([0.4, 0.6])
    plain = LiveTeachers(experts).features(batch, t, draws(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = LiveTeachers(experts).features(batch, t, draws(2))
    close(found, plain, 1e-6)
    assert not found.lune.requires_grad


def test_who_is_absent_is_said_to_be(caches, experts):
    mixed = MultiSource([caches["both"], caches["sol"], caches["none"]])
    batch = batch_of(mixed, [0, 4, 8])
    t = torch.full((3,), 0.4)
    teachers = CachedTeachers(mixed)
    taught = teachers.features(batch, t, draws(3))
    assert teachers.teaches == ("sol", "lune")
    assert taught.has_lune.tolist() == [True, False, False]
    assert taught.has_sol.tolist() == [True, True, False]
    alone = CachedTeachers(caches["none"])
    nothing = alone.features(batch_of(caches["none"], [0, 1, 2]), t, draws(3))
    assert alone.teaches == () and nothing[:3] == (None, None, None)
    assert not nothing.has_lune.any() and not nothing.has_sol.any()
    sol = LiveTeachers(ExpertFeatures(sol=experts.sol)).features(batch, t, draws(3))
    assert sol.lune is None and sol.has_sol.all() and not sol.has_lune.any()


@pytest.mark.parametrize("kind", ["cached", "live", "live as cached"])
def test_a_step_of_training_with_every_teacher(caches, experts, demo_pipeline, kind):
    teachers = {
        "cached": CachedTeachers(caches["both"]),
        "live": LiveTeachers(experts),
        "live as cached": LiveTeachers(experts, t_buckets=BUCKETS, seed=SEED),
    }[kind]
    objective = ObjectiveSettings(distill_weight=0.5, sol_weight_map=0.5, min_snr_gamma=5.0)
    student = TinyFlux(TinyFluxConfig.demo(num_double_layers=1, num_single_layers=1))
    check_objective(objective, student.config, teachers.teaches, routed=True)
    losses = student_loss(
        student,
        student,
        batch_of(caches["both"], range(4)),
        draws(4),
        objective=objective,
        time=TimeSettings(),
        teachers=teachers,
        routed=RoutedTeachers.from_pipeline(demo_pipeline, objective.router()),
    )
    losses.loss.backward()
    assert losses.loss.isfinite() and losses.loss > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert all(p.grad is None for unet in (experts.sol, experts.lune) for p in unet.parameters())


def test_an_item_knows_its_place(caches):
    mixed = MultiSource([caches["both"], caches["sol"]])
    assert batch_of(mixed, [3, 4, -1])["index"].tolist() == [3, 0, 3]


def test_shared_latents_are_told_from_others(caches, demo_pipeline):
    manifest = caches["none"].manifest
    check_shared_latents(manifest, demo_pipeline.vae)
    with pytest.raises(ValueError, match="another VAE"):
        check_shared_latents(manifest, demo_pipeline.text_encoder)
    with pytest.raises(ValueError, match="doesn't say"):
        check_shared_latents(dataclasses.replace(manifest, encoders=None), demo_pipeline.vae)


class Traveller(nn.Linear):
    def __init__(self) -> None:
        super().__init__(1, 1)
        self.places: list = []

    def to(self, place):
        self.places.append(str(place))
        return self


def test_offloaded_experts_come_for_the_call_and_go_home():
    module = Traveller()
    with pytest.raises(RuntimeError, match="out"), resident([module], torch.device("meta"), offload=True):
        assert module.places == ["meta"]
        raise RuntimeError("out")
    assert module.places == ["meta", "cpu"]
    with pytest.raises(ValueError, match="offload"), resident([module], torch.device("meta"), offload=False):
        pass
    with resident([module], CPU, offload=False):
        pass


def test_what_makes_no_sense_is_refused(experts, demo_pipeline):
    with pytest.raises(ValueError, match="neither"):
        LiveTeachers(experts, t_buckets=BUCKETS)
    with pytest.raises(ValueError, match="increase"):
        LiveTeachers(experts, t_buckets=(0.5, 0.1), seed=0)
    with pytest.raises(ValueError, match="convention"):
        LiveTeachers(ExpertFeatures.from_pipeline(demo_pipeline, convention="tiny-flux-v4"))
    x0, text = torch.zeros(2, 4, 8, 8), torch.zeros(2, 5, 128)
    for t in (torch.zeros(3, 1), torch.zeros(2), torch.zeros(2, 0), torch.zeros(2, 1, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"floating \[2, T\]"):
            experts(x0, prompt_embeds=text, seeds=[1, 2], t=t)
    with pytest.raises(ValueError, match="between 0"):
        experts(x0, prompt_embeds=text, seeds=[1, 2], t=torch.tensor([[0.5], [1.5]]))
