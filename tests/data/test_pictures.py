"""Every kind of picture is the RGB it shows, or one error that names it."""

from __future__ import annotations

import io
import os
import struct
import time
import tracemalloc
import zlib

import numpy as np
import PIL
import pytest
from data_helpers import BLUE, GREEN, RED, chunk, png, png16, saved
from PIL import Image, ImageOps

from moe_sampler.data.pictures import MAX_PIXELS, fit_image, read_picture, to_rgb

PILLOW = tuple(int(number) for number in PIL.__version__.split(".")[:2])

GREY = np.linspace(0, 65535, 6 * 8).round().astype(np.uint16).reshape(6, 8)


def grey(data: bytes) -> np.ndarray:
    """[H, W] of a picture without colour."""
    rgb = np.asarray(read_picture(data)).astype(int)
    assert rgb.shape[2] == 3 and (rgb == rgb[..., :1]).all()
    return rgb[..., 0]


@pytest.mark.parametrize(
    "data",
    [
        png16(GREY, 0),
        saved(Image.fromarray(GREY)),
        saved(Image.fromarray(GREY), "TIFF"),
        b"P5 8 6 65535\n" + GREY.astype(">u2").tobytes(),
        png16(GREY[..., None].repeat(3, -1), 2),
        png16(np.stack([GREY, np.full_like(GREY, 65535)], -1), 4),
    ],
    ids=["png", "pillow's png", "tiff", "pgm", "rgb", "with alpha"],
)
def test_sixteen_bits_are_scaled_to_eight(data):
    assert abs(grey(data) - GREY / 257).max() <= 1
    assert len(np.unique(grey(data))) == 48


def test_sixteen_bits_of_one_value_may_be_transparent():
    values = np.full((2, 2), 1000)
    values[0, 0] = 30000
    assert grey(png16(values, 0, struct.pack(">H", 30000))).tolist() == [[255, 4], [4, 4]]


def test_floats_run_from_black_to_white():
    ramp = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    assert grey(saved(Image.fromarray(ramp), "TIFF")).tolist() == (ramp * 255).round().tolist()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((2, 2), 255, np.float32), "floats from 255 to 255; they must lie between 0"),
        (np.full((2, 2), -0.5, np.float32), "floats from -0.5"),
        (np.full((2, 2), np.nan, np.float32), "NaN"),
        (np.full((2, 2), np.inf, np.float32), "infinite"),
        (np.full((2, 2), 70000, np.int32), "32-bit integers"),
    ],
)
def test_values_without_a_meaning_are_refused(tmp_path, array, message):
    path = tmp_path / "depth.tiff"
    Image.fromarray(array).save(path)
    with pytest.raises(ValueError, match=rf"depth\.tiff .*{message}"):
        read_picture(path)
    with pytest.raises(ValueError, match=f"^image .*{message}"):
        to_rgb(Image.fromarray(array))


def palette(transparent: object = None) -> bytes:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([*GREEN, *RED, *BLUE])
    return saved(image, **({} if transparent is None else {"transparency": transparent}))


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (png(RED), RED),
        (png((*RED, 255), mode="RGBA"), RED),
        (png((0, 0, 0, 0), mode="RGBA"), (255, 255, 255)),
        (png((0, 0, 0, 51), mode="RGBA"), (204, 204, 204)),
        (png(77, mode="L"), (77, 77, 77)),
        (png((77, 255), mode="LA"), (77, 77, 77)),
        (png((0, 102), mode="LA"), (153, 153, 153)),
        (png(77, mode="L", transparency=77), (255, 255, 255)),
        (png(RED, transparency=RED), (255, 255, 255)),
        (png(1, mode="1"), (255, 255, 255)),
        (png(0, mode="1"), (0, 0, 0)),
        (palette(), RED),
        (palette(1), (255, 255, 255)),
        (palette(b"\xff\x00\xff"), (255, 255, 255)),
        (palette(0), RED),
        (saved(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        pytest.param(
            saved(Image.new("YCbCr", (4, 4), (77, 128, 128)), "TIFF"),
            (77, 77, 77),
            marks=pytest.mark.skipif(PILLOW < (13,), reason="Pillow before 13 writes a cut-off YCbCr TIFF"),
        ),
        (saved(Image.new("RGB", (4, 4), RED), "BMP"), RED),
        (saved(Image.new("RGB", (4, 4), RED), "WEBP", lossless=True), RED),
        (saved(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "WEBP", lossless=True), (255, 255, 255)),
        (saved(Image.new("RGB", (4, 4), RED), "PPM"), RED),
    ],
)
def test_modes(data, colour):
    image = read_picture(data)
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", colour)


def test_cmyk_jpegs_are_not_inverted():
    found = read_picture(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")).getpixel((8, 8))
    assert np.abs(np.subtract(found, (255, 0, 0))).max() < 8


@pytest.mark.parametrize(
    "mode", ["RGB", "RGBA", "LA", "La", "RGBa", "PA", "P", "L", "1", "CMYK", "I;16", "HSV"]
)
def test_pictures_that_pillow_has_made(mode):
    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
def test_one_pixel_is_enough(size):
    found = read_picture(png(RED, size=size))
    assert found.size == size and found.getpixel((0, 0)) == RED


@pytest.mark.parametrize("given", [True, False, 2.0, 1e9, 0, -1, "many"])
def test_a_limit_is_a_whole_number(given):
    with pytest.raises(ValueError, match="max_pixels must be a positive whole number, got"):
        read_picture(png(), max_pixels=given)


def test_made_smaller_an_image_keeps_its_mean():
    """Every pixel has its share: a fine pattern becomes grey, not whichever pixel is nearest."""
    fine = np.indices((64, 96)).sum(0) % 2 * 255
    fitted = np.asarray(fit_image(Image.fromarray(fine.astype(np.uint8)), 16, 24))
    assert fitted.shape == (16, 24) and np.abs(fitted.astype(int) - 127).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    save = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **save)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.n_frames == 3
    assert read_picture(data).getpixel((0, 0)) == RED


CORNERS = np.zeros((16, 24, 3), np.uint8)
CORNERS[:8, :12], CORNERS[:8, 12:], CORNERS[8:, :12] = 255, 90, 170


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = Image.fromarray(CORNERS)
    image = read_picture(saved(plain, kind, exif=exif, **({"quality": 95} if kind != "TIFF" else {})))
    plain.getexif()[0x0112] = orientation
    turned = np.asarray(ImageOps.exif_transpose(plain)).astype(int)
    assert np.asarray(image).shape == turned.shape
    assert np.abs(np.asarray(image) - turned).mean() < 6
    assert to_rgb(image).size == image.size  # turned once


def broken_exif(orientation: int) -> bytes:
    """An EXIF block whose resolution is a rational with nothing in it (offset beyond the block)."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, orientation) + struct.pack("<HHII", 0x011A, 5, 1, 0xFFFF)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)


@pytest.mark.parametrize(
    "exif",
    [
        broken_exif(1),
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0nonsense",
        b"Exif\0\0",
        b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 1, 0x0112, 5, 1, 26) + bytes(4) + bytes(8),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_broken_exif_block_turns_nothing(kind, exif):
    assert read_picture(saved(Image.fromarray(CORNERS), kind, exif=exif)).size == (24, 16)


def huge(side: int) -> bytes:
    """A valid grey PNG of one value, that packs a thousandfold."""
    packer, rows = zlib.compressobj(9), bytes(side + 1)
    packed = b"".join(packer.compress(rows) for _ in range(side)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [13000, 20000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, side, recwarn):
    path = tmp_path / "bomb.png"
    path.write_bytes(
        huge(13000) if side == 13000 else huge(2)[:16] + struct.pack(">II", side, side) + b"\x08"
    )
    if side != 13000:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    tracemalloc.start()
    begun = time.perf_counter()
    with pytest.raises(
        ValueError, match=rf"bomb\.png has {side} × {side} pixels, and the limit.*{MAX_PIXELS}"
    ):
        read_picture(path)
    assert tracemalloc.get_traced_memory()[1] < 10e6 and time.perf_counter() - begun < 2
    tracemalloc.stop()
    assert not recwarn.list
    with pytest.raises(ValueError, match="the limit"):
        to_rgb(Image.new("1", (13000, 13000)))


def test_the_limit_of_pixels_is_the_users(monkeypatch):
    data = png(size=(20, 20))
    with pytest.raises(ValueError, match="limit is 399"):
        read_picture(data, max_pixels=399)
    assert read_picture(data, max_pixels=400).size == (20, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="limit is 100"):
        read_picture(data)  # more than twice Pillow's own
    assert read_picture(data, max_pixels=400).size == (20, 20)
    monkeypatch.setenv(MAX_PIXELS, "400")
    assert read_picture(data).size == to_rgb(Image.new("L", (20, 20))).size == (20, 20)
    monkeypatch.setenv(MAX_PIXELS, "399")
    with pytest.raises(ValueError, match="limit is 399"):
        read_picture(data)
    for nonsense in ("many", "0", "-1", "1e9"):
        monkeypatch.setenv(MAX_PIXELS, nonsense)
        with pytest.raises(ValueError, match=f"{MAX_PIXELS} must be a positive whole number"):
            read_picture(data)
    monkeypatch.setenv(MAX_PIXELS, "")  # as if it were not there
    with pytest.raises(ValueError, match="limit is 100"):
        read_picture(data)
    monkeypatch.delenv(MAX_PIXELS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_picture(data).size == (20, 20)
    assert Image.MAX_IMAGE_PIXELS is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_what_is_cut_off_is_named(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), kind)
    for length in (0, 1, 20, len(data) // 2, int(0.9 * len(data))):
        path = tmp_path / "cut.png"
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.png cannot be read as an image"):
            read_picture(path)


FLIPPED = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x04\x00\x00\x00\x03\x10\x00\x00\x00\x00\xc1\x0f-Y"
    b"\x00\x00\x00$IDATx\x9cc``\x10\xeeP\x17\xb0\x9a\xc1\xe0\xa7\x90\xb8\xa2\xd4\xa0c\x07\xc3\x1c\x87\x00\xf5'"
    b"\x0e\x07\\\xbb\x01\x00b\xfd\n\x15\xd0\xeb\x81\xd6\x00\x00\x00\x00IEND\xaeB`\x82"
)


def test_a_damaged_png_is_noticed():
    """By its checksums, where Pillow decodes a grey ramp into something else."""
    with Image.open(io.BytesIO(FLIPPED)) as opened:
        assert (np.diff(np.asarray(opened).astype(int).ravel()) < 0).any()
    with pytest.raises(ValueError, match=r"^image cannot be read"):
        read_picture(FLIPPED)


@pytest.mark.parametrize(
    "data", [b"", b"nonsense", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", bytes(100)]
)
def test_what_is_no_picture(data):
    with pytest.raises(ValueError, match="x cannot be read as an image: no picture of a format that is read"):
        read_picture(data, "x")


def test_a_folder_and_a_pipe_are_no_pictures(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("", "pipe.png"):
        with pytest.raises(ValueError, match="it is not a file"):
            read_picture(tmp_path / name)
    with pytest.raises(ValueError, match=r"absent\.png cannot be read as an image: .*No such file"):
        read_picture(tmp_path / "absent.png")


def test_a_picture_that_pillow_has_opened_and_whose_file_is_closed(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    with Image.open(tmp_path / "a.png") as opened:
        pass
    with pytest.raises(ValueError, match=r"^image 2 cannot be read as an image"):
        to_rgb(opened, "image 2")


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
