"""Images and captions from WebDataset's tars: every member is read, or named."""

from __future__ import annotations

import tarfile

import pytest
from data_helpers import BLUE, GREEN, RED, captions, png, shown, write, write_tar

from moe_sampler import TarFiles, open_source


def test_tars(tmp_path, said):
    write_tar(tmp_path / "1.tar", {"x/0.png": png(RED), "x/0.txt": "red", "y.jpg.txt": "no", "y.txt": "no"})
    with pytest.raises(ValueError, match=r"1\.tar: y has 0 images"):
        open_source(tmp_path)
    write_tar(tmp_path / "1.tar", {"x/0.png": png(RED), "x/0.txt": "red", "x/0.json": "{}"})
    write_tar(
        tmp_path / "0.tar",
        {"0.txt": "blue", "0.png": png(BLUE), "1.png": png(), "1.seg.png": png(), "1.txt": "one"},
    )
    for source in (open_source(tmp_path), TarFiles([tmp_path / "0.tar", tmp_path / "1.tar"])):
        assert [row[:2] for row in shown(source)] == [("0", "blue"), ("1", "one"), ("x/0", "red")]
        assert shown(source)[0][2] == BLUE
    assert said() == [f"{tmp_path / '0.tar'}, {tmp_path / '1.tar'}: left out 1 .json, 1 .seg.png"] * 2
    assert len(open_source(tmp_path / "1.tar")) == 1


def test_a_folder_that_became_a_tar_keeps_the_dots_in_its_names(tmp_path, said):
    names = ["shot 2.0 (final)", "2021.05.01", "2021.05.02", "a", "deep.er/b.c", "2021"]
    files = {f"./{name}.JPG": png() for name in names} | {f"./{name}.TXT": name for name in names}
    assert captions(open_source(write_tar(tmp_path / "a.tar", files))) == {name: name for name in names}
    assert said() == []


def test_companions_of_a_sample_are_counted_by_kind(tmp_path, said):
    """WebDataset's key goes up to the first dot of the base name."""
    files = {f"d.0/{i}.{kind}": png() for i in range(2) for kind in ("jpg", "depth.png", "cls", "seg.PNG")}
    files |= {f"d.0/{i}.{kind}": "text" for i in range(2) for kind in ("txt", "long.txt")}
    assert captions(open_source(write_tar(tmp_path / "a.tar", files))) == {"d.0/0": "text", "d.0/1": "text"}
    assert said() == [
        f"{tmp_path / 'a.tar'}: left out 2 .cls, 2 .depth.png, 2 .long.txt, 2 .seg.png",
    ]


def test_links_within_a_tar(tmp_path):
    files = {
        "a/0.png": png(GREEN),
        "a/0.txt": "green",
        "b/1.png": (tarfile.LNKTYPE, "a/0.png"),
        "b/1.txt": (tarfile.SYMTYPE, "../a/0.txt"),
        "2.png": (tarfile.SYMTYPE, "b/1.png"),
        "2.txt": (tarfile.LNKTYPE, "./b/1.txt"),
    }
    tar = write_tar(tmp_path / "a.tar", files)
    assert shown(open_source(tar)) == [(key, "green", GREEN) for key in ("a/0", "b/1", "2")]
    for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        for target in ("3.png", "absent.png", "/etc/passwd"):
            write_tar(tar, files | {"3.png": (kind, target), "3.txt": "3"})
            with pytest.raises(ValueError, match=r"a\.tar: 3\.png can't be read"):
                open_source(tar)


def test_what_is_hidden_or_left_behind_is_no_data(tmp_path, said):
    hidden = ["._0.png", "__MACOSX/0.png", ".ipynb_checkpoints/0.png", "@eaDir/0.png/x.jpg", ".DS_Store"]
    files = {"0.png": png(), "0.txt": "a"} | {name: b"no picture" for name in hidden}
    assert captions(open_source(write_tar(tmp_path / "a.tar", files))) == {"0": "a"}
    assert said() == []


def test_tars_in_subfolders_and_what_lies_beside_them(tmp_path, said):
    for name in ("b.tar", "deep/a.TAR", "deep/er/c.tar"):
        write_tar(tmp_path / name, {f"{name[:-4]}.png": png(), f"{name[:-4]}.txt": name})
    write(tmp_path, {"index.json": "{}", "readme.txt": "", ".hidden/x.tar": b""})
    assert list(captions(open_source(tmp_path)).values()) == ["b.tar", "deep/a.TAR", "deep/er/c.tar"]
    assert said()[0].endswith("left out 1 .json, 1 .txt")
    for name in ("d.tar.gz", "d.tgz", "d.zip"):
        write(tmp_path, {name: b""})
        with pytest.raises(ValueError, match=r"archives of .*unpack them"):
            open_source(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no samples"),
        ({"0.json": "{}"}, r"no samples in there, only 1 \.json"),
        ({"0.png": png()}, "0 has 1 images and 0 .txt"),
        ({"0.txt": "a"}, "0 has 0 images and 1 .txt"),
        ({"0.png": png(), "0.jpg": png(), "0.txt": "a"}, "0 has 2 images and 1 .txt"),
        ({"2021.05.01.jpg": png(), "2021.05.02.txt": "a"}, r"2021\.05\.01 has 1 images and 0"),
        ({"0.png": png(), "0.txt": "a", "1.heic": b""}, r"aren't read \(1\.heic\)"),
        ({"0.png": png(), "0.txt": b"\xe9"}, r"a\.tar: 0\.txt is not UTF-8"),
        ({"0.png": png(), "0.txt": "a", "./0.txt": "b"}, r"0\.txt more than once"),
    ],
)
def test_tars_that_are_refused(tmp_path, files, message):
    tar = write_tar(tmp_path / "a.tar", files)
    with pytest.raises(ValueError, match=message):
        open_source(tar)


def three(path):
    return write_tar(
        path, {f"{i}.{kind}": png() if kind == "png" else "a" for i in range(3) for kind in ("png", "txt")}
    )


def test_a_tar_that_ends_early_is_refused_wherever_it_ends(tmp_path):
    tar = three(tmp_path / "a.tar")
    whole = tar.read_bytes()
    with tarfile.open(tar) as archive:
        end = archive.getmembers()[-1].offset_data + 512
    for length in (0, 1, 511, 512, 600, 1024, *range(1536, end + 512, 256)):
        tar.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.tar cannot be read as an uncompressed tar"):
            TarFiles(tar)
    tar.write_bytes(whole[: end + 1024])  # without padding to a whole record
    assert len(TarFiles(tar)) == 3


def test_a_damaged_header_is_named(tmp_path):
    tar = three(tmp_path / "a.tar")
    whole = tar.read_bytes()
    with tarfile.open(tar) as archive:
        headers = [member.offset for member in archive]
    for header in headers:
        for place in (0, 124, 148):
            data = bytearray(whole)
            data[header + place] ^= 1
            tar.write_bytes(data)
            with pytest.raises(ValueError, match=r"a\.tar cannot be read as an uncompressed tar"):
                TarFiles(tar)
    tar.write_bytes(whole + three(tmp_path / "b.tar").read_bytes())
    with pytest.raises(ValueError, match=r"more follows its end .*--concatenate"):
        TarFiles(tar)


def test_sizes_that_lie(tmp_path):
    tar = three(tmp_path / "a.tar")
    for size in (b"\xff" * 12, b"\x80" + b"\x7f" * 11, b"77777777777\0"):
        data = bytearray(tar.read_bytes())
        header = data[1024:1536]
        header[124:136], header[148:156] = size, b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[1024:1536] = header
        (tmp_path / "b.tar").write_bytes(data)
        with pytest.raises(ValueError, match=r"b\.tar cannot be read as an uncompressed tar"):
            TarFiles(tmp_path / "b.tar")


def test_a_compressed_tar_by_the_name_of_one(tmp_path):
    import gzip

    (tmp_path / "a.tar").write_bytes(gzip.compress(three(tmp_path / "b.tar").read_bytes()))
    with pytest.raises(ValueError, match=r"a\.tar cannot be read as an uncompressed tar"):
        open_source(tmp_path / "a.tar")


def test_images_that_cannot_be_read_are_named(tmp_path):
    tar = write_tar(
        tmp_path / "a.tar", {"0.png": png(size=(4, 4))[:50], "0.txt": "a", "1.png": png(), "1.txt": ""}
    )
    source = open_source(tar, max_pixels=47)
    with pytest.raises(ValueError, match=r"a\.tar: 0\.png cannot be read as an image"):
        source[0]
    with pytest.raises(ValueError, match=r"a\.tar: 1\.png has 8 × 6 pixels, and the limit is 47"):
        source[1]
    tar.write_bytes(tar.read_bytes()[:540])
    with pytest.raises(ValueError, match="has changed since it was opened"):
        source[0]
