"""Folders that are ours by proof, whole files, and what is left after a fault."""

import os
import resource
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from moe_sampler import _files as files
from moe_sampler.demo.export import check_output
from moe_sampler.errors import CheckpointError
from moe_sampler.viewing.images import check_writable, save_png


def test_a_folder_is_claimed_where_nothing_of_ours_stands(tmp_path):
    files.claim(tmp_path / "new", "thing", ("best", "*.json"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("today")
    files.claim(tmp_path / "notes", "thing", ("best", "*.json"))
    assert files.is_ours(tmp_path / "new", "thing") and files.is_ours(tmp_path / "notes", "thing")
    assert not files.is_ours(tmp_path / "new", "another thing")
    (tmp_path / "new" / "a.json").write_text("{}")
    files.claim(tmp_path / "new", "thing", ("best", "*.json"))
    with pytest.raises(CheckpointError, match=r"has a a\.json and is not the folder of a another thing"):
        files.claim(tmp_path / "new", "another thing", ("*.json",))


def test_links_are_neither_ours_nor_followed(tmp_path):
    files.claim(tmp_path / "ours", "thing")
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    assert not files.is_ours(tmp_path / "link", "thing")
    (tmp_path / "ours" / "best").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="best is a link"):
        files.check_ours(tmp_path / "ours", "thing", ("best",))
    (tmp_path / "letter").write_text("dear reader")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / files.MARK).symlink_to(tmp_path / "letter")
    with pytest.raises(CheckpointError, match="is a link"):
        files.claim(tmp_path / "other", "thing")
    (tmp_path / "pointer").symlink_to(tmp_path / "letter")
    files.write_text(tmp_path / "pointer", "overwritten")
    files.remove(tmp_path / "link")
    assert (tmp_path / "letter").read_text() == "dear reader"
    assert (tmp_path / "ours" / files.MARK).exists() and not (tmp_path / "link").exists()


def test_a_mark_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / files.MARK)
    with pytest.raises(CheckpointError, match="not a regular file"):
        files.claim(tmp_path, "thing", ("best",))


def test_one_user_at_a_time(tmp_path):
    files.claim(tmp_path, "thing")
    with files.sole_user(tmp_path, "trained in"):
        with pytest.raises(CheckpointError, match="being trained in by another process"):
            files.sole_user(tmp_path, "trained in").__enter__()
        assert (tmp_path / files.MARK).read_text() == "thing\n"
    with files.sole_user(tmp_path, "trained in"):
        pass


def test_what_is_replaced_is_there_until_the_new_one_is(tmp_path, monkeypatch):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    files.replace_folder(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "which").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    # A kill between the names and the deletion leaves something that `sweep` knows.
    monkeypatch.setattr(files.shutil, "rmtree", lambda path: None)
    files.remove(tmp_path / "old")
    monkeypatch.undo()
    (left,) = tmp_path.iterdir()
    assert left.name != "old" and (left / "which").exists()
    (tmp_path / ".oldest.tmp").write_text("a stranger's")
    files.sweep(tmp_path, ("old",))
    assert [path.name for path in tmp_path.iterdir()] == [".oldest.tmp"]


@pytest.mark.parametrize("kind", ["text", "png", "safetensors", "torch"])
def test_a_full_disk_is_one_line_with_the_name_and_leaves_nothing(tmp_path, kind):
    """A limit on the size of files fails as a full disk does, in the middle."""
    path = tmp_path / "result"
    path.write_text("before")
    noise = torch.rand(200_000)
    write = {
        "text": lambda p: p.write_text("x" * 800_000),
        "png": lambda p: Image.effect_noise((900, 900), 99).save(p, format="PNG"),
        "safetensors": lambda p: save_file({"a": noise}, p),
        "torch": lambda p: torch.save({"a": noise}, p),
    }[kind]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="result cannot be written") as caught:
            files.write_whole(path, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_signal_leaves_no_temporary_file(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from moe_sampler._files import write_whole\n"
        "from moe_sampler.cli.root import end_with_signals\n"
        "end_with_signals()\n"
        "write_whole(Path(sys.argv[1]), lambda path: os.kill(os.getpid(), signal.SIGTERM))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "result")], check=False)
    assert ended.returncode == 128 + 15 and not list(tmp_path.iterdir())


def test_an_export_replaces_only_an_export(tmp_path):
    check_output(tmp_path / "new")
    (tmp_path / "photos").mkdir()
    check_output(tmp_path / "photos")
    (tmp_path / "photos" / "vae").mkdir()
    with pytest.raises(CheckpointError, match="give another folder"):
        check_output(tmp_path / "photos")
    files.claim(tmp_path / "made", "demo experts")
    check_output(tmp_path / "made")
    (tmp_path / "made" / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"has a notes\.txt too"):
        check_output(tmp_path / "made")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    with pytest.raises(CheckpointError, match="is a link"):
        check_output(tmp_path / "link")


def test_an_image_is_not_written_through_a_link(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"mine")
    (tmp_path / "a.png").symlink_to(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="is a link"):
        check_writable(tmp_path / "a.png")
    save_png(Image.new("RGB", (4, 4)), tmp_path / "a.png")
    assert (tmp_path / "photo.png").read_bytes() == b"mine"
