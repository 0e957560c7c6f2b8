"""Images and captions from folders, tars and the demo: what is read, and what is refused."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moe_sampler.data.folders import ImageFolder
from moe_sampler.data.pictures import fit_image
from moe_sampler.data.scenes import DemoScenes
from moe_sampler.data.sources import open_source
from moe_sampler.data.tars import TarFiles

RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)


def png(colour=RED, size=(8, 6), mode="RGB", **save) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, format="PNG", **save)
    return buffer.getvalue()


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def write_tar(path: Path, files: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def shown(source) -> list[tuple[str, str, tuple[int, int, int]]]:
    return [
        (key, caption, image.getpixel((0, 0)))
        for key, image, caption in (source[i] for i in range(len(source)))
    ]


def test_a_folder_with_captions_beside_the_images(tmp_path):
    write(tmp_path, {"b.png": png(GREEN), "b.txt": " grün \n", "deep/a.PNG": png(BLUE), "deep/a.txt": ""})
    source = open_source(tmp_path)
    assert isinstance(source, ImageFolder)
    assert shown(source) == [("b.png", "grün", GREEN), ("deep/a.PNG", "", BLUE)]


def test_a_folder_with_metadata_as_datasets_reads_it(tmp_path):
    rows = [
        {"file_name": "z.png", "text": "red\u2028", "other": 1},
        {"file_name": "a/b.png", "text": "green"},
    ]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    write(tmp_path, {"z.png": png(RED), "a/b.png": png(GREEN), "metadata.jsonl": lines})
    assert shown(open_source(tmp_path)) == [("z.png", "red", RED), ("a/b.png", "green", GREEN)]


def test_tars(tmp_path):
    write_tar(tmp_path / "1.tar", {"x/0.png": png(RED), "x/0.txt": "red", "y.jpg.txt": "no", "y.txt": "no"})
    with pytest.raises(ValueError, match=r"1\.tar: y has 0 images"):
        open_source(tmp_path)
    write_tar(tmp_path / "1.tar", {"x/0.png": png(RED), "x/0.txt": "red", "x/0.json": "{}"})
    write_tar(
        tmp_path / "0.tar",
        {"0.txt": "blue", "0.png": png(BLUE), "1.png": png(), "1.seg.png": png(), "1.txt": ""},
    )
    for source in (open_source(tmp_path), TarFiles([tmp_path / "0.tar", tmp_path / "1.tar"])):
        assert [row[:2] for row in shown(source)] == [("0", "blue"), ("1", ""), ("x/0", "red")]
        assert shown(source)[0][2] == BLUE
    assert len(open_source(tmp_path / "1.tar")) == 1


def test_the_demo_is_the_same_every_time_and_starts_where_it_is_told():
    first, later = DemoScenes(3), DemoScenes(2, first=1)
    assert len(first) == 3
    for i in range(2):
        a, b = first[i + 1], later[i]
        assert (a.key, a.caption) == (b.key, b.caption) and np.array_equal(a.image, b.image)
    assert first[0].image.size == (64, 64)
    assert first.describe() != later.describe()
    with pytest.raises(IndexError):
        first[3]


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (7, 5), (64, 64)], ids=str)
def test_images_keep_their_proportions(size):
    """A circle in the middle stays one."""
    width, height = size
    y, x = np.mgrid[: 16 * height, : 16 * width] / 16 + 1 / 32
    radius = 0.3 * min(size)
    disc = np.hypot(x - width / 2, y - height / 2) < radius
    image = Image.fromarray((255 * disc[..., None].repeat(3, -1)).astype(np.uint8)).resize(
        size, Image.Resampling.BOX
    )
    fitted = np.asarray(fit_image(image, 48, 32))[..., 0] / 255
    assert fitted.shape == (48, 32)
    scale = max(48 / height, 32 / width)
    assert fitted.sum() == pytest.approx(np.pi * (radius * scale) ** 2, rel=0.08)
    wide, tall = (
        np.sqrt((np.arange(n) - (n - 1) / 2) ** 2 @ fitted.sum(axis)) for n, axis in ((32, 0), (48, 1))
    )
    if radius * scale < 16:
        assert wide == pytest.approx(tall, rel=0.08)


def test_orientation_and_transparency(tmp_path):
    rows = np.zeros((4, 6, 3), np.uint8)
    rows[:, :3] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    Image.fromarray(rows).save(tmp_path / "a.png", exif=exif)
    write(tmp_path, {"a.txt": "", "b.png": png((0, 0, 0, 0), mode="RGBA"), "b.txt": ""})
    source = ImageFolder(tmp_path)
    assert source[0].image.size == (4, 6) and source[0].image.getpixel((0, 0)) == (255, 255, 255)
    assert source[1].image.getpixel((0, 0)) == (255, 255, 255)


def test_the_description_changes_with_the_data(tmp_path):
    write(tmp_path, {"a.png": png(), "a.txt": "one"})
    before = ImageFolder(tmp_path).describe()
    assert ImageFolder(tmp_path).describe() == before
    (tmp_path / "a.txt").write_text("two")
    changed = ImageFolder(tmp_path).describe()
    write(tmp_path, {"b.png": png(), "b.txt": "three"})
    assert len({json.dumps(d) for d in (before, changed, ImageFolder(tmp_path).describe())}) == 3


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "has no images"),
        ({"a.png": png()}, r"a\.png .* no caption"),
        ({"a.png": png(), "a.jpg": png(), "a.txt": ""}, "share a caption"),
        ({"a.png": png(), "a.txt": b"\xff\xfe"}, "not UTF-8"),
        ({"a.png": png(), "metadata.jsonl": '{"file_name": "b.png", "text": ""}'}, r"names b\.png, which"),
        ({"a.png": png(), "b.png": png(), "metadata.jsonl": '{"file_name": "a.png", "text": ""}'}, "name b"),
        ({"a.png": png(), "metadata.jsonl": '{"file_name": "a.png"}'}, r"metadata\.jsonl:1 must be like"),
        (
            {"a.png": png(), "metadata.jsonl": '\n{"file_name": "a.png", "text": null}'},
            r"jsonl:2 must be like",
        ),
        ({"a.png": png(), "metadata.jsonl": "nonsense"}, r"metadata\.jsonl:1 must be like"),
        (
            {"a.png": png(), "metadata.jsonl": '{"file_name": "a.png", "text": ""}\n' * 2},
            r"names a\.png more than once",
        ),
    ],
)
def test_folders_that_are_refused(tmp_path, files, message):
    write(tmp_path, files)
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path)


def test_broken_images_and_tars_are_named(tmp_path):
    write(tmp_path / "f", {"a.png": png(size=(64, 64))[:60], "a.txt": ""})
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image"):
        ImageFolder(tmp_path / "f")[0]
    tar = write_tar(tmp_path / "a.tar", {"0.png": png(size=(500, 500)) + bytes(20000), "0.txt": ""})
    tar.write_bytes(tar.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"a\.tar cannot be read"):
        open_source(tar)
    with pytest.raises(ValueError, match="is not a folder"):
        open_source(tmp_path / "absent")
    write_tar(tmp_path / "f" / "x.tar", {"0.png": png(), "0.txt": ""})
    with pytest.raises(ValueError, match=r"both images and \.tar"):
        open_source(tmp_path / "f")
