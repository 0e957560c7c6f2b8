"""Images and captions from a folder: every file is read, or named."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from data_helpers import BLUE, GREEN, RED, captions, png, saved, shown, write, write_tar
from PIL import Image

from moe_sampler import open_source
from moe_sampler.data.folders import ImageFolder
from moe_sampler.data.scenes import DemoScenes


def test_a_folder_with_captions_beside_the_images(tmp_path, said):
    write(tmp_path, {"b.png": png(GREEN), "b.txt": " grün \n", "deep/a.PNG": png(BLUE), "deep/a.txt": "a"})
    source = open_source(tmp_path)
    assert isinstance(source, ImageFolder)
    assert shown(source) == [("b.png", "grün", GREEN), ("deep/a.PNG", "a", BLUE)]
    assert said() == []


def test_names_may_have_dots(tmp_path):
    names = ["shot 2.0 (final)", "2021.05.01", "2021.05.02", "a", "b..c", "v1.5.txt"]
    write(tmp_path, {f"{name}.jpg": png() for name in names} | {f"{name}.txt": name for name in names})
    assert captions(open_source(tmp_path)) == {f"{name}.jpg": name for name in names}


def test_suffixes_in_capitals(tmp_path):
    write(
        tmp_path, {"A.JPG": png(), "A.TXT": "a", "b.Jpeg": png(), "b.Txt": "b", "c.WebP": png(), "c.txt": "c"}
    )
    assert captions(ImageFolder(tmp_path)) == {"A.JPG": "a", "b.Jpeg": "b", "c.WebP": "c"}


def test_every_suffix_that_is_read(tmp_path):
    image = Image.new("RGB", (16, 16), RED)
    kinds = {"apng": "PNG", "avif": "AVIF", "jp2": "JPEG2000", "jfif": "JPEG", "jpe": "JPEG", "tif": "TIFF"}
    kinds |= {
        "pgm": "PPM",
        "pnm": "PPM",
        "pbm": "PPM",
        "gif": "GIF",
        "bmp": "BMP",
        "ppm": "PPM",
        "tiff": "TIFF",
    }
    write(tmp_path, {f"{suffix}.{suffix}": saved(image, kind) for suffix, kind in kinds.items()})
    write(tmp_path, {f"{suffix}.txt": suffix for suffix in kinds})
    found = shown(ImageFolder(tmp_path))
    assert len(found) == len(kinds)
    assert all(np.abs(np.subtract(colour, RED)).max() < 12 for _, _, colour in found)


def test_linked_folders_and_files_are_read(tmp_path):
    write(tmp_path / "elsewhere", {"deep/b.png": png(BLUE), "deep/b.txt": "b", "c.png": png(GREEN)})
    folder = write(tmp_path / "data", {"a.png": png(), "a.txt": "a", "c.txt": "c"})
    (folder / "linked").symlink_to(tmp_path / "elsewhere" / "deep")
    (folder / "c.png").symlink_to(tmp_path / "elsewhere" / "c.png")
    assert captions(open_source(folder)) == {"a.png": "a", "c.png": "c", "linked/b.png": "b"}


def test_links_that_go_round_end(tmp_path):
    folder = write(tmp_path / "data", {"a.png": png(), "a.txt": "a", "sub/b.png": png(), "sub/b.txt": "b"})
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "sub" / "same").symlink_to(folder / "sub")
    (folder / "out").symlink_to(tmp_path)
    write(tmp_path, {"stray.png": png(), "stray.txt": "above"})
    assert captions(ImageFolder(folder)) == {"a.png": "a", "sub/b.png": "b"}
    (tmp_path / "x" / "y").mkdir(parents=True)
    write(tmp_path / "x", {"a.png": png(), "a.txt": "a"})
    (tmp_path / "x" / "y" / "z").symlink_to(folder / "sub")
    assert list(captions(ImageFolder(tmp_path / "x"))) == ["a.png", "y/z/b.png", "y/z/up/a.png"]


HIDDEN = [
    ".ipynb_checkpoints/a-checkpoint.jpg",
    ".thumbnails/a.jpg",
    "__MACOSX/._a.jpg",
    "__MACOSX/a.jpg",
    "sub/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg",
    ".DS_Store",
    "sub/Thumbs.db",
    "desktop.ini",
    "ehthumbs.db",
    "#recycle/a.jpg",
    "sub/$RECYCLE.BIN/a.jpg",
    "._a.png",
    ".git/config",
]


def test_what_is_hidden_or_left_behind_is_no_data(tmp_path, said):
    write(tmp_path, {"a.png": png(), "a.txt": "a"} | {name: b"no picture" for name in HIDDEN})
    assert captions(open_source(tmp_path)) == {"a.png": "a"}
    assert said() == []
    write(tmp_path / ".cache" / "set", {"a.png": png(), "a.txt": "a"})
    assert len(open_source(tmp_path / ".cache" / "set")) == 1  # named by the user


def test_other_files_are_counted_in_one_line(tmp_path, said):
    others = ["a.json", "b.json", "a.npz", "LICENSE", "README.md", "clip.mp4", "old.tar.gz"]
    write(tmp_path, {"a.png": png(), "a.txt": "a"} | {name: "" for name in others})
    assert captions(open_source(tmp_path)) == {"a.png": "a"}
    (line,) = said()
    assert line == f"{tmp_path}: left out 2 .json, 1 .md, 1 .mp4, 1 .npz, 1 .tar.gz, 1 LICENSE"


def test_empty_captions_are_counted(tmp_path, said):
    write(tmp_path, {f"{i}.png": png() for i in range(6)} | {f"{i}.txt": " \n" for i in range(5)})
    write(tmp_path, {"5.txt": "five"})
    assert set(captions(open_source(tmp_path)).values()) == {"", "five"}
    assert said() == [f"{tmp_path}: 5 of 6 captions are empty: 0.png, 1.png, 2.png and 2 more"]


@pytest.mark.parametrize(("count", "more"), [(1, ""), (3, ""), (4, " and 1 more"), (5, " and 2 more")])
def test_three_names_are_said_and_how_many_more(tmp_path, said, count, more):
    names = [f"{i}.png" for i in range(count)]
    write(tmp_path, {name: png() for name in names} | {f"{i}.txt": "" for i in range(count)})
    open_source(tmp_path)
    assert said() == [f"{tmp_path}: {count} of {count} captions are empty: {', '.join(names[:3])}{more}"]


# fmt: off
UNREAD = (
    "heic", "heif", "jxl", "psd", "svg", "tga", "ico", "eps", "exr", "hdr", "xcf", "raw", "dng", "cr2", "cr3",
    "nef", "arw", "orf", "rw2", "raf", "j2k", "jpx", "qoi", "pcx", "dds",
)
# fmt: on


def test_no_picture_of_another_format_is_left_out_silently(tmp_path):
    write(tmp_path, {"a.png": png(), "a.txt": ""})
    for suffix in (*UNREAD, *(suffix.upper() for suffix in UNREAD)):
        write(tmp_path, {f"b.{suffix}": b""})
        with pytest.raises(ValueError, match=rf"aren't read \(b\.{suffix}\)"):
            open_source(tmp_path)
        (tmp_path / f"b.{suffix}").unlink()


def test_only_the_first_process_warns(tmp_path, said, monkeypatch):
    write(tmp_path, {"a.png": png(), "a.txt": ""})
    monkeypatch.setenv("RANK", "1")
    open_source(tmp_path)
    assert said() == []


TEXT = '{"file_name": "a.png", "text": ""}'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no images"),
        ({"a.zip": "", "b.txt": ""}, r"has no images .*only 1 \.txt, 1 \.zip"),
        ({"a.png": png()}, r"a\.png .* no caption"),
        ({"a.png": png(), "a.txt": "", "b.txt": "b"}, r"b\.txt in .* no image"),
        ({"a.png": png(), "a.txt": "", "b.heic": b"", "b.txt": ""}, r"aren't read \(b\.heic\)"),
        ({"a.png": png(), "a.txt": "", "deep/b.CR2": b""}, r"aren't read \(deep/b\.CR2\)"),
        ({"a.png": png(), "a.jpg": png(), "a.txt": ""}, r"share a caption file \(a\.jpg, a\.png\)"),
        ({"a.png": png(), "a.txt": "", "a.TXT": ""}, r"a\.TXT, a\.txt: keep one caption"),
        ({"a.png": png(), "a.txt": b"\xff\xfea\0"}, r"a\.txt is not UTF-8 text .*UTF-16"),
        ({"a.png": png(), "a.txt": b"caf\xe9"}, r"a\.txt is not UTF-8 text .*save it as UTF-8"),
        ({"a.png": png(), "metadata.jsonl": TEXT.replace("a.png", "b.png")}, r"names b\.png, which"),
        ({"a.png": png(), "metadata.jsonl": TEXT.replace("a.png", "../a.png")}, r"names \.\./a\.png, which"),
        ({"a.png": png(), "b.png": png(), "metadata.jsonl": TEXT}, r"doesn't name b\.png"),
        ({"a.png": png(), "metadata.jsonl": '{"file_name": "a.png"}'}, r"metadata\.jsonl:1 must be like"),
        (
            {"a.png": png(), "metadata.jsonl": '\n{"file_name": "a.png", "text": null}'},
            r"jsonl:2 must be like",
        ),
        ({"a.png": png(), "metadata.jsonl": "nonsense"}, r"metadata\.jsonl:1 must be like"),
        ({"a.png": png(), "metadata.jsonl": "[" * 100_000}, r"metadata\.jsonl:1 must be like"),
        ({"a.png": png(), "metadata.jsonl": "[1]"}, r"metadata\.jsonl:1 must be like"),
        ({"a.png": png(), "metadata.jsonl": TEXT + "\n" + TEXT}, r"names a\.png more than once"),
        ({"a.png": png(), "metadata.jsonl": TEXT, "metadata.csv": ""}, r"metadata\.jsonl: keep one"),
        ({"a.png": png(), "metadata.jsonl": b"\xff"}, r"metadata\.jsonl is not UTF-8"),
        (
            {"a.png": png(), "metadata.jsonl": '{"file_name": "a.png", "text": "a castle \\ud83d"}'},
            r"metadata\.jsonl:1 holds half a surrogate pair.*a castle \\ud83d",
        ),
        ({"a.png": png(), "metadata.csv": ""}, r"metadata\.csv:1 must name the columns file_name and text"),
        (
            {"a.png": png(), "metadata.csv": "file_name;text\na.png;a"},
            r"must name the columns.*file_name;text",
        ),
        ({"a.png": png(), "metadata.csv": "file_name,text\na.png,a, b"}, r"csv:2 has more or fewer fields"),
        ({"a.png": png(), "metadata.csv": "file_name,text\na.png"}, r"csv:2 has more or fewer fields"),
        ({"a.png": png(), "metadata.csv": 'file_name,text\na.png,"a'}, r"metadata\.csv:1 is no CSV"),
    ],
)
def test_folders_that_are_refused(tmp_path, files, message):
    write(tmp_path, files)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path)


def test_links_to_nothing_and_pipes_are_refused(tmp_path):
    write(tmp_path, {"a.png": png(), "a.txt": "", "b.txt": ""})
    (tmp_path / "b.png").symlink_to("absent.png")
    with pytest.raises(ValueError, match=r"b\.png can't be read: no file, or a link to nothing"):
        ImageFolder(tmp_path)
    (tmp_path / "b.png").unlink()
    os.mkfifo(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png can't be read"):
        ImageFolder(tmp_path)


def test_a_folder_that_cannot_be_entered_is_an_error(tmp_path, monkeypatch):
    write(tmp_path, {"a.png": png(), "a.txt": "", "sub/b.png": png(), "sub/b.txt": ""})
    whole = os.scandir

    def denied(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(OSError, match="sub"):
        ImageFolder(tmp_path)


def test_a_list_of_captions_as_datasets_reads_it(tmp_path):
    rows = [
        {"file_name": "z.png", "text": "red\u2028", "other": 1},
        {"file_name": "./a\\b.png", "text": "green \U0001f3f0"},
    ]
    lines = "\ufeff" + "\r\n".join(json.dumps(row) for row in rows) + "\r\n\r\n"
    write(tmp_path, {"z.png": png(RED), "a/b.png": png(GREEN), "metadata.jsonl": lines})
    wanted = [("z.png", "red", RED), ("a/b.png", "green \U0001f3f0", GREEN)]
    assert shown(open_source(tmp_path)) == wanted
    (tmp_path / "metadata.jsonl").unlink()
    table = '\ufefffile_name,other,text\r\nz.png,1,red\r\n"a/b.png",,"green \U0001f3f0"\r\n'
    write(tmp_path, {"metadata.csv": table})
    assert shown(open_source(tmp_path)) == wanted


def test_texts_in_a_table_may_hold_commas_and_lines(tmp_path):
    write(tmp_path, {"a.png": png(), "metadata.csv": 'file_name,text\na.png,"a ""red"" castle, at\nnight"\n'})
    assert captions(open_source(tmp_path)) == {"a.png": 'a "red" castle, at\nnight'}


def test_a_list_counts_for_its_own_folder(tmp_path, said):
    """As in `datasets`' splits: each names files beside it; others have captions of their own."""
    for split in ("train", "test"):
        write(tmp_path / split, {"a.png": png(), "metadata.jsonl": TEXT.replace('""', f'"{split}"')})
    write(tmp_path, {"more/b.png": png(), "more/b.txt": "more"})
    assert captions(open_source(tmp_path)) == {
        "test/a.png": "test",
        "train/a.png": "train",
        "more/b.png": "more",
    }
    write(tmp_path, {"train/c.png": png(), "train/c.txt": "c"})
    with pytest.raises(ValueError, match=r"train/metadata\.jsonl doesn't name train/c\.png"):
        open_source(tmp_path)
    assert said() == []


def test_a_list_wins_over_texts_beside_and_says_so(tmp_path, said):
    write(tmp_path, {"a.png": png(), "a.txt": "old", "metadata.jsonl": TEXT.replace('""', '"new"')})
    assert captions(open_source(tmp_path)) == {"a.png": "new"}
    assert "left out 1 .txt beside images" in said()[0]


def test_captions_lose_what_editors_add(tmp_path):
    texts = {
        "bom": "\ufeffa castle",
        "crlf": "a castle,\r\nat night\r\n",
        "cr": "a\rb",
        "space": "\u3000 a \t\n",
    }
    write(tmp_path, {f"{name}.png": png() for name in texts} | {f"{n}.txt": t for n, t in texts.items()})
    assert captions(open_source(tmp_path)) == {
        "bom.png": "a castle",
        "crlf.png": "a castle,\nat night",
        "cr.png": "a\nb",
        "space.png": "a",
    }


def test_file_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write(tmp_path, {f"{name}.png": png(), f"{name}.txt": "a"})
    source = ImageFolder(tmp_path)
    assert source[0].caption == "a" and source.describe() == ImageFolder(tmp_path).describe()
    (tmp_path / f"{name}.txt").unlink()
    with pytest.raises(ValueError, match="no caption") as caught:
        ImageFolder(tmp_path)
    str(caught.value).encode("utf-8")


def test_images_beside_tars_are_not_mixed_with_them(tmp_path):
    write(tmp_path, {"f/a.png": png(), "f/a.txt": ""})
    for place in ("f/x.tar", "f/deep/x.tar"):
        tar = write_tar(tmp_path / place, {"0.png": png(), "0.txt": ""})
        for folder in ("f", ""):
            with pytest.raises(ValueError, match=r"both images and \.tar files .*x\.tar"):
                open_source(tmp_path / folder)
        tar.unlink()
    with pytest.raises(ValueError, match="is not a folder"):
        open_source(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"is not a folder, nor a \.tar"):
        open_source(tmp_path / "f" / "a.png")


def test_images_that_cannot_be_read_are_named(tmp_path):
    write(tmp_path, {"a.png": png()[:60], "a.txt": "", "b.png": png(size=(20, 20)), "b.txt": ""})
    source = open_source(tmp_path, max_pixels=399)
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image"):
        source[0]
    with pytest.raises(ValueError, match=r"b\.png has 20 × 20 pixels"):
        source[1]


def test_the_demo_is_the_same_every_time_and_starts_where_it_is_told():
    first, later = DemoScenes(3), DemoScenes(2, first=1)
    assert len(first) == 3
    for i in range(2):
        a, b = first[i + 1], later[i]
        assert (a.key, a.caption) == (b.key, b.caption) and np.array_equal(a.image, b.image)
    assert first[0].image.size == (64, 64)
    assert first.describe() != later.describe()
    # Without texture a scene has its masses, in few colours.
    flat, whole = np.asarray(first.structure(1)), np.asarray(first[1].image)
    colours = [len(np.unique(picture.reshape(-1, 3), axis=0)) for picture in (flat, whole)]
    assert flat.shape == whole.shape and colours[0] < colours[1] / 2
    assert np.abs(flat.astype(float) - whole).mean() < 40
    assert np.array_equal(flat, later.structure(0))
    with pytest.raises(IndexError):
        first[3]


# Where captions stand


def test_names_are_captions_where_that_is_asked_for(tmp_path, said):
    write(
        tmp_path, {"a_castle_at_dusk.png": png(), "b/two-towers 2.0.jpg": png(), "b/notes.txt": "no caption"}
    )
    source = open_source(tmp_path, caption_fields=("filename",))
    assert captions(source) == {
        "a_castle_at_dusk.png": "a castle at dusk",
        "b/two-towers 2.0.jpg": "two-towers 2.0",
    }
    assert said() == [f"{tmp_path}: left out 1 .txt"]
    with pytest.raises(ValueError, match="no caption"):
        open_source(tmp_path)


def test_captions_of_several_columns(tmp_path):
    rows = [
        {"file_name": "a.png", "text": "a", "long": "a, at length"},
        {"file_name": "b.png", "long": "b, at length"},
    ]
    write(tmp_path, {"a.png": png(), "b.png": png(), "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    source = ImageFolder(tmp_path, caption_fields=("text", "long", "filename"))
    assert [source.captions(i) for i in range(2)] == [["a", "a, at length", "a"], ["b, at length", "b"]]
    both = open_source(tmp_path, caption_fields=("text", "long"), captions_per_image=2)
    assert {both[0].caption, both[1].caption} == {"a", "a, at length"}
    assert both[2].caption == both[3].caption == "b, at length"
    assert (
        both.describe()["fingerprint"]
        != open_source(tmp_path, caption_fields=("long",)).describe()["fingerprint"]
    )
    with pytest.raises(ValueError, match=r"metadata.jsonl:1 must be like .*file_name.*other"):
        open_source(tmp_path, caption_fields=("other",))
    (tmp_path / "metadata.jsonl").unlink()
    write(tmp_path, {"metadata.csv": "file_name,long\na.png,x\nb.png,y\n"})
    assert captions(open_source(tmp_path, caption_fields=("long",))) == {"a.png": "x", "b.png": "y"}
    with pytest.raises(ValueError, match="must name the columns file_name, text and long"):
        open_source(tmp_path, caption_fields=("text", "long"))


def test_columns_of_no_list_are_refused(tmp_path):
    write(tmp_path, {"a.png": png(), "a.txt": "a"})
    with pytest.raises(ValueError, match=r"a\.png are in no metadata\.jsonl with long"):
        open_source(tmp_path, caption_fields=("long",))
    assert captions(open_source(tmp_path, caption_fields=("text",))) == {"a.png": "a"}
    repeated = open_source(tmp_path, captions_per_image=3)
    assert len(repeated) == 3 and repeated[2].caption == "a"


def test_tars_have_texts_alone(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.png": png(), "a.txt": "a"})
    with pytest.raises(ValueError, match=r"a tar has its captions in \.txt files alone"):
        open_source(tmp_path / "a.tar", caption_fields=("filename",))
