"""Upstream's four files, written and read back."""

from __future__ import annotations

import json

import pytest
import torch

from moe_sampler.kernels import philox_normal
from moe_sampler.tinyflux.features.cache_format import CacheError, Manifest
from moe_sampler.tinyflux.features.cache_read import FeatureCache
from moe_sampler.tinyflux.features.cache_shards import build_shards
from moe_sampler.tinyflux.features.exchange import export_upstream, import_upstream

BUCKETS = [(5 + 10 * i) / 100 for i in range(10)]


def make_cache(folder, lune=True, sol=True) -> FeatureCache:
    """Seven samples in three shards, of Flux's and Stable Diffusion's shapes."""

    def parts(first: int, length: int):
        seeds = range(first, first + length)
        draw = lambda step, *shape: philox_normal((length, *shape), seeds, step)  # noqa: E731
        found = {
            "latents": draw(0, 16, 4, 6).half(),
            "prompt_embeds": draw(1, 12, 20).half(),
            "prompt_mask": draw(2, 12) > 0,
            "pooled_prompt_embeds": draw(3, 24).half(),
            "captions": [f"prompt {i} ü" for i in seeds],
        }
        if lune:
            found["lune"] = draw(4, 10, 1280).half()
        if sol:
            found |= {"sol_stats": draw(5, 10, 3), "sol_maps": draw(6, 10, 8, 8)}
        yield found

    settings = {"shard_size": 3, "t_buckets": BUCKETS, "convention": "sample"}
    build_shards(folder, Manifest(settings, None, None, 7, (), "1"), parts)
    return FeatureCache(folder)


def load(path):
    return torch.load(path, weights_only=True)


def test_the_four_files_as_upstream_reads_them(tmp_path):
    cache = make_cache(tmp_path / "castles")
    written = export_upstream(cache, tmp_path / "out" / "here")
    assert [path.name for path in written] == ["encodings.pt", "lune.pt", "sol.pt", "meta.pt"]
    encodings, lune, sol, meta = (load(path) for path in written)
    assert set(encodings) == {"latents", "t5_embeds", "clip_pooled", "prompts", "dtype"}
    assert set(lune) == {"features", "t_buckets", "dtype"} and set(sol) == {
        "stats",
        "spatial",
        "t_buckets",
        "dtype",
    }
    assert meta == {"name": "castles"}
    shapes = [encodings["latents"], encodings["t5_embeds"], encodings["clip_pooled"], lune["features"]]
    assert [tuple(x.shape) for x in shapes] == [(7, 16, 4, 6), (7, 12, 20), (7, 24), (7, 10, 1280)]
    assert [tuple(sol[name].shape) for name in ("stats", "spatial")] == [(7, 10, 3), (7, 10, 8, 8)]
    assert encodings["dtype"] == lune["dtype"] == torch.float16 and sol["dtype"] == torch.float32
    assert encodings["prompts"] == [f"prompt {i} ü" for i in range(7)]
    halves = (encodings["latents"], encodings["t5_embeds"], encodings["clip_pooled"], lune["features"])
    assert {tensor.dtype for tensor in halves} == {torch.float16}
    for file in (lune, sol):
        torch.testing.assert_close(file["t_buckets"], torch.linspace(0.05, 0.95, 10))
    for i in range(7):
        item = cache[i]
        assert torch.equal(encodings["latents"][i], item["latents"])
        assert torch.equal(encodings["t5_embeds"][i], item["prompt_embeds"])
        assert torch.equal(encodings["clip_pooled"][i], item["pooled_prompt_embeds"])
        assert torch.equal(lune["features"][i], item["lune"])
        assert torch.equal(sol["stats"][i], item["sol_stats"]) and torch.equal(
            sol["spatial"][i], item["sol_maps"]
        )


def test_there_and_back(tmp_path):
    cache = make_cache(tmp_path / "castles")
    export_upstream(cache, tmp_path / "out", name="of mine")
    import_upstream(tmp_path / "out", tmp_path / "back", convention="sample", shard_size=5)
    back = FeatureCache(tmp_path / "back")
    assert len(back) == 7 and back.manifest.settings["source"]["name"] == "of mine"
    assert back.manifest.t_buckets == tuple(BUCKETS) and back.manifest.settings["convention"] == "sample"
    for i in range(7):
        before, after = cache[i], back[i]
        assert before.keys() == after.keys()
        # Upstream's files have no text mask.
        assert (
            before.pop("prompt_mask").shape == after["prompt_mask"].shape and after.pop("prompt_mask").all()
        )
        assert before.pop("caption") == after.pop("caption")
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert (
        import_upstream(tmp_path / "out", tmp_path / "back", convention="sample", shard_size=5)
        == back.manifest
    )
    with pytest.raises(CacheError, match="convention"):
        import_upstream(tmp_path / "out", tmp_path / "back", shard_size=5)


def test_upstreams_own_features_are_marked_as_such(tmp_path):
    export_upstream(make_cache(tmp_path / "castles"), tmp_path / "out")
    assert import_upstream(tmp_path / "out", tmp_path / "in").settings["convention"] == "tiny-flux-v4"


@pytest.mark.parametrize("lune, sol", [(True, False), (False, True), (False, False)])
def test_a_missing_expert_stays_missing(tmp_path, lune, sol):
    cache = make_cache(tmp_path / "castles", lune, sol)
    names = {path.name for path in export_upstream(cache, tmp_path / "out")}
    assert names == {"encodings.pt", "meta.pt"} | ({"lune.pt"} if lune else set()) | (
        {"sol.pt"} if sol else set()
    )
    import_upstream(tmp_path / "out", tmp_path / "back")
    back = FeatureCache(tmp_path / "back")
    assert (back.has_lune, back.has_sol) == (lune, sol) and ("lune" in back[0]) == lune


def test_nothing_is_written_over(tmp_path):
    cache = make_cache(tmp_path / "castles")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lune.pt").write_text("precious")
    with pytest.raises(CacheError, match=r"lune\.pt exist already"):
        export_upstream(cache, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lune.pt"]


def spoil(folder, file, **changes):
    values = load(folder / file)
    values.update(changes)
    torch.save({key: value for key, value in values.items() if value is not None}, folder / file)


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("lune.pt", {"features": torch.zeros(6, 10, 1280)}, "different lengths"),
        ("lune.pt", {"features": torch.zeros(7, 9, 1280)}, "9 times, t_buckets 10"),
        ("lune.pt", {"features": None}, "features must be a tensor of 3 dimensions"),
        ("lune.pt", {"t_buckets": torch.linspace(0.1, 0.9, 10)}, "different t_buckets"),
        ("sol.pt", {"t_buckets": torch.linspace(0.9, 0.1, 10)}, "must increase"),
        ("sol.pt", {"stats": torch.full((7, 10, 3), torch.nan)}, "sol_stats has values that are not finite"),
        ("encodings.pt", {"prompts": ["one"]}, "different lengths"),
        ("encodings.pt", {"prompts": None}, "not a list of texts"),
        ("encodings.pt", {"prompts": ["a"] * 6 + ["\ud83d"]}, r"prompts\[6\] holds half a surrogate pair"),
        ("encodings.pt", {"latents": torch.zeros(7, 16)}, "latents must be a tensor of 4 dimensions"),
        ("meta.pt", {"name": None}, "has no name"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, file, changes, message):
    export_upstream(make_cache(tmp_path / "castles"), tmp_path / "out")
    spoil(tmp_path / "out", file, **changes)
    with pytest.raises(ValueError, match=message):
        import_upstream(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


class Anything:
    pass


def test_pickles_that_run_code_are_refused(tmp_path):
    export_upstream(make_cache(tmp_path / "castles"), tmp_path / "out")
    torch.save({"latents": Anything()}, tmp_path / "out" / "encodings.pt")
    with pytest.raises(CacheError, match=r"encodings\.pt holds more than tensors.* refuses \S+Anything\."):
        import_upstream(tmp_path / "out", tmp_path / "back")
    (tmp_path / "out" / "encodings.pt").write_bytes(b"PK nonsense")
    with pytest.raises(CacheError, match=r"encodings\.pt is damaged"):
        import_upstream(tmp_path / "out", tmp_path / "back")


def write_shards(folder, cache, state, size=3):
    """As upstream's incremental builders leave them."""
    export_upstream(cache, folder.with_name("whole"))
    for kind in ("encodings", "lune", "sol"):
        (folder / kind).mkdir(parents=True)
        values = load(folder.with_name("whole") / f"{kind}.pt")
        for i, first in enumerate(range(0, len(cache), size)):
            part = {
                name: value[first : first + size] if name not in ("t_buckets", "dtype") else value
                for name, value in values.items()
            }
            part = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in part.items()}
            torch.save(part, folder / kind / f"shard_{i:04d}.pt")
    common = {"name": "streamed", "n_samples": len(cache), "build_lune": True, "build_sol": True}
    (folder / "state.json").write_text(json.dumps(common | state))


STATES = {
    "build_incremental": {"shard_size": 3, "completed_shards": [0, 1, 2]},
    "build_streaming": {"chunk_size": 3, "completed_chunks": [0, 1, 2]},
    "build_from_hf_dataset": {"chunk_size": 3, "enc_done": [0, 1, 2], "lune_done": [0, 1, 2]},
}


@pytest.mark.parametrize("builder", STATES)
def test_shards_of_upstreams_builders(tmp_path, builder):
    cache = make_cache(tmp_path / "castles")
    write_shards(tmp_path / "up", cache, STATES[builder])
    import_upstream(tmp_path / "up", tmp_path / "back", shard_size=4)
    back = FeatureCache(tmp_path / "back")
    assert len(back) == 7 and back.manifest.settings["source"]["name"] == "streamed"
    for i in range(7):
        before, after = cache[i], back[i]
        assert before.pop("prompt_mask").shape == after.pop("prompt_mask").shape
        assert before.pop("caption") == after.pop("caption")
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_a_build_that_was_not_finished_is_refused(tmp_path, caplog):
    write_shards(tmp_path / "up", make_cache(tmp_path / "castles"), STATES["build_incremental"])
    (tmp_path / "up" / "lune" / "shard_0001.pt").rename(tmp_path / "kept.pt")
    with pytest.raises(CacheError, match=r"lune lacks shard_0001\.pt: the build wasn't finished"):
        import_upstream(tmp_path / "up", tmp_path / "back")
    (tmp_path / "kept.pt").rename(tmp_path / "up" / "lune" / "shard_0001.pt")
    state = json.loads((tmp_path / "up" / "state.json").read_text())
    (tmp_path / "up" / "state.json").write_text(json.dumps(state | {"n_samples": 9}))
    with pytest.raises(CacheError, match=r"has 7 samples, state\.json says 9"):
        import_upstream(tmp_path / "up", tmp_path / "back")
    # A stream that ended early is finished all the same.
    streamed = state | {"n_samples": 9, "completed_chunks": [0, 1, 2]}
    (tmp_path / "up" / "state.json").write_text(json.dumps(streamed))
    assert import_upstream(tmp_path / "up", tmp_path / "back").length == 7
    assert "7 samples of the 9" in caplog.text


def test_captions_that_upstream_dropped_are_empty(tmp_path, caplog):
    """As saving what its incremental builders return does."""
    export_upstream(make_cache(tmp_path / "castles"), tmp_path / "out")
    values = load(tmp_path / "out" / "encodings.pt")
    torch.save(values | {"prompts": None}, tmp_path / "out" / "encodings.pt")
    import_upstream(tmp_path / "out", tmp_path / "back")
    assert "no captions" in caplog.text and FeatureCache(tmp_path / "back").caption(3) == ""
