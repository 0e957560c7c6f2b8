"""The student's tokens follow an expert's map: maps, loss, and a run that leaves no projector behind."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from tinyflux_helpers import inputs_of, new_config, tables, trained
from torch.utils.data import default_collate
from typer.testing import CliRunner

from moe_sampler.cli import app
from moe_sampler.kernels import philox_normal
from moe_sampler.sampling.paths import FlowPath, VPPath
from moe_sampler.tinyflux import (
    Alignment,
    AlignmentSettings,
    BlockMaps,
    CachedMaps,
    ExpertFeatures,
    FeatureCache,
    LiveMaps,
    Maps,
    MultiSource,
    ObjectiveSettings,
    TimeSettings,
    TinyFlux,
    sample_noise,
    student_loss,
)
from moe_sampler.tinyflux.model.alignment import AlignmentProjector
from moe_sampler.tinyflux.training.run import new_task, train
from moe_sampler.tinyflux.training.settings import StudentSettings
from moe_sampler.training import Draws, SettingsError
from moe_sampler.training.settings import from_tables

PROMPTS = ["a castle by a lake", "a portrait", "a street"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """12 scenes as 8×8 latents, with Lune's maps at two times."""
    folder = tmp_path_factory.mktemp("data") / "cache"
    flags = ["--demo", "--count", "12", "--size", "32", "--dtype", "float32", "--maps", "0.5,0.75"]
    flags += ["--buckets", "0.5"]
    result = CliRunner().invoke(app, ["tinyflux", "cache", str(folder), *flags, "--map-block", "up_blocks.0"])
    assert result.exit_code == 0, result.output
    return folder


def draws_of(count: int, step: int = 3) -> Draws:
    return Draws(7, step, range(count), count)


# Maps


def seen_by_hand(unet, block: str, x, timestep, text) -> torch.Tensor:
    found = []
    handle = unet.get_submodule(block).register_forward_hook(lambda _m, _a, out: found.append(out))
    with torch.no_grad():
        unet(x, timestep, text)
    handle.remove()
    return found[0] if isinstance(found[0], torch.Tensor) else found[0][0]


def alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To rounding, whatever the scale of a block's features; the next timestep's differ by a tenth of it."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-3 * expected.std()


@pytest.mark.parametrize("block", [None, "down_blocks.1", "up_blocks.1"])
def test_lunes_maps_are_what_its_block_puts_out(demo_pipeline, block):
    maps = BlockMaps.from_pipeline(demo_pipeline, "lune", block)
    assert maps.block == (block or "mid_block") and maps.path == FlowPath()
    latents, seeds = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    s = torch.tensor([0.1, 0.5, 1.0])
    found = maps(latents, PROMPTS, seeds=seeds, noise=s)
    level = s.view(-1, 1, 1, 1)
    x = (1 - level) * latents + level * philox_normal(latents.shape, [0, 1, 2])
    text = demo_pipeline.encode_texts(PROMPTS)
    expected = seen_by_hand(demo_pipeline.unet_lune, maps.block, x, 1000 * s, text)
    alike(found, expected)
    assert found.shape[1] == maps.channels and not found.requires_grad
    torch.testing.assert_close(found, maps(latents, seeds=seeds, noise=s, prompt_embeds=text))


def test_sols_maps_are_at_the_nearest_timestep(demo_pipeline):
    maps = BlockMaps.from_pipeline(demo_pipeline, "sol")
    assert isinstance(maps.path, VPPath)
    latents, seeds = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(3)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    alphas = scheduler.alphas_cumprod.double().sqrt()
    shares = (1 - alphas**2).sqrt() / (alphas + (1 - alphas**2).sqrt())
    s = torch.tensor([0.0, 0.3, 1.0])
    timesteps = (shares[None] - s[:, None].double()).abs().argmin(1)
    assert timesteps[0] == 0 and timesteps[2] == 999
    x = scheduler.add_noise(latents, philox_normal(latents.shape, [0, 1, 2]), timesteps)
    text = demo_pipeline.encode_texts(PROMPTS)
    expected = seen_by_hand(demo_pipeline.unet_sol, "mid_block", x, timesteps, text)
    alike(maps(latents, PROMPTS, seeds=seeds, noise=s), expected)


def test_a_map_averaged_over_space_is_lunes_feature(demo_pipeline):
    latents, seeds = (
        torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2)),
        torch.tensor([4, 9]),
    )
    features = ExpertFeatures.from_pipeline(demo_pipeline, ("lune",))
    expected = features(latents, PROMPTS[:2], seeds=seeds, t=[0.7]).lune
    maps = BlockMaps.from_pipeline(demo_pipeline)
    found = maps(latents, PROMPTS[:2], seeds=seeds, noise=torch.full((2,), 0.3))
    alike(found.mean((2, 3)), expected[:, 0])


def test_maps_that_cannot_be_are_refused(demo_pipeline):
    with pytest.raises(ValueError, match=r"no block up_blocks.9: choose down_blocks.0.*mid_block"):
        BlockMaps.from_pipeline(demo_pipeline, "lune", "up_blocks.9")
    maps = BlockMaps("lune", demo_pipeline.unet_lune, FlowPath())
    x = {"seeds": torch.arange(1), "noise": torch.ones(1)}
    with pytest.raises(ValueError, match="text encoder"):
        maps(torch.zeros(1, 4, 8, 8), [""], **x)
    with pytest.raises(ValueError, match="either prompt or"):
        maps(torch.zeros(1, 4, 8, 8), **x)


def test_a_cache_keeps_the_maps(cache, demo_pipeline):
    opened = FeatureCache(cache)
    assert opened.maps_made == {"expert": "lune", "block": "up_blocks.0", "t": [0.5, 0.75]}
    batch = default_collate([opened[i] for i in (1, 5)])
    live = BlockMaps.from_pipeline(demo_pipeline, "lune", "up_blocks.0")
    for place, t in enumerate((0.5, 0.75)):
        expected = live(
            batch["latents"], list(batch["caption"]), seeds=batch["index"], noise=torch.full((2,), 1 - t)
        )
        torch.testing.assert_close(batch["block_maps"][:, place], expected, rtol=1e-3, atol=1e-3)
    # A user who doesn't align doesn't read them.
    assert "block_maps" not in FeatureCache(cache, maps=False)[0]
    assert "maps of lune's up_blocks.0 at t = 0.5, 0.75" in invoke("check", str(cache))


def invoke(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["tinyflux", *words])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_maps_of_who_does_not_teach_are_refused(tmp_path):
    flags = ("cache", str(tmp_path / "c"), "--demo", "--teachers", "sol")
    assert "need it among the teachers" in invoke(*flags, "--maps", "0.5", code=2)
    assert "--map-block is for --maps" in invoke(*flags, "--map-block", "mid_block", code=2)
    assert "split: for a SOURCE" in invoke("cache", "c", "--demo", "--split", "test", code=2)
    assert not (tmp_path / "c").exists()


def test_cached_maps_are_between_their_times(cache):
    opened = FeatureCache(cache)
    batch = default_collate([opened[i] for i in range(3)])
    teacher = CachedMaps(opened, AlignmentSettings(align_weight=1.0))
    found, has_maps = teacher.maps(batch, torch.tensor([0.25, 0.5, 0.3]), draws_of(3))
    first, second = batch["block_maps"].unbind(1)
    assert has_maps.all() and teacher.channels == first.shape[1]
    torch.testing.assert_close(found[:2], torch.stack([second[0], first[1]]))
    torch.testing.assert_close(found[2], 0.2 * first[2] + 0.8 * second[2], rtol=1e-4, atol=1e-5)


def test_a_cache_without_maps_has_none_that_count(cache, tmp_path):
    flags = ("--size", "32", "--dtype", "float32", "--buckets", "0.5")
    invoke("cache", str(tmp_path / "plain"), "--demo", "--count", "2", *flags)
    both = MultiSource([FeatureCache(cache), FeatureCache(tmp_path / "plain")])
    batch = default_collate([both[0], both[12]])
    maps = CachedMaps(both, AlignmentSettings(align_weight=1.0)).maps(
        batch, torch.full((2,), 0.4), draws_of(2)
    )
    assert maps.has_maps.tolist() == [True, False] and not maps.maps[1].any()
    alone = FeatureCache(tmp_path / "plain")
    with pytest.raises(SettingsError, match=r'build it with "moe-sampler tinyflux cache --maps", or set'):
        CachedMaps(alone, AlignmentSettings(align_weight=1.0))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"align_noise": "0.6"}, "maps at noise 0.25, 0.5 alone"),
        ({"align_noise": "0:0, 1:0.3"}, "alone"),
        ({"align_expert": "sol"}, "align_expert is sol, but the cache's maps are of lune's up_blocks.0"),
        ({"align_block": "mid_block"}, "align_block is mid_block, but"),
    ],
)
def test_what_a_cache_cannot_say_is_refused(cache, settings, message):
    with pytest.raises(SettingsError, match=message):
        CachedMaps(FeatureCache(cache), AlignmentSettings(align_weight=1.0, **settings))


def test_a_live_expert_sees_the_students_noise_at_its_own_level(demo_pipeline):
    expert = BlockMaps.from_pipeline(demo_pipeline)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    batch = {"latents": latents, "caption": PROMPTS[:2]}
    noise = torch.tensor([0.2, 0.6])
    found, has_maps = LiveMaps(expert).maps(batch, noise, draws_of(2))
    expected = expert(latents, PROMPTS[:2], seeds=draws_of(2).seeds("noise"), noise=noise)
    assert has_maps.all() and torch.equal(found, expected)
    assert LiveMaps(expert).planned  # captions are read
    silent = BlockMaps("lune", demo_pipeline.unet_lune, FlowPath())
    assert not LiveMaps(silent).planned and LiveMaps(silent, offload=True).planned
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(LiveMaps(expert).maps(batch, noise, draws_of(2)).maps, expected)


# The student's side


@pytest.mark.parametrize("after", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_what_is_projected_are_the_tokens_after_a_block(after, kind):
    student, size = trained(new_config()), (2, 8)
    projector = AlignmentProjector(32, 6, kind)
    student.align_after(after, projector)
    block = [*student.double_blocks, *student.single_blocks][after - 1]
    found = []
    block.register_forward_hook(lambda _m, _a, out: found.append(out[1] if after <= 2 else out[:, 5:]))
    inputs = inputs_of(new_config(), size)
    aligned = student(**inputs, align=True).aligned
    (tokens,) = found
    if kind == "conv":
        image = tokens.permute(0, 2, 1).reshape(2, 32, *size)
        layer = projector.layers
        expected = F.conv2d(image, layer.weight, layer.bias, padding=1).flatten(2).permute(0, 2, 1)
    else:
        first, second, third = (projector.layers[i] for i in (0, 2, 4))
        assert first.weight.shape == (64, 32)
        inner = F.silu(F.linear(tokens, first.weight, first.bias))
        expected = F.linear(F.silu(F.linear(inner, second.weight, second.bias)), third.weight, third.bias)
    torch.testing.assert_close(aligned, expected, **CLOSE)
    assert student(**inputs).aligned is None
    # Only what came before has a gradient.
    aligned.sum().backward()
    blocks = [*student.double_blocks, *student.single_blocks]
    reached = [any(p.grad is not None and bool(p.grad.any()) for p in b.parameters()) for b in blocks]
    assert reached == [place < after for place in range(4)]


def test_a_projector_changes_nothing_else_and_is_not_needed():
    student, inputs = trained(new_config()), inputs_of(new_config())
    plain = student(**inputs).sample
    with pytest.raises(ValueError, match="call align_after first"):
        student(**inputs, align=True)
    with pytest.raises(ValueError, match="1 to 4 blocks, got 5"):
        student.align_after(5, AlignmentProjector(32, 6))
    student.align_after(3, AlignmentProjector(32, 6))
    assert torch.equal(student(**inputs, align=True).sample, plain)
    other = trained(new_config(), seed=1)
    other.load_state_dict(student.state_dict())  # with the projector's tensors, which it leaves out
    assert torch.equal(other(**inputs).sample, plain)


class Told:
    """Says fixed maps, and remembers at which levels it was asked."""

    def __init__(self, maps: torch.Tensor, has_maps: list[bool]) -> None:
        self.said, self.channels = Maps(maps, torch.tensor(has_maps)), maps.shape[1]

    def maps(self, batch, noise, draws):
        self.asked = noise
        return self.said


@pytest.mark.parametrize("centering", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [(4, 4), (8, 8), (2, 2)])
def test_the_error_by_hand(centering, size):
    generator = torch.Generator().manual_seed(4)
    maps = 3 + torch.randn(2, 6, 4, 4, generator=generator)
    tokens = torch.randn(2, size[0] * size[1], 6, generator=generator)
    teacher = Told(maps, [True, True])
    settings = AlignmentSettings(align_weight=1.0, align_centering=centering, align_noise="0:0.1, 1:0.5")
    noise = torch.tensor([0.25, 1.0])
    found = Alignment(settings, teacher).errors(tokens, size, {}, noise, draws_of(2))
    assert teacher.asked.tolist() == pytest.approx([0.2, 0.5])
    for sample in range(2):
        target = maps[sample].double()
        if centering:
            for channel in target:
                mean, std = channel.mean(), (channel - channel.mean()).square().mean().sqrt()
                channel.sub_(centering * mean).div_(std)
        if size == (2, 2):
            target = torch.stack([torch.stack([t.mean() for t in _quarters(c)]) for c in target])
            tolerance = 0.35  # an antialiased mean looks beyond its quarter: only alike
        else:
            if size == (8, 8):
                target = F.interpolate(target[None], size=size, mode="bilinear", align_corners=False)[0]
            target, tolerance = target.flatten(1), 1e-5
        cosines = [_cosine(target[:, i], tokens[sample, i].double()) for i in range(size[0] * size[1])]
        assert found[sample].item() == pytest.approx(1 - sum(cosines) / len(cosines), abs=tolerance)


def _quarters(channel):
    return channel[:2, :2], channel[:2, 2:], channel[2:, :2], channel[2:, 2:]


def _cosine(a, b) -> float:
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def test_the_weight_warms_up_falls_and_ends():
    plain = AlignmentSettings(align_weight=0.5)
    assert [plain.weight_at(step) for step in (0, 10**6)] == [0.5, 0.5]
    settings = AlignmentSettings(
        align_weight=0.5, align_warmup_steps=10, align_stop_steps=100, align_decay_steps=20
    )
    steps = {0: 0.0, 5: 0.25, 10: 0.5, 80: 0.5, 90: 0.25, 99: 0.025, 100: 0.0, 5000: 0.0}
    assert [settings.weight_at(step) for step in steps] == pytest.approx([*steps.values()])
    at_once = AlignmentSettings(align_weight=0.5, align_stop_steps=3)
    assert [at_once.weight_at(step) for step in range(5)] == [0.5, 0.5, 0.5, 0.0, 0.0]
    alignment = Alignment(settings, Told(torch.zeros(1, 6, 4, 4), [True]))
    assert alignment.weight(draws_of(4, step=90)).item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    "settings",
    [
        {"align_weight": -1.0},
        {"align_centering": 1.5},
        {"align_after": 0},
        {"align_decay_steps": 5},
        {"align_stop_steps": -1},
        {"align_weight": 1.0, "align_noise": "nothing"},
        {"align_weight": 1.0, "align_noise": "0:0, 1:2"},
    ],
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(SettingsError, match=next(reversed(settings))):
        AlignmentSettings(**settings)


def test_the_loss_has_the_weighted_error_of_samples_that_have_teachers():
    student, count = trained(new_config()), 4
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(count, *shape, generator=generator)  # noqa: E731
    batch = {
        "latents": draw(4, 8, 8),
        "prompt_embeds": draw(5, 24),
        "pooled_prompt_embeds": draw(20),
        "caption": [""] * count,
    }
    teacher = Told(draw(6, 4, 4), [True, True, False, True])
    settings = AlignmentSettings(align_weight=0.5, align_stop_steps=100, align_after=2)
    alignment = Alignment(settings, teacher)
    alignment.prepare(student, seed=1)
    objective = ObjectiveSettings(
        lune_weight=0, sol_stats_weight=0, sol_map_weight=0, text_dropout=0, teacher_dropout=0.5
    )

    def loss(step: int, **more):
        draws = draws_of(count, step)
        given = {"objective": objective, "time": TimeSettings(), **more}
        return student_loss(student, student, batch, draws, **given)

    plain, whole, over = loss(3), loss(3, alignment=alignment), loss(100, alignment=alignment)
    taught = draws_of(count).uniform("teacher_dropout") >= 0.5
    assert 0 < taught.sum() < count
    s = sample_noise(TimeSettings(), draws_of(count))
    assert teacher.asked.tolist() == [0.25] * count
    level = s.view(-1, 1, 1, 1)
    noisy = (1 - level) * batch["latents"] + level * philox_normal(
        batch["latents"].shape, draws_of(count).seeds("noise")
    )
    aligned = student(
        noisy.flatten(2).transpose(1, 2),
        batch["prompt_embeds"],
        batch["pooled_prompt_embeds"],
        1 - s,
        align=True,
    ).aligned
    errors = alignment.errors(aligned, (8, 8), batch, s, draws_of(count)) * taught
    assert errors[2] == 0
    torch.testing.assert_close(whole.terms["align"], errors.mean(), **CLOSE)
    torch.testing.assert_close(whole.loss - plain.loss, 0.5 * errors.mean(), **CLOSE)
    assert torch.equal(whole.per_sample, plain.per_sample) and "align" not in plain.terms
    # After the stop it is computed and weighs nothing.
    torch.testing.assert_close(over.loss, loss(100).loss)
    assert over.terms["align"] > 0


# A run


def settings(cache: Path, folder: Path, **changes) -> StudentSettings:
    own = {"training": {"lr_warmup_steps": 0, "sample_steps": 0}, "validation": {"noise_levels": [0.5]}}
    own["alignment"] = {"align_weight": 0.5, "align_noise": "0:0.25, 1:0.5"}
    for name, values in changes.items():
        own[name] = own.get(name, {}) | values
    return from_tables(StudentSettings, tables(cache, folder, **own))


def test_a_run_trains_the_projector_and_ships_a_plain_student(cache, tmp_path):
    folder = tmp_path / "student"
    new = new_task(settings(cache, folder)).model.state_dict()
    train(settings(cache, folder, training={"max_train_steps": 2}), quiet=True)
    train(settings(cache, folder), quiet=True)  # continued from its checkpoint
    for name in ("model.safetensors", "best/model.safetensors"):
        assert not [key for key in load_file(folder / name) if key.startswith("projector.")]
    before, kept = (load_file(folder / f"checkpoint-{i}" / "model.safetensors") for i in (2, 4))
    moved = [name for name in kept if name.startswith("projector.")]
    assert len(moved) == 6 and not any(
        torch.equal(one[name], other[name])
        for name in moved
        for one, other in ((new, before), (before, kept))
    )
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert 0 < next(line for line in reversed(lines) if "align" in line)["align"] < 2
    student = TinyFlux.from_pretrained(folder)
    assert student.projector is None
    assert f"{student.num_parameters()}" in (folder / "README.md").read_text().replace(",", "")


def test_a_run_aligns_with_an_expert_in_the_loop(cache, tmp_path):
    live = {"align_maps": "live", "align_block": "up_blocks.1", "align_noise": "0:0, 1:1"}
    live |= {"align_projector": "conv", "align_after": 4}
    wanted = settings(cache, tmp_path / "student", alignment=live, training={"max_train_steps": 1})
    task = new_task(wanted)
    # The cache has the experts' text states, so a step looks at no captions and can be recorded.
    assert task.alignment.teacher._expert.encode_prompt is None and task.steps_alike
    assert task.model.projector.layers.weight.shape == (96, 128, 3, 3)
    train(wanted, quiet=True)
    assert TinyFlux.from_pretrained(tmp_path / "student").projector is None
    other = settings(cache, tmp_path / "other", alignment={**live, "align_block": "no_block"})
    with pytest.raises(SettingsError, match="align_block: lune has no block no_block"):
        new_task(other)
    with pytest.raises(SettingsError, match="align_after: tokens are aligned after 1 to 5 blocks, got 9"):
        new_task(settings(cache, tmp_path / "other", alignment={"align_after": 9}))
