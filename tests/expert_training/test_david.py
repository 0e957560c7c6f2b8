"""David: weights within their bounds, probes that learn, and a UNet that only the weights touch."""

import numpy as np
import pytest
import torch
import unets
from diffusers import UNet2DConditionModel

from moe_sampler.architectures.unet import UNET
from moe_sampler.expert_training import (
    AssessedUNet,
    BlockProbes,
    DavidSettings,
    ExpertTask,
    LatentImages,
    Objective,
    structure_classes,
)
from moe_sampler.expert_training.david import PROBE_SCALE, bounded_weights
from moe_sampler.training.draws import Draws
from moe_sampler.training.settings import SettingsError


def tiny_unet() -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        return unets.unet(cross_attention_dim=6).train()


def inputs(count: int = 8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(count, 4, 8, 8, generator=generator),
        torch.arange(count) * 100,
        torch.randn(count, 3, 6, generator=generator),
    )


@pytest.mark.parametrize("strength", [0.0, 0.3, 50.0])
@pytest.mark.parametrize("count", [1, 2, 24])
def test_weights_have_mean_one_and_keep_their_bounds(strength, count):
    rng = np.random.default_rng(count)
    for scale in (0.0, 1e-20, 0.1, 1e4):
        surprise = torch.from_numpy(rng.standard_normal(count) * scale)
        weights = bounded_weights(surprise, strength, 0.5, 2.0)
        assert weights.dtype == torch.float32 and torch.isfinite(weights).all()
        assert weights.mean() == pytest.approx(1.0, abs=1e-6)
        assert weights.min() >= 0.5 and weights.max() <= 2.0
        assert (weights[surprise.argsort()].diff() >= -1e-6).all()
    if strength == 0:
        assert (weights == 1).all()


def test_a_gentle_strength_is_the_slope():
    surprise = torch.tensor([-0.2, 0.1, 0.4])
    expected = 1 + 0.5 * (surprise - surprise.mean())
    torch.testing.assert_close(bounded_weights(surprise, 0.5, 0.5, 2.0), expected)


def test_the_probes_see_every_block_and_change_nothing_in_the_unet():
    unet = tiny_unet()
    sample, timestep, states = inputs()
    plain = unet(sample, timestep, states, return_dict=False)[0]
    model = AssessedUNet(unet, BlockProbes(UNET.block_channels(unet), DavidSettings(structure_classes=3)))
    noise, structure = torch.linspace(0, 1, 8, dtype=torch.float64), torch.arange(8) % 3
    answer, weights, extra = model(sample, timestep, states, noise, structure)
    assert torch.equal(answer, plain)
    assert torch.equal(model(sample, timestep, states)[0], plain)
    assert not weights.requires_grad
    torch.testing.assert_close(weights, torch.ones(8))  # nothing is a surprise to who has learnt nothing
    extra.backward()
    assert all(p.grad is None for p in unet.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.assessor.probes.parameters())
    with pytest.raises(ValueError, match="returns a tuple"):
        model(sample, timestep, states, return_dict=True)


def test_the_channels_are_those_of_the_blocks():
    unet = tiny_unet()
    found = {}
    for name in UNET.block_channels(unet):

        def hook(_module, _args, output, name=name):
            found[name] = (output if isinstance(output, torch.Tensor) else output[0]).shape[1]

        unet.get_submodule(name).register_forward_hook(hook)
    unet(*inputs())
    assert found == UNET.block_channels(unet) and len(found) == 5


class OfOneBlock:
    """Features that show some samples' structure and hide the others'."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __call__(self, count: int = 64):
        structure = torch.from_numpy(self.rng.integers(0, 4, count))
        noise = torch.from_numpy(self.rng.uniform(size=count))
        clear = torch.from_numpy(self.rng.uniform(size=count) < 0.7)
        features = torch.from_numpy(self.rng.standard_normal((count, 6, 4, 4))).float() * 0.3
        features[torch.arange(count), structure] += 2.0 * clear[:, None, None]
        features[:, 4] += (8 * noise.float())[:, None, None]
        return {"block": features}, noise, structure, clear


def test_what_the_blocks_hide_gets_more_weight():
    probes = BlockProbes({"block": 6}, DavidSettings(probe_bins=4, structure_classes=4, weight_strength=1.0))
    optimizer = torch.optim.AdamW(probes.parameters(), lr=1e-2)
    data = OfOneBlock()
    for _ in range(150):
        optimizer.zero_grad()
        probes(*data()[:3]).loss.backward()
        optimizer.step()
    features, noise, structure, clear = data(2000)
    weights = probes(features, noise, structure).weights
    assert weights[~clear].mean() > weights[clear].mean() + 0.2
    assert weights.mean() == pytest.approx(1.0, abs=1e-5)
    assert 0.2 < float(probes.expected.detach().mean()) < 0.9, "less than chance, more than nothing"


@pytest.mark.parametrize(("bins", "classes"), [(2, 2), (4, 10), (16, 3)])
def test_chance_is_an_error_of_one_whatever_is_asked(bins, classes):
    """Both questions count alike, however many answers each has, and a sure right answer is no error."""
    probes = BlockProbes({"block": 6}, DavidSettings(probe_bins=bins, structure_classes=classes))
    noise, structure = torch.full((8,), 0.5 / bins, dtype=torch.float64), torch.zeros(8, dtype=torch.int64)
    features = {"block": torch.ones(8, 6, 4, 4)}
    at_chance = float(probes(features, noise, structure).loss.detach())
    assert at_chance == pytest.approx(PROBE_SCALE, rel=1e-6)
    for answer, of_the_squares in ((0, 0.25), (bins, 0.25)):  # one of two questions is solved: 1/2 + (1/2)^2
        with torch.no_grad():
            bias = probes.probes["block"].bias.zero_()
            bias[answer] = 100.0
        half = float(probes(features, noise, structure).loss.detach())
        assert half == pytest.approx(PROBE_SCALE * (0.5 + of_the_squares), rel=1e-5)


def test_much_noise_is_no_reason_for_weight():
    """What no block can know at a level is expected there."""
    probes = BlockProbes({"block": 6}, DavidSettings(probe_bins=2, structure_classes=4))
    optimizer = torch.optim.AdamW(probes.parameters(), lr=1e-2)
    rng = np.random.default_rng(1)

    def draw(count: int = 64):
        structure = torch.from_numpy(rng.integers(0, 4, count))
        noise = torch.from_numpy(rng.uniform(size=count))
        features = torch.from_numpy(rng.standard_normal((count, 6, 4, 4))).float() * 0.3
        features[torch.arange(count), structure] += 2.0 * (noise < 0.5)[:, None, None]
        return {"block": features}, noise, structure

    for _ in range(250):
        optimizer.zero_grad()
        probes(*draw()).loss.backward()
        optimizer.step()
    features, noise, structure = draw(2000)
    weights = probes(features, noise, structure).weights
    assert float((probes.expected[1] - probes.expected[0]).detach()) > 0.2
    assert weights[noise >= 0.5].mean() == pytest.approx(float(weights[noise < 0.5].mean()), abs=0.08)


def test_structure_classes_are_clusters_of_the_coarse_latents():
    rng = np.random.default_rng(2)
    centres = rng.standard_normal((5, 4, 4, 4)) * 3
    truth = rng.integers(0, 5, 200)
    latents = np.repeat(np.repeat(centres[truth], 4, 2), 4, 3) + rng.standard_normal((200, 4, 16, 16))
    classes = structure_classes(torch.from_numpy(latents).float(), 5).numpy()
    pairs = {(int(a), int(b)) for a, b in zip(classes, truth, strict=True)}
    assert len(pairs) == 5, "one cluster a layout"
    again = structure_classes(torch.from_numpy(latents).float(), 5).numpy()
    np.testing.assert_array_equal(classes, again)
    with pytest.raises(ValueError, match="classes must lie between 2 and the 200 images"):
        structure_classes(torch.from_numpy(latents).float(), 201)


class Weighing(torch.nn.Module):
    """An assessor that weighs by a list."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.weights = torch.tensor(weights)

    def forward(self, features, noise, structure):
        from moe_sampler.expert_training import Assessment

        self.seen = set(features)
        return Assessment(self.weights, None)


def weighed_task(*weights: float) -> ExpertTask:
    generator = torch.Generator().manual_seed(0)
    data = LatentImages(torch.randn(4, 4, 8, 8, generator=generator), ["a", "b", "c", "d"], {})

    class Text:
        def table(self, texts):
            return self

        def states(self, rows):
            return torch.ones(len(rows), 3, 6)

    david = DavidSettings(structure_classes=2)
    return ExpertTask(tiny_unet(), Objective("sol"), data, Text(), assessor=Weighing(*weights), david=david)


@pytest.mark.parametrize(
    ("weights", "spread"), [((1.0,), 0.0), ((2.0, 0.0), 1.0), ((1.5, 0.5, 1.0, 1.0), 0.125**0.5)]
)
def test_the_spread_of_the_weights_is_a_number_in_any_batch(weights, spread):
    """Of a batch of one, too: a NaN in the log would look like a broken run."""
    task = weighed_task(*weights)
    count = len(weights)
    batch = torch.utils.data.default_collate([task.data[i] for i in range(count)])
    losses = task.loss(task.model, batch, Draws(0, 0, range(count), count))
    assert float(losses.terms["weight_spread"]) == pytest.approx(spread, abs=1e-6)


def test_a_sample_counts_as_much_as_its_weight():
    """With weights of 2 and 0 the loss is that of the first sample alone."""
    task = weighed_task(2.0, 0.0)
    batch = torch.utils.data.default_collate([task.data[0], task.data[1]])
    losses = task.loss(task.model, batch, Draws(0, 0, range(2), 2))
    assert float(losses.loss.detach()) == pytest.approx(float(losses.per_sample[0]), rel=1e-6)
    assert float(losses.terms["unweighted"]) == pytest.approx(float(losses.per_sample.mean()), rel=1e-6)
    assert task.model.assessor.seen == set(UNET.block_channels(tiny_unet()))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"probe_bins": 1}, "at least 2"),
        ({"weight_strength": -1.0}, "must not be negative"),
        ({"lowest_weight": 1.5}, "lowest_weight < 1"),
        ({"highest_weight": 0.9}, "highest_weight > 1"),
    ],
)
def test_wrong_settings_say_so(settings, message):
    with pytest.raises(SettingsError, match=message):
        DavidSettings(**settings)
