"""Texts ahead: which row a sample sees, and that a row is its text."""

import pytest
import torch

from moe_sampler.expert_training import Captions, TextStates
from moe_sampler.expert_training.captions import StatesTable
from moe_sampler.training.draws import Draws


def test_every_text_is_kept_once_behind_the_empty_one():
    captions = Captions.of([("a", "b"), ("b", "c"), ("", "a")])
    assert captions.texts == ["", "a", "b", "c"]
    assert captions.rows.tolist() == [[1, 2], [2, 3], [0, 1]]
    assert captions.of_image(1) == ["b", "c"] and captions.first([2, 0]) == ["", "a"]
    assert captions.part(1, 3).of_image(1) == ["", "a"]
    with pytest.raises(ValueError, match="same number of captions"):
        Captions.of([("a", "b"), "c"])
    with pytest.raises(ValueError, match="the empty one"):
        Captions(torch.zeros(1, 1, dtype=torch.int64), ["a"])


def test_a_samples_text_is_one_of_its_images_evenly_and_empty_as_often_as_asked():
    captions = Captions.of([(f"{i}a", f"{i}b") for i in range(5)])
    images = torch.arange(4000) % 5
    draws = Draws(1, 2, range(4000), 4000)
    rows = captions.draw(images, draws, 0.25)
    texts = [captions.texts[row] for row in rows.tolist()]
    assert 850 < texts.count("") < 1150
    said = [(int(i), text) for i, text in zip(images, texts, strict=True) if text]
    assert all(text[:-1] == str(i) for i, text in said)
    assert 0.46 < sum(text.endswith("a") for _, text in said) / len(said) < 0.54
    # The same in another share of the batch, and never empty where none may be.
    part = captions.draw(images[1000:1500], Draws(1, 2, range(1000, 1500), 4000), 0.25)
    assert torch.equal(part, rows[1000:1500])
    assert captions.draw(images, draws, 0.0).min() > 0


def test_a_tables_states_are_the_texts(demo_pipeline):
    text = TextStates(demo_pipeline.text_encoder, demo_pipeline.tokenizer)
    texts = ["", "a castle", "a city street at night"]
    rows = torch.tensor([2, 0, 2, 1])
    expected = text([texts[row] for row in rows])
    torch.testing.assert_close(text.table(texts).states(rows), expected)
    ahead = StatesTable(text(texts).half()).states(rows)
    torch.testing.assert_close(ahead, expected, rtol=1e-3, atol=1e-3)
    assert ahead.dtype == torch.float32
