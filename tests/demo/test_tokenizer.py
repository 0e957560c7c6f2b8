"""The tokenizer that the demo's captions make: their words whole, and room for all that they say."""

from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer, CLIPTokenizerFast

from moe_sampler.demo import known_words
from moe_sampler.demo.captions import EXAMPLE_PROMPTS, caption, vocabulary
from moe_sampler.demo.scenes import draw_scene
from moe_sampler.demo.tokenizer import MAX_LENGTH, write_tokenizer


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.mark.parametrize("tokenizer_class", [CLIPTokenizer, CLIPTokenizerFast])
def test_each_word_is_one_token(experts, tokenizer_class):
    tokenizer = tokenizer_class.from_pretrained(experts / "tokenizer")
    assert tokenizer.model_max_length == MAX_LENGTH
    for word in vocabulary():
        assert len(tokenizer(word).input_ids) == 3, word


def test_the_known_words_are_the_captions(experts):
    assert known_words(experts) == [word for word in vocabulary() if len(word) > 1]


def test_captions_and_examples_fit_however_much_they_say(experts):
    tokenizer = CLIPTokenizer.from_pretrained(experts / "tokenizer")
    rng = np.random.default_rng(0)
    texts = [caption(draw_scene(seed), rng, keep=keep) for seed in range(400) for keep in (0.8, 1.0)]
    assert max(len(tokenizer(text).input_ids) for text in (*texts, *EXAMPLE_PROMPTS)) <= MAX_LENGTH
