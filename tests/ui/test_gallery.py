"""Pictures by visitor, on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from moe_sampler.ui.gallery import Gallery, default_folder
from moe_sampler.ui.shelf import Shelf
from moe_sampler.viewing.images import read_settings


def square(color: str) -> Image.Image:
    return Image.new("RGB", (4, 4), color)


@pytest.fixture
def gallery(tmp_path) -> Gallery:
    return Gallery(tmp_path / "kept", most=2)


def test_pictures_remember_their_settings_newest_first(gallery):
    visitor = gallery.visitor()
    for seed, color in enumerate(("red", "green", "blue")):
        path = gallery.keep(visitor, square(color), {"prompt": color, "seed": seed}, f"{color}\nSteps: 2")
    with Image.open(path) as image:
        assert image.info["parameters"] == "blue\nSteps: 2"
    newest, older = gallery.pictures(visitor)  # the oldest made room
    assert newest == path and read_settings(newest) == {"prompt": "blue", "seed": 2}
    assert gallery.settings(visitor, older)["prompt"] == "green"
    gallery.remove(visitor, newest)
    assert gallery.pictures(visitor) == [older]


def test_a_visitor_sees_nobody_elses(gallery):
    mine, theirs = gallery.visitor(), gallery.visitor()
    assert mine != theirs and gallery.visitor(mine) == mine
    path = gallery.keep(theirs, square("red"), {"prompt": "theirs"})
    assert not gallery.pictures(mine)
    with pytest.raises(ValueError, match="no picture of this gallery"):
        gallery.settings(mine, path)
    gallery.remove(mine, path)
    assert path.exists()


@pytest.mark.parametrize("told", [None, 7, "", "../../etc", "A" * 32, "0" * 31])
def test_a_browser_tells_any_nonsense(gallery, told):
    assert gallery.visitor(told) != told
    if isinstance(told, str):
        with pytest.raises(ValueError, match="no visitor"):
            gallery.pictures(told)


def test_a_start_is_kept_once(gallery, tmp_path):
    square("red").save(tmp_path / "Start.PNG")
    visitor = gallery.visitor()
    first, second = (gallery.keep_start(visitor, tmp_path / "Start.PNG", "ab" * 32) for _ in range(2))
    assert first == second and first.read_bytes() == (tmp_path / "Start.PNG").read_bytes()
    assert first.suffix == ".png" and not gallery.pictures(visitor)


def test_it_lies_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "moe-sampler" / "gallery"


def test_the_shelf_holds_the_latest_once_each():
    shelf = Shelf(most=2)
    red, green = (shelf.put(square(color)) for color in ("red", "green"))
    before = Path(red).stat().st_mtime_ns
    assert shelf.put(square("red")) == red and Path(red).stat().st_mtime_ns == before  # not written over
    blue = shelf.put(square("blue"), "webp")
    assert Path(red).exists() and Path(blue).suffix == ".webp" and not Path(green).exists()
    assert Image.open(shelf.put(square("green"))).getpixel((0, 0)) == (0, 128, 0)
