"""What the data are is told by their content, which is read again only where it may have changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from data_helpers import BLUE, GREEN, RED, png, write, write_tar

from moe_sampler import TarFiles, open_source
from moe_sampler.data import digests


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Files count as settled at once."""
    monkeypatch.setattr(digests, "_UNSETTLED", -(10**12))


@pytest.fixture
def read(monkeypatch):
    """The names of the files whose content was read."""
    names: list[str] = []
    monkeypatch.setattr(
        "moe_sampler.data.folders.content", lambda path: names.append(path.name) or whole(path)
    )
    whole = digests.content
    return names


def folder(tmp_path: Path, first=RED) -> Path:
    return write(tmp_path / "data", {"a.png": png(first), "a.txt": "a", "b.png": png(GREEN), "b.txt": "b"})


def tar(tmp_path: Path, first=RED) -> Path:
    return write_tar(
        tmp_path / "a.tar", {"a.png": png(first), "a.txt": "a", "b.png": png(GREEN), "b.txt": "b"}
    )


@pytest.mark.parametrize("make", [folder, tar])
def test_repainting_an_image_to_the_same_size_changes_it(tmp_path, make):
    assert len(png(RED)) == len(png(BLUE))
    path = make(tmp_path)
    before = open_source(path).describe()
    assert open_source(path).describe() == before
    painted = path / "a.png" if path.is_dir() else path
    times = painted.stat()
    make(tmp_path, BLUE)
    assert painted.stat().st_size == times.st_size
    os.utime(painted, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` and `rsync -t` leave it
    changed = open_source(path).describe()
    assert changed != before
    make(tmp_path)
    assert open_source(path).describe() == before


@pytest.mark.parametrize("make", [folder, tar])
def test_a_file_that_may_still_change_is_not_remembered(tmp_path, make, monkeypatch):
    monkeypatch.setattr(digests, "_UNSETTLED", 10**12)
    path = make(tmp_path)
    before = open_source(path).describe()
    painted = path / "a.png" if path.is_dir() else path
    status = digests._stamp(painted)
    make(tmp_path, BLUE)
    monkeypatch.setattr(digests, "_stamp", lambda _: status)  # within one tick of the clock
    assert open_source(path).describe() != before


def test_unchanged_images_are_not_read_again(tmp_path, read):
    path = folder(tmp_path)
    before = open_source(path).describe()
    assert sorted(read) == ["a.png", "b.png"]
    read.clear()
    assert open_source(path).describe() == before and read == []
    write(path, {"b.txt": "another"})
    assert open_source(path).describe() != before and read == []
    write(path, {"c.png": png(BLUE), "c.txt": "c"})
    open_source(path).describe()
    assert read == ["c.png"]
    other = write(tmp_path / "other", {"d.png": png(), "d.txt": "d"})
    for _ in range(2):
        open_source(other).describe()
    assert read == ["c.png", "d.png"]  # another data set is remembered beside it


def test_unchanged_tars_are_not_read_again(tmp_path, monkeypatch):
    path = tar(tmp_path)
    before = open_source(path).describe()
    monkeypatch.setattr("moe_sampler.data.tars._digest", lambda *_: pytest.fail("read again"))
    assert open_source(path).describe() == before


@pytest.mark.parametrize(
    "damage", ["", "[]", "null", '{"a.png": 3}', "[" * 10**5, '{"a.png": [[1], "x"]}', b"\xff"]
)
def test_an_index_that_is_none_is_made_anew(tmp_path, damage, read):
    path = folder(tmp_path)
    before = open_source(path).describe()
    (index,) = Path(os.environ["XDG_CACHE_HOME"]).rglob("digests/*.json")
    assert json.loads(index.read_text()).keys() == {"a.png", "b.png"}
    index.write_bytes(damage.encode() if isinstance(damage, str) else damage)
    read.clear()
    assert open_source(path).describe() == before and len(read) == 2
    assert [file.name for file in index.parent.iterdir()] == [index.name]


def test_a_cache_folder_that_cannot_be_written_to_only_costs_time(tmp_path, monkeypatch, read):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = folder(tmp_path)
    assert open_source(path).describe() == open_source(path).describe()
    assert len(read) == 4


def test_digests_lie_in_the_users_cache_folder(tmp_path, monkeypatch):
    """As the XDG Base Directory Specification says: an empty variable is one that is not set."""
    path = folder(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for change in (lambda name: monkeypatch.delenv(name), lambda name: monkeypatch.setenv(name, "")):
        change("XDG_CACHE_HOME")
        open_source(path).describe()
        assert len(list((tmp_path / "home" / ".cache" / "moe-sampler" / "digests").glob("*.json"))) == 1
        assert os.listdir(tmp_path / "home") == [".cache"]


def test_everything_that_counts_is_in_the_fingerprint(tmp_path):
    files = {"a.png": png(RED), "a.txt": "a", "b.png": png(GREEN), "b.txt": "b"}
    seen = set()
    for i, change in enumerate(
        [{}, {"a.txt": "c"}, {"a.png": png(BLUE)}, {"c.png": png(), "c.txt": ""}, {"a.png": png(size=(2, 2))}]
    ):
        source = open_source(write(tmp_path / str(i), files | change))
        seen.add(source.describe()["fingerprint"])
        copy = open_source(write(tmp_path / f"copy {i}", files | change))
        assert copy.describe() == source.describe()  # wherever it lies
    renamed = {name.replace("a", "z"): data for name, data in files.items()}
    seen.add(open_source(write(tmp_path / "renamed", renamed)).describe()["fingerprint"])
    listed = "\n".join(json.dumps({"file_name": f"{n}.png", "text": n}) for n in "ba")
    reordered = {"a.png": files["a.png"], "b.png": files["b.png"], "metadata.jsonl": listed}
    seen.add(open_source(write(tmp_path / "listed", reordered)).describe()["fingerprint"])
    assert len(seen) == 7


def test_everything_that_counts_in_tars_is_in_the_fingerprint(tmp_path):
    files = {"a.png": png(RED), "a.txt": "a", "b.png": png(GREEN), "b.txt": "b"}
    renamed = {name.replace("a", "z", 1): data for name, data in files.items()}
    kinds = [files, files | {"a.txt": "c"}, files | {"a.png": png(BLUE)}, renamed]
    kinds.append(dict(reversed(files.items())))

    def told_of(*tars: Path) -> str:
        return TarFiles(tars).describe()["fingerprint"]

    seen = {told_of(write_tar(tmp_path / f"{i}.tar", kind)) for i, kind in enumerate(kinds)}
    assert len(seen) == len(kinds)
    assert told_of(write_tar(tmp_path / "copy.tar", files)) in seen
    # Of several, the order that they were given in is the order of the samples.
    pair = [tmp_path / "2.tar", tmp_path / "0.tar"]
    told = [told_of(*tars) for tars in (pair, pair[::-1], pair[:1] * 2)]
    assert len({*seen, *told}) == len(kinds) + 3
    # What they are called, and where they lie, is none of it.
    renamed = [path.rename(tmp_path / name) for path, name in zip(pair, ("a.tar", "b.tar"), strict=True)]
    assert told_of(*renamed) == told[0]


def test_a_digest_stays_with_its_file(tmp_path, read):
    """Of several files that are read again, at once and in any order."""
    colours = {f"{i}.png": png((20 * i, 9, 9)) for i in range(8)}
    files = colours | {f"{i}.txt": str(i) for i in range(8)}
    path = write(tmp_path / "data", files)
    open_source(path).describe()
    painted = {name: png((5, 5, int(name[0]))) for name in ("2.png", "5.png", "6.png")}
    files |= painted
    write(path, painted)
    read.clear()
    again = open_source(path).describe()
    assert set(read) == set(painted)
    assert again == open_source(write(tmp_path / "elsewhere", files)).describe()
    write(path, {"2.png": files["5.png"], "5.png": files["2.png"]})
    assert open_source(path).describe() != again
