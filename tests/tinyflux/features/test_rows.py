"""Rows of images and captions to rows of features, and those to a cache."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from moe_sampler.cli import app
from moe_sampler.data.scenes import DemoScenes
from moe_sampler.tinyflux import ExtractFeatures, FeatureCache, import_rows
from moe_sampler.tinyflux.features.cache_format import CacheError

pa = pytest.importorskip("pyarrow", reason="pyarrow isn't installed: the extra datasets brings it")
parquet = pytest.importorskip("pyarrow.parquet")

COUNT, BUCKETS = 5, (0.25, 0.75)


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def extract():
    return ExtractFeatures(t_buckets=BUCKETS, map_times=(0.5,), micro_batch=3)


@pytest.fixture(scope="module")
def scenes():
    """As files' bytes, whose seeds are those of a cache that begins with 7."""
    found = []
    for i, (_, image, caption) in enumerate(DemoScenes(COUNT)[i] for i in range(COUNT)):
        file = io.BytesIO()
        image.save(file, format="PNG")
        found.append({"image": file.getvalue(), "text": caption, "seed": 7 + i, "id": f"x{i}"})
    return found


@pytest.fixture(scope="module")
def rows(extract, scenes):
    return extract(batch(scenes))


def batch(rows) -> dict[str, np.ndarray]:
    return {name: np.array([row[name] for row in rows], dtype=object) for name in rows[0]}


def write(rows, file) -> None:
    """As Ray does it: a list a row."""
    columns = {}
    for name, values in rows.items():
        flat = values.ndim > 1
        columns[name] = [v.ravel() for v in values] if flat else pa.array(values.tolist())
    parquet.write_table(pa.table(columns), file)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "cache"
    options = ("--buckets", "0.25,0.75", "--maps", "0.5", "--seed", 7, "--micro-batch", 3, "--shard-size", 3)
    run("tinyflux", "cache", folder, "--demo", "--count", COUNT, *options)
    return FeatureCache(folder)


def test_rows_are_those_of_the_cache_command_to_the_bit(rows, cache):
    assert set(cache.shapes) <= set(rows) and list(rows["id"]) == [f"x{i}" for i in range(COUNT)]
    assert "image" not in rows and {"sol_maps", "lune", "block_maps", "previews"} <= set(cache.shapes)
    for name in cache.shapes:
        stacked = cache.stacked(name).numpy()
        assert rows[name].dtype == stacked.dtype and rows[name].shape == stacked.shape
        np.testing.assert_array_equal(rows[name], stacked, err_msg=name)
    assert list(rows["caption"]) == [cache.caption(i) for i in range(COUNT)]


def test_written_they_become_the_same_cache(rows, cache, tmp_path):
    parts = (slice(0, 2), slice(2, COUNT))
    for number, part in enumerate(parts):
        write({name: values[part] for name, values in rows.items()}, tmp_path / f"{number}.parquet")
    said = run("tinyflux", "import", tmp_path / "made", tmp_path, "--shard-size", 3).stdout
    assert f"{COUNT} samples in 2 shards" in said
    made = FeatureCache(tmp_path / "made")
    for record in cache.manifest.shards:
        assert (made.folder / record.file).read_bytes() == (cache.folder / record.file).read_bytes()
    assert (made.manifest.encoders, made.manifest.experts) == (
        cache.manifest.encoders,
        cache.manifest.experts,
    )
    assert made.maps_made == cache.maps_made
    run("tinyflux", "import", tmp_path / "x", tmp_path, "--convention", "noised-sample", code=2)


def test_what_else_rows_may_hold(extract, scenes, rows):
    """Pixels, `datasets`' images, other names; a batch's rows don't depend on the batch before."""
    pixels = np.stack([np.asarray(DemoScenes(COUNT)[i].image) for i in range(3)])
    given = {"jpg": pixels, "txt": batch(scenes)["text"][:3], "seed": np.arange(7, 10)}
    np.testing.assert_array_equal(extract(given)["latents"], rows["latents"][:3])
    both = [
        {"image": {"bytes": scene["image"], "path": None}, "caption": scene["text"]} for scene in scenes[:3]
    ]
    np.testing.assert_array_equal(
        extract(batch([one | {"seed": 7 + i} for i, one in enumerate(both)]))["lune"], rows["lune"][:3]
    )


def test_what_cannot_be_read_is_named(extract, scenes):
    with pytest.raises(ValueError, match="the row with seed 8: image cannot be read as an image"):
        extract(batch([scenes[0], scenes[1] | {"image": b"no picture"}]))
    with pytest.raises(ValueError, match="no column seed, only image, text, id: what comes of a row follows"):
        extract({name: values for name, values in batch(scenes).items() if name != "seed"})
    with pytest.raises(ValueError, match="dtype"):
        ExtractFeatures(dtype="bfloat16")


def test_rows_that_are_no_cache_are_said(rows, tmp_path):
    with pytest.raises(CacheError, match="no rows"):
        import_rows(tmp_path, tmp_path / "made")
    other = {name: values.copy() for name, values in rows.items()}
    made = json.loads(other["made"][-1])
    other["made"][-1] = json.dumps(made | {"settings": made["settings"] | {"height": 128}})
    write(other, tmp_path / "a.parquet")
    with pytest.raises(CacheError, match="made in different ways: they differ in settings"):
        import_rows(tmp_path / "a.parquet", tmp_path / "made")
    write({"id": rows["id"]}, tmp_path / "a.parquet")
    with pytest.raises(CacheError, match="no column made: ExtractFeatures makes such rows"):
        import_rows(tmp_path / "a.parquet", tmp_path / "made")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(CacheError, match="can't be read as parquet"):
        import_rows(tmp_path / "a.parquet", tmp_path / "made")
