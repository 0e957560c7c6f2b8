"""Caches: what they hold, bytes that depend on settings alone, kills at any point, damage that is named."""

from __future__ import annotations

import copy as copy_module
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from processes import command, run
from torch.utils.data import DataLoader
from transformers import CLIPTextModel, T5Config, T5EncoderModel
from typer.testing import CliRunner

from moe_sampler._files import MARK, claim
from moe_sampler.cli.student import app
from moe_sampler.data.folders import ImageFolder
from moe_sampler.data.pictures import fit_image
from moe_sampler.data.scenes import DemoScenes
from moe_sampler.demo import experts_path
from moe_sampler.errors import CheckpointError
from moe_sampler.kernels import philox_normal
from moe_sampler.pipelines.latents import encode_images
from moe_sampler.pipelines.prompts import cut_silently
from moe_sampler.tinyflux.features import cache_format
from moe_sampler.tinyflux.features.cache_build import Cluster, build_cache
from moe_sampler.tinyflux.features.cache_format import CacheError, Manifest
from moe_sampler.tinyflux.features.cache_read import FeatureCache, MultiSource, at_time
from moe_sampler.tinyflux.features.cache_shards import KIND, build_shards
from moe_sampler.tinyflux.features.encoders import StudentEncoders, TextEncoder, find_t5, load_vae
from moe_sampler.tinyflux.features.extraction import ExpertFeatures
from moe_sampler.tinyflux.features.teachers import Teachers
from moe_sampler.tinyflux.training.teachers import check_shared_latents

pytestmark = pytest.mark.usefixtures("one_thread")

BUCKETS = (0.1, 0.3, 0.9)
SETTINGS = {"height": 32, "width": 32, "t_buckets": BUCKETS, "shard_size": 4, "micro_batch": 3}


@pytest.fixture(scope="module")
def encoders(demo_pipeline) -> StudentEncoders:
    return StudentEncoders(
        demo_pipeline.vae, TextEncoder(demo_pipeline.text_encoder, demo_pipeline.tokenizer)
    )


@pytest.fixture(scope="module")
def teachers(demo_pipeline) -> Teachers:
    return Teachers.from_pipeline(demo_pipeline)


@pytest.fixture(scope="module")
def built(tmp_path_factory, encoders, teachers) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "built"
    build_cache(folder, DemoScenes(10), encoders, teachers, **SETTINGS)
    return folder


@pytest.fixture
def copy(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_cache_holds_what_the_encoders_and_experts_say(built, encoders, teachers, demo_pipeline):
    cache = FeatureCache(built)
    assert len(cache) == 10 and sorted(contents(built)) == [
        "manifest.json",
        *(f"shard-0000{i}.safetensors" for i in range(3)),
    ]
    source = DemoScenes(10)
    for index in (0, 3, 4, 9):
        item, sample = cache[index], source[index]
        assert item["caption"] == cache.caption(index) == sample.caption
        small = sample.image.resize((32, 32), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            latents = demo_pipeline.vae.encode(pixels).latents * demo_pipeline.vae.config.scaling_factor
            tokens = demo_pipeline.tokenizer(
                sample.caption,
                padding="max_length",
                max_length=encoders.clip.max_length,
                truncation=True,
                return_tensors="pt",
            )
            text = demo_pipeline.text_encoder(tokens.input_ids)
        close = {"rtol": 2e-3, "atol": 2e-3}
        torch.testing.assert_close(item["latents"], latents[0].half(), **close)
        torch.testing.assert_close(item["prompt_embeds"], text.last_hidden_state[0].half(), **close)
        torch.testing.assert_close(item["pooled_prompt_embeds"], text.pooler_output[0].half(), **close)
        assert torch.equal(item["prompt_mask"], tokens.attention_mask[0].bool())
        features = teachers.features(latents, [sample.caption], seeds=[index], t=BUCKETS)
        torch.testing.assert_close(item["lune"], features.lune[0].half(), rtol=2e-3, atol=5e-3)
        torch.testing.assert_close(item["sol_stats"], features.sol_stats[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(item["sol_maps"], features.sol_maps[0], rtol=1e-3, atol=1e-6)
        assert (features.sol_maps[0] - 1 / 64).abs().max() > 1e-3
        assert cache.preview(index).shape == (64, 64, 3)
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["encoders"]["t5"] is None and manifest["encoders"]["text_states"] == "clip"
    assert manifest["settings"]["convention"] == "sample" and manifest["length"] == 10
    assert len({expert["fingerprint"] for expert in manifest["experts"].values()}) == 4
    # Names of a format on disk: a cache is continued, and its experts are compared, by them.
    about = {part: sorted(of) for part, of in (manifest["encoders"] | {"t5": {}, "text_states": {}}).items()}
    assert about == {
        "vae": ["class", "fingerprint", "scaling_factor", "shift_factor"],
        "clip": ["class", "fingerprint", "max_length"],
        "t5": [],
        "text_states": [],
    }
    model, expert = ["class", "fingerprint"], ["fingerprint", "path", "timesteps"]
    known = {part: sorted(of) for part, of in manifest["experts"].items()}
    assert known == {"vae": model, "text_encoder": model, "sol": expert, "lune": expert}
    torch.testing.assert_close(cache.t_buckets, torch.tensor(BUCKETS))


def test_a_samples_noise_has_the_seed_of_its_index(tmp_path, built, encoders, teachers):
    build_cache(tmp_path / "cache", DemoScenes(3), encoders, teachers, **SETTINGS, seed=2)
    cache, plain = FeatureCache(tmp_path / "cache"), FeatureCache(built)
    latents = torch.stack([plain[i]["latents"] for i in range(3)])
    assert torch.equal(cache.stacked("latents"), latents)
    images = [fit_image(DemoScenes(3)[i].image, 32, 32) for i in range(3)]
    captions = [cache.caption(i) for i in range(3)]
    clean = encode_images(encoders.vae, images)
    features = teachers.features(clean, captions, seeds=[2, 3, 4], t=BUCKETS)
    assert torch.equal(cache.stacked("sol_maps"), features.sol_maps)
    assert torch.equal(cache.stacked("lune"), features.lune.half())
    assert not torch.allclose(cache.stacked("lune"), plain.stacked("lune")[:3], rtol=0.01)


def test_experts_see_the_latents_of_their_own_vae(tmp_path, built, encoders, teachers):
    other = copy_module.deepcopy(encoders.vae)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    student = StudentEncoders(other, encoders.clip)
    build_cache(tmp_path / "cache", DemoScenes(3), student, teachers, **SETTINGS)
    ours, theirs = FeatureCache(tmp_path / "cache"), FeatureCache(built)
    for index in range(3):
        assert (ours[index]["latents"] - theirs[index]["latents"]).abs().max() > 0.1
        for name in ("lune", "sol_stats", "sol_maps"):
            assert torch.equal(ours[index][name], theirs[index][name])


def test_a_preview_is_the_picture_made_small(tmp_path, encoders):
    """As it lies: wider than high here, its longer side 64 pixels, red on the left and blue below."""
    picture = Image.new("RGB", (96, 48), "red")
    picture.paste("blue", (48, 24, 96, 48))

    class One(DemoScenes):
        def __getitem__(self, index):
            return super().__getitem__(index)._replace(image=picture)

    build_cache(tmp_path / "cache", One(1), encoders, None, height=48, width=96)
    preview = FeatureCache(tmp_path / "cache").preview(0)
    assert preview.dtype == torch.uint8 and preview.shape == (32, 64, 3)
    places = [preview[y, x].tolist() for y, x in ((4, 4), (28, 4), (4, 60), (28, 60))]
    assert places == [[255, 0, 0]] * 3 + [[0, 0, 255]]


def test_items_are_copies_and_shards_are_mapped(built):
    cache = FeatureCache(built)
    before = cache[2]["latents"].clone()
    cache[2]["latents"].zero_()
    assert torch.equal(cache[2]["latents"], before)
    assert torch.equal(cache[-8]["latents"], before)
    with pytest.raises(IndexError):
        cache[10]
    maps = Path("/proc/self/maps").read_text()
    assert str(built / "shard-00000.safetensors") in maps


def test_a_different_micro_batch_differs_in_rounding_alone(tmp_path, built, encoders, teachers):
    other = tmp_path / "other"
    build_cache(
        other, DemoScenes(10), encoders, teachers, **{**SETTINGS, "micro_batch": 4, "shard_size": 100}
    )
    ours, theirs = FeatureCache(built), FeatureCache(other)
    for name in ours.shapes:
        a, b = ours.stacked(name), theirs.stacked(name)
        a, b = a.float(), b.float()
        assert a.std() > 0, name
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3 * float(b.abs().max()), msg=name)


def test_workers_elsewhere_build_the_same_bytes(built, tmp_path, encoders, teachers):
    loaded, asked = [], []

    def over(make, spans):
        asked.extend(spans)
        build = make()
        build(spans[-1])  # by a worker that died before it could say so
        return map(build, reversed(spans))

    def load():
        loaded.append(True)
        return DemoScenes(10), encoders, teachers

    told: list[tuple[int, int]] = []
    for _ in range(2):
        cluster = Cluster(over, load)
        settings = SETTINGS | {"cluster": cluster, "progress": lambda *done: told.append(done)}
        build_cache(tmp_path / "a", DemoScenes(10), encoders, teachers, **settings)
    assert contents(tmp_path / "a") == contents(built)
    assert loaded == [True] and len(asked) == 3, "a finished cache needs no workers"
    assert told == [(0, 10), (2, 10), (6, 10), (10, 10)]


def build_simple(folder: Path) -> None:
    """A cache of ten samples in three shards, without any model."""

    def parts(first: int, length: int):
        for i in range(first, first + length):
            yield {"latents": philox_normal((1, 4, 8, 8), [i]), "captions": [f"sample {i}"]}

    manifest = Manifest({"shard_size": 4, "t_buckets": []}, None, None, 10, (), "1")
    build_shards(folder, manifest, parts)


def test_a_cache_is_built_by_one_build_at_a_time(tmp_path):
    """Another one, from this process or from others, waits for nothing and changes nothing."""
    folder, refused = tmp_path / "cache", []

    def parts(first: int, length: int):
        with pytest.raises(CacheError, match="is being built by another process"):
            build_simple(folder)
        child = multiprocessing.get_context("fork").Process(target=build_simple, args=(folder,))
        child.start()
        child.join(60)
        refused.append(child.exitcode)
        for i in range(first, first + length):
            yield {"latents": philox_normal((1, 4, 8, 8), [i]), "captions": [f"sample {i}"]}

    build_shards(folder, Manifest({"shard_size": 4, "t_buckets": []}, None, None, 10, (), "1"), parts)
    assert refused == [1, 1, 1]
    build_simple(tmp_path / "alone")
    assert contents(folder) == contents(tmp_path / "alone")
    build_simple(folder)  # free again


def test_a_folder_by_the_name_of_ours_is_left_alone(tmp_path):
    for name in ("begun", "finished", "new"):
        (tmp_path / name).mkdir()
        if name != "new":
            build_simple(tmp_path / name)
        if name == "begun":
            manifest = json.loads((tmp_path / name / "manifest.json").read_text())
            (tmp_path / name / "manifest.json").write_text(json.dumps(manifest | {"shards": []}))
        (tmp_path / name / "building").mkdir()
        (tmp_path / name / "building" / "plans.txt").write_text("of a house")
        with pytest.raises(CacheError, match=r"building was not made|not empty and not a cache"):
            build_simple(tmp_path / name)
        assert (tmp_path / name / "building" / "plans.txt").read_text() == "of a house"


def test_links_are_not_followed_out_of_a_cache(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    claim(elsewhere, KIND)
    (elsewhere / "shard-00000.json").write_text("mine")
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "building").symlink_to(elsewhere)
    with pytest.raises(CacheError, match="not a cache"):
        build_simple(folder)
    (folder / "building").unlink()
    build_simple(folder)
    (folder / "building").symlink_to(elsewhere)
    with pytest.raises(CacheError, match="building was not made"):
        build_simple(folder)
    (folder / "building").unlink()
    (folder / "building").mkdir()
    (tmp_path / "letter").write_text("dear reader")
    (folder / "building" / MARK).symlink_to(tmp_path / "letter")
    with pytest.raises(CacheError, match="building was not made"):
        build_simple(folder)
    assert (tmp_path / "letter").read_text() == "dear reader"
    assert (elsewhere / "shard-00000.json").read_text() == "mine"


def _build_until(step: int, folder: Path) -> None:
    """In a child: build, and die without any clean-up at the given call that changes the disk."""
    counter = [0]

    def dying(name: str):
        original = getattr(os, name)

        def call(*args, **kwargs):
            counter[0] += 1
            if counter[0] == step:
                os._exit(9)
            return original(*args, **kwargs)

        return call

    for name in ("replace", "rename", "fsync", "mkdir", "chmod", "unlink", "rmdir"):
        setattr(os, name, dying(name))
    build_simple(folder)
    os._exit(0)


def test_a_kill_at_any_point_and_another_run_give_the_same_bytes(tmp_path):
    build_simple(tmp_path / "whole")
    wanted = contents(tmp_path / "whole")
    fork = multiprocessing.get_context("fork")
    states = []
    for step in range(1, 100):
        folder = tmp_path / f"killed-{step}"
        child = fork.Process(target=_build_until, args=(step, folder))
        child.start()
        child.join(60)
        if child.exitcode == 0:
            break
        assert child.exitcode == 9
        begun = (folder / "manifest.json").exists()
        states.append(begun + (begun and cache_format.read_manifest(folder).complete))
        if states[-1] == 2:
            assert len(FeatureCache(folder)) == 10
        else:
            with pytest.raises(CacheError, match="not finished" if begun else "not a cache"):
                FeatureCache(folder)
        build_simple(folder)
        assert contents(folder) == wanted
    assert child.exitcode == 0
    # Killed before there was a manifest, while shards were written, and after all were done.
    assert [states.count(i) >= n for i, n in ((0, 4), (1, 20), (2, 4))] == [True] * 3


def test_what_was_finished_before_a_kill_is_not_computed_again(copy, encoders, teachers):
    manifest = json.loads((copy / "manifest.json").read_text())
    wanted = contents(copy)
    claim(copy / "building", KIND)
    for record in manifest["shards"][:2]:
        (copy / "building" / record["file"]).with_suffix(".json").write_text(json.dumps(record))
    (copy / "manifest.json").write_text(json.dumps(manifest | {"shards": []}))
    (copy / "shard-00002.safetensors").write_bytes(b"half")
    counts = []
    build_cache(
        copy,
        DemoScenes(10),
        encoders,
        teachers,
        progress=lambda done, total: counts.append((done, total)),
        **SETTINGS,
    )
    assert counts == [(0, 2), (2, 2)]
    assert contents(copy) == wanted


def test_two_processes_give_the_same_bytes(tmp_path):
    """Each with its share of the shards, as `accelerate launch` tells them where there are GPUs."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(7):
        Image.new("RGB", (40, 40), (30 * i, 9, 9)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("castle " * (60 if i in (1, 2, 5) else 1))
    arguments = [str(pictures), "--shard-size", "2", "--micro-batch", "2", "--size", "32"]
    arguments += ["--buckets", "0.2,0.8", "--device", "cpu"]
    done = run(command, ["tinyflux", "cache", str(tmp_path / "two"), *arguments], processes=2)
    assert done.codes == [0, 0], done.stderr[-3000:]
    assert done.stdout.count("7 samples in 4 shards") == 1
    told = [line for line in done.stderr.splitlines() if "are longer than" in line]
    assert len(told) == 1 and "3 of 7 captions" in told[0]
    assert {word.strip(",") for word in told[0].split()} >= {"1.png", "2.png", "5.png"}
    result = CliRunner().invoke(app, ["cache", str(tmp_path / "one"), *arguments])
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("finished", [True, False])
def test_changed_settings_are_refused_with_what_changed(copy, built, encoders, teachers, finished):
    if not finished:
        manifest = json.loads((copy / "manifest.json").read_text())
        (copy / "manifest.json").write_text(json.dumps(manifest | {"shards": []}))
    before = contents(copy)
    changes = {
        "seed: 0, now 1": {"seed": 1},
        "width: 32, now 64": {"width": 64},
        'dtype: "float16", now "float32"': {"dtype": "float32"},
        "t_buckets": {"t_buckets": (0.1, 0.9)},
    }
    for message, change in changes.items():
        with pytest.raises(CacheError, match=f"settings.{message}"):
            build_cache(copy, DemoScenes(10), encoders, teachers, **{**SETTINGS, **change})
    with pytest.raises(CacheError, match="length: 10, now 11"):
        build_cache(copy, DemoScenes(11), encoders, teachers, **SETTINGS)
    with pytest.raises(CacheError, match=r"source\.first: 0, now 3"):
        build_cache(copy, DemoScenes(10, first=3), encoders, teachers, **SETTINGS)
    swapped = Teachers(
        ExpertFeatures(sol=teachers.features.lune, lune=teachers.features.lune, encode_prompt=lambda p: None),
        teachers.vae,
        teachers.text_encoder,
    )
    with pytest.raises(CacheError, match=r"experts\.sol\.fingerprint"):
        build_cache(copy, DemoScenes(10), encoders, swapped, **SETTINGS)
    with pytest.raises(CacheError, match="experts"):
        build_cache(copy, DemoScenes(10), encoders, None, **SETTINGS)
    shorter = TextEncoder(encoders.clip.model, encoders.clip.tokenizer, 20)
    with pytest.raises(CacheError, match=r"encoders\.clip\.max_length: \d+, now 20"):
        build_cache(copy, DemoScenes(10), StudentEncoders(encoders.vae, shorter), teachers, **SETTINGS)
    assert contents(copy) == before


def damage_cut(file: Path, folder: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def damage_bit(file: Path, folder: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1000] ^= 4
    file.write_bytes(data)


def damage_missing(file: Path, folder: Path) -> None:
    file.unlink()


def damage_exchanged(file: Path, folder: Path) -> None:
    other, spare = folder / "shard-00000.safetensors", folder / "spare"
    other.rename(spare)
    file.rename(other)
    spare.rename(file)


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_cut, r"shard-00001\.safetensors has \d+ bytes instead of"),
        (damage_bit, r"shard-00001\.safetensors has changed"),
        (damage_missing, r"shard-00001\.safetensors is missing"),
        (damage_exchanged, r"shard-0000[01]\.safetensors has"),
    ],
)
def test_damage_is_named(copy, encoders, teachers, damage, message):
    damage(copy / "shard-00001.safetensors", copy)
    with pytest.raises(CacheError, match=message):
        FeatureCache(copy)
    with pytest.raises(CacheError, match=message):
        build_cache(copy, DemoScenes(10), encoders, teachers, **SETTINGS)


def test_exchanged_shards_are_found_without_reading_them(tmp_path, encoders):
    class SameCaptions(DemoScenes):
        def __getitem__(self, index):
            return super().__getitem__(index)._replace(caption="a scene")

    build_cache(tmp_path / "cache", SameCaptions(8), encoders, None, **SETTINGS)
    assert len(FeatureCache(tmp_path / "cache", verify=False)) == 8
    damage_exchanged(tmp_path / "cache" / "shard-00001.safetensors", tmp_path / "cache")
    with pytest.raises(CacheError, match="exchanged"):
        FeatureCache(tmp_path / "cache", verify=False)


def test_a_shard_damaged_while_building_is_named(copy, encoders, teachers):
    manifest = json.loads((copy / "manifest.json").read_text())
    claim(copy / "building", KIND)
    for record in manifest["shards"]:
        (copy / "building" / record["file"]).with_suffix(".json").write_text(json.dumps(record))
    (copy / "manifest.json").write_text(json.dumps(manifest | {"shards": []}))
    damage_bit(copy / "shard-00001.safetensors", copy)
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors has changed"):
        build_cache(copy, DemoScenes(10), encoders, teachers, **SETTINGS)


def test_records_of_another_shard_are_refused(tmp_path):
    """A record counts for the shard by whose name it lies, whole and with its very samples."""
    build_simple(tmp_path / "whole")
    folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / "cache"))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"shards": []}))
    first, second, _ = manifest["shards"]
    for record in (second, first | {"first": 4}, first | {"length": 3}, first | {"file": second["file"]}):
        claim(folder / "building", KIND)
        (folder / "building" / "shard-00000.json").write_text(json.dumps(record))
        with pytest.raises(CacheError, match=r"shard-00000\.json describes another shard: delete it"):
            build_simple(folder)
    for text in ("{", "[]", json.dumps(first | {"bytes": "many"})):
        (folder / "building" / "shard-00000.json").write_text(text)
        with pytest.raises(CacheError, match=r"shard-00000\.json (is damaged|describes).*delete it"):
            build_simple(folder)
    (folder / "building" / "shard-00000.json").unlink()
    build_simple(folder)
    assert contents(folder) == contents(tmp_path / "whole")


def test_manifests_are_checked(copy, tmp_path):
    file = copy / "manifest.json"
    manifest = json.loads(file.read_text())
    given = manifest["settings"]
    for change, message in (
        ({"schema": 2}, "schema version 2"),
        ({"shards": manifest["shards"][::-1]}, "out of order at shard-00002"),
        ({"shards": manifest["shards"][:2]}, "8 samples instead of 10"),
        ({"shards": []}, "not finished"),
        ({"shards": [{}]}, "damaged"),
        ({"length": 0}, "damaged"),
        ({"length": 2**40}, "damaged"),
        *(({"settings": given | {"shard_size": size}}, "damaged") for size in (0, -4, 2**31, True)),
        ({"settings": {k: v for k, v in given.items() if k != "shard_size"}}, "damaged"),
        ({"settings": {k: v for k, v in given.items() if k != "t_buckets"}}, "damaged"),
    ):
        file.write_text(json.dumps(manifest | change))
        with pytest.raises(CacheError, match=message):
            FeatureCache(copy)
    file.write_text("{")
    with pytest.raises(CacheError, match="damaged"):
        FeatureCache(copy)
    with pytest.raises(CacheError, match="is not a cache"):
        FeatureCache(tmp_path / "absent")


def test_bad_settings_stop_before_any_work(tmp_path, encoders, teachers):
    source = DemoScenes(2)
    for change, message in (
        ({"t_buckets": (0.5, 0.5)}, "must increase"),
        ({"t_buckets": (0.5, 1.5)}, "between 0"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"height": 30}, "multiples of 4"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ValueError, match=message):
            build_cache(tmp_path / "cache", source, encoders, teachers, **{**SETTINGS, **change})
    assert not (tmp_path / "cache").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(CacheError, match="not empty"):
        build_cache(tmp_path / "mine", source, encoders, teachers, **SETTINGS)


def test_features_that_are_not_finite_name_the_sample(tmp_path, encoders, teachers, demo_pipeline):
    class Broken(DemoScenes):
        def __getitem__(self, index):
            return super().__getitem__(index)._replace(caption="bad" if index == 1 else "good")

    def encode(prompts):
        embeds = demo_pipeline.encode_texts(prompts)
        embeds[[p == "bad" for p in prompts]] = torch.nan
        return embeds

    features = ExpertFeatures(lune=teachers.features.lune, encode_prompt=encode)
    broken = Teachers(features, teachers.vae, teachers.text_encoder)
    with pytest.raises(ValueError, match="lune of scene 1 are not finite"):
        build_cache(tmp_path / "cache", Broken(2), encoders, broken, **SETTINGS)


class Told(DemoScenes):
    """Scenes with captions of the test's own, and pictures of another mode."""

    def __init__(self, *captions):
        super().__init__(len(captions))
        self.captions = captions

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample._replace(caption=self.captions[index], image=sample.image.convert("RGBA"))


def test_captions_that_are_cut_are_counted_in_one_line(tmp_path, encoders, teachers, caplog):
    long = "castle " * 60
    source = Told("a castle", long + "at night", "", long, "a street", long, long, long)
    build_cache(tmp_path / "cache", source, encoders, teachers, **SETTINGS)
    length = encoders.clip.max_length
    assert [record.getMessage() for record in caplog.records] == [
        f"5 of 8 captions are longer than CLIPTextModel's {length} tokens and are cut there: "
        "scene 1, scene 3, scene 5 and 2 more"
    ]
    caplog.clear()
    build_cache(tmp_path / "short", Told("a castle", ""), encoders, teachers, **SETTINGS)
    assert not caplog.records


def test_a_prompt_that_is_cut_is_told_unless_it_is_counted(encoders, demo_pipeline, caplog):
    long = "castle " * 60 + "street"
    for encode in (encoders.text, demo_pipeline.encode_texts):
        caplog.clear()
        encode(["a castle", long])
        (record,) = caplog.records
        assert "this was cut off" in record.getMessage() and "street" in record.getMessage()
        with cut_silently():
            encode([long])
        assert caplog.records == [record]


def test_each_text_encoder_counts_what_it_cuts(tmp_path, encoders, demo_pipeline, caplog):
    config = T5Config(vocab_size=len(demo_pipeline.tokenizer), d_model=24, d_kv=8, d_ff=16, num_layers=1)
    length = encoders.clip.max_length
    t5 = TextEncoder(T5EncoderModel(config).eval(), demo_pipeline.tokenizer, length + 8)
    both = StudentEncoders(encoders.vae, encoders.clip, t5)
    source = Told("castle " * (length + 3), "castle " * 2 * length, "a castle")
    build_cache(tmp_path / "cache", source, both, None, **SETTINGS)
    assert [record.getMessage().split(" and are cut")[0] for record in caplog.records] == [
        f"2 of 3 captions are longer than CLIPTextModel's {length} tokens",
        f"1 of 3 captions are longer than T5EncoderModel's {length + 8} tokens",
    ]


def test_a_caption_that_is_no_text_names_its_sample(tmp_path, encoders):
    with pytest.raises(ValueError, match=r"caption of scene 1 holds half a surrogate pair.*a castle \\ud83d"):
        build_cache(tmp_path / "cache", Told("a", "a castle \ud83d"), encoders, None, **SETTINGS)


def test_an_image_painted_over_to_the_same_size_is_another_setting(tmp_path, encoders):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.txt").write_text("a castle")
    sizes = set()
    for colour in ("#fa0a0a", "#0a0afa"):
        Image.new("RGB", (32, 32), colour).save(pictures / "a.png")
        sizes.add((pictures / "a.png").stat().st_size)
        if colour == "#fa0a0a":
            build_cache(tmp_path / "cache", ImageFolder(pictures), encoders, None, **SETTINGS)
    assert len(sizes) == 1
    with pytest.raises(CacheError, match=r"settings\.source\.fingerprint"):
        build_cache(tmp_path / "cache", ImageFolder(pictures), encoders, None, **SETTINGS)


def test_between_buckets_and_at_them():
    generator = torch.Generator().manual_seed(0)
    buckets = torch.tensor([0.1, 0.25, 0.3, 0.9])
    values = torch.randn(500, 4, 3, 2, generator=generator)
    t = torch.rand(500, generator=generator)
    t[:4], t[4:8] = buckets, torch.tensor([0.0, 1.0, 0.05, 0.95])
    found = at_time(values, buckets, t)
    flat = values.flatten(2).double().numpy()
    for i in range(500):
        expected = [np.interp(t[i].item(), buckets.double().numpy(), flat[i, :, j]) for j in range(6)]
        np.testing.assert_allclose(found[i].flatten().numpy(), expected, rtol=1e-5, atol=1e-5)
    for i in range(4):
        assert torch.equal(found[i], values[i, i])
    assert torch.equal(found[4], values[4, 0]) and torch.equal(found[5], values[5, 3])
    # The same decimal fraction in float64 is the same bucket.
    assert torch.equal(at_time(values[:4], buckets, torch.tensor([0.1, 0.25, 0.3, 0.9]).double()), found[:4])
    assert torch.equal(at_time(values[:, :1], buckets[:1], t), values[:, 0])
    assert at_time(values.half(), buckets, t).dtype == torch.float16
    with pytest.raises(TypeError, match="float32 or float64"):
        at_time(values, buckets, t.bfloat16())
    with pytest.raises(ValueError, match=r"\[B, T"):
        at_time(values, buckets[:2], t)


def test_lookups_do_not_wait_for_the_device():
    from bench.counting import count_dispatches

    values, buckets, t = torch.zeros(8, 10, 5), torch.linspace(0.05, 0.95, 10), torch.rand(8)
    assert count_dispatches(lambda: at_time(values, buckets, t))[1] == 0


def test_many_sources_in_one_run(tmp_path, built, encoders, demo_pipeline):
    sol = Teachers.from_pipeline(demo_pipeline, ("sol",))
    build_cache(tmp_path / "sol", DemoScenes(3, first=50), encoders, sol, **SETTINGS)
    build_cache(tmp_path / "none", DemoScenes(2, first=90), encoders, None, **SETTINGS)
    caches = [FeatureCache(folder) for folder in (built, tmp_path / "sol", tmp_path / "none")]
    both = MultiSource(caches)
    assert len(both) == 15
    batch = next(iter(DataLoader(both, batch_size=15)))
    assert batch["has_lune"].tolist() == [True] * 10 + [False] * 5
    assert batch["has_sol"].tolist() == [True] * 13 + [False] * 2
    assert batch["source"].tolist() == [0] * 10 + [1] * 3 + [2] * 2
    width = demo_pipeline.unet_lune.config["block_out_channels"][-1]
    assert batch["lune"].shape == (15, 3, width) and batch["sol_maps"].shape == (15, 3, 8, 8)
    assert torch.equal(batch["sol_maps"][10], caches[1][0]["sol_maps"])
    assert torch.equal(both[-1]["latents"], caches[2][1]["latents"])
    assert batch["caption"][13] == caches[2].caption(0)
    torch.testing.assert_close(both.t_buckets, torch.tensor(BUCKETS))
    alone = next(iter(DataLoader(MultiSource(caches[2:]), batch_size=2)))
    assert "lune" not in alone and not alone["has_sol"].any()


def test_sources_that_do_not_go_together_are_refused(tmp_path, built, encoders, teachers, demo_pipeline):
    for change, message in (
        ({"t_buckets": (0.1, 0.4, 0.9)}, "t_buckets"),
        ({"width": 64}, "the shape of latents"),
        ({"dtype": "float32"}, "the shape of latents"),
    ):
        folder = tmp_path / message.replace(" ", "") / next(iter(change))
        folder.parent.mkdir(exist_ok=True)
        build_cache(folder, DemoScenes(1), encoders, teachers, **{**SETTINGS, **change})
        with pytest.raises(ValueError, match=message):
            MultiSource([FeatureCache(built), FeatureCache(folder)])
    old = Teachers.from_pipeline(demo_pipeline, convention="tiny-flux-v4")
    build_cache(tmp_path / "old", DemoScenes(1), encoders, old, **SETTINGS)
    with pytest.raises(ValueError, match="convention"):
        MultiSource([FeatureCache(built), FeatureCache(tmp_path / "old")])
    manifest = json.loads((tmp_path / "old" / "manifest.json").read_text())
    manifest["settings"]["convention"] = "sample"
    manifest["experts"]["lune"]["fingerprint"] = "another"
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"experts\.lune"):
        MultiSource([FeatureCache(built), FeatureCache(tmp_path / "old")])
    with pytest.raises(ValueError, match="at least one"):
        MultiSource([])


def test_worker_processes_read_the_same(built):
    cache = FeatureCache(built)
    here = [cache[i]["lune"] for i in range(10)]
    loader = DataLoader(cache, batch_size=5, num_workers=1, multiprocessing_context="fork")
    assert torch.equal(torch.cat([batch["lune"] for batch in loader]), torch.stack(here))
    import pickle

    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again[7]["lune"], here[7]) and len(pickle.dumps(cache)) < 20_000


def test_flux_vaes_have_a_scale_and_a_shift_and_t5_its_own_states(tmp_path, encoders, demo_pipeline):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        latent_channels=16,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    ).eval()
    image = Image.effect_noise((32, 32), 50).convert("RGB")
    with torch.no_grad():
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        expected = (vae.encode(pixels).latent_dist.mean - 0.1159) * 0.3611
    torch.testing.assert_close(encode_images(vae, [image]), expected, rtol=1e-4, atol=1e-5)

    tokenizer = demo_pipeline.tokenizer
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).eval()
    for part, model in (("vae", vae), ("text_encoder", encoders.clip.model), ("text_encoder_2", t5)):
        model.save_pretrained(tmp_path / "flux" / part)
    for part in ("tokenizer", "tokenizer_2"):
        tokenizer.save_pretrained(tmp_path / "flux" / part)
    (tmp_path / "flux" / "model_index.json").write_text("{}")
    pipeline = str(tmp_path / "flux")
    assert find_t5(pipeline) == pipeline and find_t5(experts_path()) is None
    student = StudentEncoders.load(pipeline, pipeline, pipeline, t5_length=20)
    build_cache(tmp_path / "cache", DemoScenes(3), student, None, height=32, width=48, micro_batch=2)
    item = FeatureCache(tmp_path / "cache")[1]
    assert item["latents"].shape == (16, 16, 24) and item["prompt_embeds"].shape == (20, 24)
    caption = DemoScenes(3)[1].caption
    tokens = tokenizer(caption, padding="max_length", max_length=20, truncation=True, return_tensors="pt")
    with torch.no_grad():
        states = t5(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state[0]
    torch.testing.assert_close(item["prompt_embeds"].float(), states, rtol=2e-3, atol=2e-3)
    assert torch.equal(item["prompt_mask"], tokens.attention_mask[0].bool())
    pooled = encoders.text([caption]).pooled[0]
    torch.testing.assert_close(item["pooled_prompt_embeds"].float(), pooled, rtol=2e-3, atol=2e-3)
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["encoders"]["text_states"] == "t5" and manifest["experts"] is None
    # A component's own folder, with its tokenizer beside it, serves as well.
    alone = TextEncoder.load(T5EncoderModel, tmp_path / "flux" / "text_encoder_2", 20)
    torch.testing.assert_close(alone([caption]).states[0], states)


def test_encoders_of_half_precision_files_compute_in_float32(tmp_path, demo_pipeline):
    """Or in their own, as they are told; what they say is float32 either way."""
    for part in ("vae", "text_encoder"):
        copy_module.deepcopy(getattr(demo_pipeline, part)).half().save_pretrained(tmp_path / part)
    demo_pipeline.tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert load_vae(tmp_path / "vae", torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    loaded = StudentEncoders.load(tmp_path / "vae", tmp_path / "text_encoder")
    models = (loaded.vae, loaded.clip.model)
    assert {p.dtype for model in models for p in model.parameters()} == {torch.float32}
    for dtype in (torch.float32, torch.bfloat16):
        text = loaded.to(dtype).text(["a castle"])
        assert text.states.dtype == text.pooled.dtype == torch.float32 and text.mask.dtype == torch.bool


def test_the_command(tmp_path):
    def run(*arguments, code=0):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == code, (result.output, result.exception)
        return result.output

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, sample in enumerate(DemoScenes(3)[j] for j in range(3)):
        sample.image.resize((90, 70)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(sample.caption)
    cache = tmp_path / "cache"
    shown = run("cache", cache, pictures, "--size", "32x64", "--buckets", "0.2,0.7", "--teachers", "sol")
    assert "3 samples in 1 shards" in shown
    shown = run("check", cache)
    assert "4 × 8 × 16" in shown and "0.2, 0.7 (sample)" in shown and "lune" not in shown
    run("show", cache, "-o", tmp_path / "maps.png", "--samples", "0,2")
    sheet = Image.open(tmp_path / "maps.png")
    assert sheet.width > 300 and len(sheet.convert("RGB").getcolors(1 << 20)) > 100
    run("export", cache, "-o", tmp_path / "upstream")
    run("import", tmp_path / "again", tmp_path / "upstream", "--convention", "sample")
    assert "3 samples" in run("check", tmp_path / "again")
    for arguments, message in (
        (("cache", tmp_path / "x"), "give a SOURCE"),
        (("cache", tmp_path / "x", pictures, "--demo"), "give a SOURCE"),
        (("cache", tmp_path / "x", "--demo", "--teachers", "david"), 'unknown --teachers "david": use sol'),
        (("cache", tmp_path / "x", "--demo", "--convention", "upstream"), "use sample or tiny-flux-v4"),
        (("cache", tmp_path / "x", "--demo", "--dtype", "int8"), 'unknown --dtype "int8": use float32'),
        (("cache", tmp_path / "x", "--demo", "--size", "big"), "not a size"),
        (("cache", tmp_path / "x", "--demo", "--vae", tmp_path, "--experts", "demo"), "no model's folder"),
        (("cache", tmp_path / "x", "--demo", "--vae", tmp_path), "give --preset sd15, or --experts"),
        (("cache", tmp_path / "x", "--demo", "--device", "toaster"), "not a device"),
        (("show", tmp_path / "again", "-o", "maps.jpg"), ".png"),
        (("show", cache, "-o", tmp_path / "maps.png", "--samples", "3"), "0..2"),
        (("check", tmp_path), "not a cache"),
    ):
        assert message in run(*arguments, code=2)
    assert not (tmp_path / "x").exists()


def test_encoders_from_the_hub(tmp_path, monkeypatch, demo_pipeline):
    """A pipeline's parts are fetched, and nothing else of it."""
    import huggingface_hub

    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name != "owner/pipeline":
            raise huggingface_hub.errors.RepositoryNotFoundError("no such repository", response=Response())
        return str(experts_path())

    class Response:
        headers, request, status_code = {}, None, 404

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    student = StudentEncoders.load("owner/pipeline", "owner/pipeline")
    assert student.describe() == StudentEncoders.load(experts_path(), experts_path()).describe()
    wanted = {pattern.split("/")[0] for _, patterns in asked for pattern in patterns if "/" in pattern}
    assert wanted == {"vae", "text_encoder", "tokenizer"}
    with pytest.raises(CheckpointError, match="owner/other cannot be had from the hub: no such repository"):
        TextEncoder.load(CLIPTextModel, "owner/other")
    with pytest.raises(CheckpointError, match="there is no nowhere; give a folder"):
        TextEncoder.load(CLIPTextModel, "nowhere")


def test_caches_of_two_precisions_go_together(tmp_path, encoders, demo_pipeline):
    """As one built on a GPU in half precision and one built on a CPU do."""
    other = copy_module.deepcopy(demo_pipeline).to(dtype=torch.bfloat16)
    settings = SETTINGS | {"t_buckets": (0.5,)}
    folders = {"whole": demo_pipeline, "half": other}
    for name, pipe in folders.items():
        teachers = Teachers.from_pipeline(pipe, ("lune",))
        build_cache(tmp_path / name, DemoScenes(2), encoders, teachers, **settings)
    whole, half = (FeatureCache(tmp_path / name) for name in folders)
    assert "expert_latents" not in half.shapes  # the VAE's weights are the same
    assert len(MultiSource([whole, half])) == 4
    check_shared_latents(half.manifest, demo_pipeline.vae)
    check_shared_latents(whole.manifest, other.vae)
    with torch.no_grad():
        other.unet_lune.conv_in.weight *= 1.1
    tuned = Teachers.from_pipeline(other, ("lune",))
    build_cache(tmp_path / "tuned", DemoScenes(2), encoders, tuned, **settings)
    with pytest.raises(ValueError, match=r"differ in experts\.lune"):
        MultiSource([whole, FeatureCache(tmp_path / "tuned")])


def test_a_cache_keeps_masks_as_large_as_its_latents(tmp_path, encoders, built):
    for i in range(3):
        Image.new("RGB", (64, 32), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"caption {i}")
    masks = tmp_path.parent / f"{tmp_path.name}-masks"
    masks.mkdir()
    mask = Image.new("L", (64, 32))
    mask.paste(255, (0, 0, 32, 32))
    mask.save(masks / "1.png")
    source = ImageFolder(tmp_path, masks=masks)
    settings = {"height": 32, "width": 64, "micro_batch": 2, "shard_size": 2}
    build_cache(tmp_path / "cache", source, encoders, None, **settings)
    cache = FeatureCache(tmp_path / "cache")
    assert cache.shapes["loss_mask"] == ["uint8", *cache.shapes["latents"][2:]]
    height, width = cache.shapes["latents"][2:]
    expected = torch.zeros(height, width, dtype=torch.uint8)
    expected[:, : width // 2] = 255
    assert torch.equal(cache[1]["loss_mask"], expected) and cache[2]["loss_mask"].min() == 255
    mixed = MultiSource([cache])
    assert mixed.has_masks and not MultiSource([FeatureCache(built)]).has_masks
