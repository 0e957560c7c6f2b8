"""Masks of images: in a folder of their own, or in a table's column; fitted as the images are."""

from __future__ import annotations

import numpy as np
import pytest
from data_helpers import png, saved, write, write_tar
from PIL import Image

from moe_sampler import open_source
from moe_sampler.data.masks import Masked, fit_mask, mask_of


def half(width: int = 8, height: int = 6) -> bytes:
    """White on the left."""
    picture = Image.new("L", (width, height))
    picture.paste(255, (0, 0, width // 2, height))
    return saved(picture)


def test_a_folder_of_masks_by_the_images_names(tmp_path, said):
    write(tmp_path / "set", {"a.png": png(), "a.txt": "a", "deep/b.jpg": png(), "deep/b.txt": "b"})
    write(tmp_path / "masks", {"deep/b.png": half()})
    source = open_source(tmp_path / "set", masks=tmp_path / "masks")
    assert isinstance(source, Masked) and source.has_masks
    assert source.mask(0) is None
    assert np.asarray(source.mask(1))[0].tolist() == [255] * 4 + [0] * 4
    assert said() == [f"{tmp_path / 'masks'}: 1 of 2 images have no mask: a.png"]
    before = source.describe()
    assert {**before, "masks": ""} == {**open_source(tmp_path / "set").describe(), "masks": ""}
    write(tmp_path / "masks", {"deep/b.png": half(10)})
    assert open_source(tmp_path / "set", masks=tmp_path / "masks").describe()["masks"] != before["masks"]
    repeated = open_source(tmp_path / "set", masks=tmp_path / "masks", captions_per_image=2)
    assert [repeated.mask(i) is None for i in range(4)] == [True, True, False, False]
    assert mask_of(open_source(tmp_path / "set"), 1) is None


def test_masks_that_cannot_be(tmp_path):
    write(tmp_path / "set", {"a.png": png(), "a.txt": "a"})
    write(tmp_path / "strange", {"b.png": half()})
    write(tmp_path / "two", {"a.png": half(), "a.webp": png()})
    for folder, message in (
        ("none", "is not a folder"),
        ("strange", r"masks of no image: b\.png"),
        ("two", r"two masks, a\.png and a\.webp"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path / "set", masks=tmp_path / folder)
    write_tar(tmp_path / "a.tar", {"a.png": png(), "a.txt": "a"})
    with pytest.raises(ValueError, match="not for tars"):
        open_source(tmp_path / "a.tar", masks=tmp_path / "strange")


def test_a_mask_is_cut_as_its_image_and_averaged():
    mask = Image.new("L", (32, 16))
    mask.paste(255, (0, 0, 12, 16))  # of the middle square, columns 8 to 23, the first 4 are white
    found = fit_mask(mask, (16, 16), (2, 4))
    assert found.dtype == np.uint8 and found.tolist() == [[255, 0, 0, 0]] * 2
    assert fit_mask(mask, (16, 16), (2, 2)).tolist() == [[128, 0]] * 2  # half of it, rounded
    assert fit_mask(None, (16, 16), (2, 2)).tolist() == [[255, 255]] * 2


def test_a_column_of_masks(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [png(), png()], "text": ["a", "b"], "mask": [half(), None]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet", mask_field="mask", streaming=True)
    assert source.has_masks and source.describe()["masks"] == "mask"
    assert np.asarray(source.mask(0))[0].tolist() == [255] * 4 + [0] * 4 and source.mask(1) is None
    with pytest.raises(ValueError, match="in a column"):
        open_source(tmp_path / "a.parquet", masks=tmp_path)
