"""Damaged bytes of every kind: right, or one ValueError that names the file."""

from __future__ import annotations

import contextlib
import gc
import tarfile
import warnings

import numpy as np
import pytest
from data_helpers import captions, png, png16, saved, write, write_tar
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from moe_sampler import open_source
from moe_sampler.data.pictures import read_picture
from moe_sampler.data.tars import TarFiles

SETTINGS = dict(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8))
EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x011A] = 6, 72.5
ANIMATED = {"save_all": True, "append_images": [NOISE.rotate(180)]}
PICTURES = {
    "png": saved(NOISE, exif=EXIF),
    "palette png": saved(NOISE.quantize(16), transparency=3),
    "apng": saved(NOISE, **ANIMATED),
    "deep png": png16(np.arange(12).reshape(3, 4) * 5000, 0),
    "jpeg": saved(NOISE, "JPEG", exif=EXIF),
    "cmyk": saved(NOISE.convert("CMYK"), "JPEG"),
    "webp": saved(NOISE, "WEBP", lossless=True, exif=EXIF),
    "gif": saved(NOISE, "GIF", **ANIMATED),
    "tiff": saved(NOISE, "TIFF", exif=EXIF),
    "packed tiff": saved(NOISE, "TIFF", compression="tiff_lzw"),
    "float tiff": saved(Image.fromarray(np.full((3, 4), 0.5, np.float32)), "TIFF"),
    "bmp": saved(NOISE, "BMP"),
    "ppm": saved(NOISE, "PPM"),
    "avif": saved(NOISE, "AVIF"),
    "jp2": saved(NOISE, "JPEG2000"),
}
CHECKED = {"png", "palette png", "deep png"}
"""Formats whose every byte is under a checksum."""


@st.composite
def damage(draw, data: bytes) -> bytes:
    """The bytes with some flipped, left out, put in, or cut off."""
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["flip", "set", "cut", "leave out", "put in"]))
        if kind == "flip" and data:
            data = data[:place] + bytes([data[place] ^ (1 << draw(st.integers(0, 7)))]) + data[place + 1 :]
        elif kind == "set":
            data = (
                data[:place]
                + draw(st.sampled_from([b"\0" * 4, b"\xff" * 4, b"\x7f\xff"]))
                + data[place + 4 :]
            )
        elif kind == "cut":
            data = data[:place]
        elif kind == "leave out":
            data = data[:place] + data[place + draw(st.integers(1, 64)) :]
        else:
            data = data[:place] + draw(st.binary(min_size=1, max_size=16)) + data[place:]
    return data


@pytest.mark.parametrize("kind", PICTURES)
def test_damaged_pictures(kind):
    whole = np.asarray(read_picture(PICTURES[kind]))

    @settings(**SETTINGS)
    @given(damage(PICTURES[kind]))
    def check(data):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                image = read_picture(data, "a.png", max_pixels=10**6)
            except ValueError as error:
                assert str(error).startswith("a.png ") and "\n" not in str(error)
                return
        assert image.mode == "RGB" and image.width * image.height <= 10**6
        if kind in CHECKED:
            assert np.array_equal(np.asarray(image), whole)

    check()


@settings(**SETTINGS)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_picture(data):
    with pytest.raises(ValueError, match=r"^a\.png cannot be read as an image"):
        read_picture(data, "a.png")


def small_tar(path) -> bytes:
    files = {"0.png": png(), "0.txt": "zero", "1.png": png(), "1.txt": "one", "ü" * 60 + ".png": png()}
    files |= {
        "ü" * 60 + ".txt": "long",
        "2.png": (tarfile.LNKTYPE, "0.png"),
        "2.txt": (tarfile.SYMTYPE, "1.txt"),
    }
    return write_tar(path, files).read_bytes()


def test_damaged_tars(tmp_path):
    data = small_tar(tmp_path / "whole.tar")
    whole = captions(TarFiles(tmp_path / "whole.tar"))
    assert len(whole) == 4
    end = len(data.rstrip(b"\0"))

    @settings(**{**SETTINGS, "max_examples": 400})
    @given(damage(data[: end + 2048]))
    def check(damaged):
        tar = tmp_path / "a.tar"
        tar.write_bytes(damaged)
        try:
            source = TarFiles(tar)
            found = captions(source)
        except ValueError as error:
            assert "a.tar" in str(error) and "\n" not in str(error)
        else:
            # Contents have no checksum in a tar; the number of samples does.
            assert found.keys() == whole.keys()

    check()


@settings(**SETTINGS)
@given(st.binary(max_size=1500))
@example(bytes(1024))
@example(b"\0" * 512 + b"x" * 512)
def test_bytes_that_are_no_tar(tmp_path, data):
    tar = tmp_path / "a.tar"
    tar.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tar"):
        TarFiles(tar)


NAMES = st.text("ab.( )é😀-_0", min_size=1, max_size=12).filter(
    lambda n: n.strip(".") and not n.startswith(".")
)


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff\r"), max_size=20)


@settings(**{**SETTINGS, "max_examples": 40})
@given(st.dictionaries(NAMES, TEXTS, min_size=1, max_size=6))
def test_any_names_and_captions_survive_a_folder_and_a_tar(tmp_path_factory, samples):
    files = {}
    for name, text in samples.items():
        files |= {f"{name}.png": png(), f"{name}.txt": text}
    wanted = {name: text.strip() for name, text in samples.items()}
    folder = open_source(write(tmp_path_factory.mktemp("f"), files))
    assert captions(folder) == {f"{name}.png": text for name, text in wanted.items()}
    assert captions(open_source(write_tar(tmp_path_factory.mktemp("t") / "a.tar", files))) == wanted


@settings(**SETTINGS)
@given(data=st.data(), kind=st.sampled_from(["jsonl", "csv"]))
def test_damaged_lists(tmp_path, data, kind):
    lists = {
        "jsonl": '{"file_name": "a.png", "text": "a castle"}\n{"file_name": "b.png", "text": "\\u00fc"}\n',
        "csv": 'file_name,text\na.png,"a castle, at night"\nb.png,ü\n',
    }
    write(tmp_path, {"a.png": png(), "b.png": png()})
    for other in lists:
        (tmp_path / f"metadata.{other}").unlink(missing_ok=True)
    path = tmp_path / f"metadata.{kind}"
    path.write_bytes(data.draw(damage(lists[kind].encode())))
    try:
        found = captions(open_source(tmp_path))
    except ValueError as error:
        assert f"metadata.{kind}" in str(error) and "\n" not in str(error)
    else:
        assert found.keys() == {"a.png", "b.png"}
        assert all(text.encode("utf-8") is not None for text in found.values())


def test_the_reader_leaves_files_closed(tmp_path, recwarn):
    write(tmp_path, {"a.png": png(), "b.png": png()[:30]})
    for name in ("a.png", "b.png"):
        with contextlib.suppress(ValueError):
            read_picture(tmp_path / name)
    gc.collect()
    assert not [w for w in recwarn if issubclass(w.category, ResourceWarning)]
