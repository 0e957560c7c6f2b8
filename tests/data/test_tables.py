"""Data sets of the Hugging Face hub and parquet files: columns, captions, streams."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from data_helpers import BLUE, GREEN, RED, captions, png, shown

from moe_sampler import open_source
from moe_sampler.data.drawn import DrawnCaptions
from moe_sampler.data.options import Reading
from moe_sampler.data.tables import TableRows

datasets = pytest.importorskip("datasets")

COLOURS = [RED, GREEN, BLUE]


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def rows_of(count: int = 3) -> dict[str, list]:
    return {
        "image": [{"bytes": png(COLOURS[i % 3]), "path": None} for i in range(count)],
        "text": [f"caption {i}" for i in range(count)],
        "long": [f"a longer caption {i}" if i else None for i in range(count)],
        "five": [[f"{i} {k}" for k in range(5)] for i in range(count)],
    }


def table(count: int = 3, **more) -> datasets.Dataset:
    features = datasets.Features(
        image=datasets.Image(),
        text=datasets.Value("string"),
        long=datasets.Value("string"),
        five=datasets.List(datasets.Value("string")),
    )
    return datasets.Dataset.from_dict(rows_of(count) | more, features=features)


@pytest.fixture
def parquet(tmp_path) -> Path:
    path = tmp_path / "set" / "train-0.parquet"
    path.parent.mkdir()
    table().to_parquet(path)
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_parquet(parquet, streaming, whole):
    source = open_source(parquet.parent if whole else parquet, streaming=streaming)
    assert [row[1:] for row in shown(source)] == [(f"caption {i}", COLOURS[i]) for i in range(3)]
    told = source.describe()
    assert (told["kind"], told["image"], told["captions"]) == ("parquet", "image", ["text"])
    table(3, text=["other"] * 3).to_parquet(parquet)
    again = open_source(parquet, streaming=streaming)
    assert again.describe()["fingerprint"] != told["fingerprint"] and again[0].caption == "other"


def test_a_stream_is_the_same_in_any_order(parquet):
    table(40).to_parquet(parquet)
    plain, stream = open_source(parquet), open_source(parquet, streaming=True)
    order = list(range(40))
    random.Random(0).shuffle(order)
    wanted = [plain[i].caption for i in order]
    assert [stream[i].caption for i in order] == wanted
    with ThreadPoolExecutor(8) as pool:
        assert [sample.caption for sample in pool.map(stream.__getitem__, order)] == wanted
    with pytest.raises(IndexError):
        stream[40]


def test_a_stream_that_does_not_know_its_length():
    stream = table(5).to_iterable_dataset()
    stream.info.splits = None
    with pytest.raises(ValueError, match="doesn't say how many rows it has: give count"):
        TableRows(stream, "a/b", {})
    source = TableRows(stream, "a/b", {}, Reading(count=2))
    assert len(source) == 2 and source.describe()["count"] == 2
    short = TableRows(stream, "a/b", {}, Reading(count=9))
    with pytest.raises(ValueError, match="a/b ends before row 5: give a smaller count"):
        [short[i] for i in range(9)]


def test_captions_of_several_fields_are_drawn(parquet):
    source = open_source(parquet, caption_fields=("text", "long"), captions_per_image=2, seed=3)
    assert len(source) == 6
    pairs = [{source[2 * i].caption, source[2 * i + 1].caption} for i in range(3)]
    assert pairs == [{"caption 0"}] + [{f"caption {i}", f"a longer caption {i}"} for i in (1, 2)]
    told = source.describe()
    assert told["captions"] == ["text", "long"] and told["captions_per_image"] == 2
    texts = lambda seed: [row[1] for row in shown(DrawnCaptions(rows, 5, seed))]  # noqa: E731
    rows = TableRows(table(20), "a/b", {}, Reading(caption_fields=("five",)))
    assert rows.several and texts(1) == texts(1) != texts(2)
    for i in range(20):
        assert sorted(texts(1)[5 * i : 5 * i + 5]) == [f"{i} {k}" for k in range(5)]
    # A list of captions is drawn from, also for one sample an image.
    one = open_source(parquet, caption_fields=("five",))
    assert {one[i].caption.split()[0] for i in range(3)} == {"0", "1", "2"}


def test_the_first_so_many(parquet):
    source = open_source(parquet, count=2)
    assert list(captions(source).values()) == ["caption 0", "caption 1"]
    assert len(open_source(parquet, count=9)) == 3


@pytest.mark.parametrize(
    "reading, message",
    [
        ({"caption_fields": ("nothing",)}, "no column nothing, only image, text, long, five"),
        ({"image_field": "nothing"}, "no column nothing"),
        ({"caption_fields": ("image",)}, "image holds no text"),
        ({"image_field": "text"}, "row 0: text is an address"),
    ],
)
def test_columns_that_cannot_be(reading, message):
    data = table(3, text=["https://x.org/a.png"] * 3)
    with pytest.raises(ValueError, match=message):
        TableRows(data, "a/b", {}, Reading(**reading))[0]


def test_columns_that_cannot_be_told():
    two = table().add_column("other", rows_of()["image"]).cast_column("other", datasets.Image())
    with pytest.raises(ValueError, match=r"2 columns of images among .*: name one by image_field"):
        TableRows(two, "a/b", {})
    assert TableRows(two, "a/b", {}, Reading(image_field="other"))[0].caption == "caption 0"
    with pytest.raises(ValueError, match="name those of captions by caption_fields"):
        TableRows(table().remove_columns("text").rename_columns({"five": "a", "long": "b"}), "a/b", {})


def test_pictures_as_bytes_are_read_and_damaged_ones_named():
    raw = datasets.Dataset.from_dict({"jpg": [png(GREEN), b"no picture"], "txt": ["green", ""]})
    source = TableRows(raw, "a/b", {})
    assert source[0].image.getpixel((0, 0)) == GREEN
    with pytest.raises(ValueError, match="a/b, row 1: jpg cannot be read as an image"):
        source[1]


@pytest.fixture
def hub(monkeypatch) -> Callable[[], list]:
    """A hub with one data set, and what was asked of it."""
    asked = []

    def load(name, subset, *, split, revision, streaming):
        asked.append((name, subset, split, revision, streaming))
        if name != "owner/name":
            raise FileNotFoundError(f"{name} doesn't exist on the Hub")
        return table().to_iterable_dataset() if streaming else table()

    monkeypatch.setattr(datasets, "load_dataset", load)
    info = lambda self, name, revision=None: SimpleNamespace(sha=f"{revision or 'main'}'s commit")  # noqa: E731
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    return lambda: asked


def test_a_data_set_of_the_hub_is_one_commit(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = open_source("owner/name")
    assert [row[1:] for row in shown(source)] == [(f"caption {i}", COLOURS[i]) for i in range(3)]
    assert source.describe() == {
        "kind": "hub",
        "name": "owner/name",
        "revision": "main's commit",
        "subset": None,
        "split": "train",
        "image": "image",
        "captions": ["text"],
    }
    commit = "0123456789abcdef0123456789abcdef01234567"
    open_source("owner/name", subset="small", split="test", revision=commit, streaming=True, count=1)
    assert hub() == [
        ("owner/name", None, "train", "main's commit", False),
        ("owner/name", "small", "test", commit, True),
    ]
    with pytest.raises(
        ValueError, match="no folder no/such, and no data set can be read: no/such doesn't exist"
    ):
        open_source("no/such")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no images"):  # a folder of that name comes first
        open_source("owner/name")


def test_what_only_tables_have_is_refused_elsewhere(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="split, streaming: only for data sets"):
        open_source(tmp_path, split="test", streaming=True)
    with pytest.raises(ValueError, match="captions_per_image must be at least 1"):
        open_source(tmp_path, captions_per_image=0)
