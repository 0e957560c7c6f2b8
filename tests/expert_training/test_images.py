"""Latents that are encoded once, and captions that are drawn with them."""

import numpy as np
import pytest
import torch
from PIL import Image

from moe_sampler.data.folders import ImageFolder
from moe_sampler.data.scenes import DemoScenes
from moe_sampler.demo.captions import describe
from moe_sampler.demo.scenes import draw_scene, render
from moe_sampler.expert_training import LatentImages, encode_source
from moe_sampler.training.settings import SettingsError


class Pixels(torch.nn.Module):
    """A VAE whose latents are the image's mean colours, and which counts its images."""

    class config:
        block_out_channels = (1, 1)
        scaling_factor = 2.0
        shift_factor = 0.25

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))
        self.images = 0

    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, pixels):
        self.images += len(pixels)
        pooled = torch.nn.functional.avg_pool2d(pixels, 2) * self.gain
        return type("Encoded", (), {"latents": pooled.to(memory_format=torch.channels_last)})


def encoded(scenes, vae, folder, **more):
    return encode_source(scenes, vae, folder, height=64, width=64, **more)


def test_latents_are_those_of_the_images_and_encoded_once(tmp_path):
    vae, scenes = Pixels(), DemoScenes(5, first=3)
    steps = []
    images = encoded(scenes, vae, tmp_path, batch_size=2, progress=lambda *done: steps.append(done))
    assert steps == [(2, 5), (4, 5), (5, 5)] and vae.images == 5
    for i in range(5):
        pixels = np.asarray(scenes[i].image, dtype=np.float32).reshape(32, 2, 32, 2, 3).mean((1, 3))
        expected = (pixels.transpose(2, 0, 1) / 127.5 - 1 - 0.25) * 2.0
        np.testing.assert_allclose(images[i]["latents"].numpy(), expected, atol=1e-5)
        assert images[i]["index"] == i and "structure" not in images[i]
    again = encoded(scenes, vae, tmp_path)
    assert vae.images == 5 and torch.equal(again.latents, images.latents)
    assert again.about == images.about


def test_other_data_or_another_vae_are_encoded_again(tmp_path):
    vae = Pixels()
    encoded(DemoScenes(3), vae, tmp_path)
    encoded(DemoScenes(4), vae, tmp_path)
    encoded(DemoScenes(3, first=1), vae, tmp_path)
    assert vae.images == 10
    with torch.no_grad():
        vae.gain.fill_(0.5)
    encoded(DemoScenes(3), vae, tmp_path)
    assert vae.images == 13
    encode_source(DemoScenes(3), vae, tmp_path, height=32, width=64)
    assert vae.images == 16 and len(list(tmp_path.glob("latents-*.safetensors"))) == 5
    assert not list(tmp_path.glob(".latents*"))


def test_an_image_painted_over_to_the_same_size_is_encoded_again(tmp_path):
    vae, folder = Pixels(), tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    found = []
    for colour in ("#fa0a0a", "#0a0afa", "#0a0afa"):
        Image.new("RGB", (8, 8), colour).save(folder / "a.png")
        found.append(encode_source(ImageFolder(folder), vae, tmp_path, height=8, width=8).latents)
    assert vae.images == 2 and torch.equal(found[1], found[2]) and not torch.equal(found[0], found[1])


def test_samples_of_any_source_are_checked(tmp_path):
    class Own(DemoScenes):
        def __getitem__(self, index):
            image = Image.new("LA", (64, 64), (0, 0))
            return super().__getitem__(index)._replace(image=image, caption="a \ud83d" * (index == 1))

    with pytest.raises(ValueError, match="caption of scene 1 holds half a surrogate pair"):
        encoded(Own(2), Pixels(), tmp_path)
    assert not list(tmp_path.iterdir())
    images = encoded(Own(1), Pixels(), tmp_path)
    assert torch.equal(images.latents, torch.full_like(images.latents, 1.5)) and images.names == ["scene 0"]


def test_structure_pictures_and_fresh_captions_of_the_scenes(tmp_path):
    images = encoded(DemoScenes(3, first=8), Pixels(), tmp_path, structure=True)
    flat = render(draw_scene(9), structure=True).astype(np.float32).reshape(32, 2, 32, 2, 3).mean((1, 3))
    expected = (flat.transpose(2, 0, 1) / 127.5 - 1 - 0.25) * 2.0
    np.testing.assert_allclose(images[1]["structure"].numpy(), expected, atol=1e-5)
    said = images.captions.of_image(1)
    assert said[0] == DemoScenes(3, first=8)[1].caption
    assert said[1:] == [describe(draw_scene(9), np.random.default_rng([1, k]))[0] for k in range(1, 8)]
    assert len(set(said)) > 4


def test_a_folder_keeps_its_captions_and_has_no_structure(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "abc":
        Image.new("RGB", (20, 10), "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"ein {name}, früh")
    images = encode_source(ImageFolder(folder), Pixels(), tmp_path, height=8, width=16)
    assert images.latents.shape == (3, 3, 4, 8)
    assert images.captions.first([2, 0]) == ["ein c, früh", "ein a, früh"]
    with pytest.raises(SettingsError, match="structure pictures"):
        encode_source(ImageFolder(folder), Pixels(), tmp_path, height=8, width=16, structure=True)
    with pytest.raises(SettingsError, match="multiples of the VAE's 2"):
        encode_source(ImageFolder(folder), Pixels(), tmp_path, height=7, width=16)


@pytest.mark.parametrize("drawn", [True, False])
def test_the_last_images_are_held_out(drawn):
    latents = torch.arange(5.0).view(5, 1, 1, 1)
    captions = [(f"text {i}", f"other {i}") if drawn else f"text {i}" for i in range(5)]
    data, held_out = LatentImages(latents, captions, {"images": 5}, latents + 10).split(2)
    assert len(data) == 3 and len(held_out) == 2
    assert data.about["images"] == 3
    item = held_out[1]
    assert (item["index"], float(item["latents"]), float(item["structure"])) == (1, 4, 14)
    assert held_out.captions.of_image(1) == (["text 4", "other 4"] if drawn else ["text 4"])
    assert data.captions.first([0]) == ["text 0"]
    assert data.split(0)[1] is None
    with pytest.raises(SettingsError, match="lower held_out"):
        data.split(3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(2, 3), ["a", "b"], {}), "float32"),
        ((torch.zeros(2, 1, 1, 1), ["a"], {}), "2 latents need as many captions"),
        ((torch.zeros(2, 1, 1, 1), ["a", "b"], {}, torch.zeros(1, 1, 1, 1)), "structure must have"),
    ],
)
def test_wrong_data_say_so(arguments, message):
    with pytest.raises(ValueError, match=message):
        LatentImages(*arguments)
