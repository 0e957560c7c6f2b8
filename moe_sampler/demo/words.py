"""What is said of scenes, drawn ahead: captions as texts and tokens, and attributes as classes.

Drawing a scene's attributes, putting them into words and tokenising these takes longer than a small model's
step on a GPU, so it is done where the pictures are drawn, by all cores.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .._files import write_whole
from .._readers import check_regular, parse_json
from ..errors import CheckpointError, first_line
from .captions import describe, disturb
from .scenes import Scene

__all__ = ["CAPTIONS", "Words", "draw_words", "read_words", "write_words"]

CAPTIONS = 4
"""Texts of a scene."""
_AGAIN = "delete it, and it is drawn again"
_FIRST_STREAM = 3  # streams 0 to 2 of a scene's seed draw it


class Words(NamedTuple):
    """Of N scenes, with K = CAPTIONS texts each.

    texts: N lists of K. tokens: int16 [N, K, T], theirs. strange: int16 [N, K, T], the same texts with words
    that mean nothing. labels: int8 [N, heads], classes as `attributes.labels` has them. said: int8 [N, K,
    heads], the same with the class "unsaid" for what a text leaves out.
    """

    texts: list[list[str]]
    tokens: np.ndarray
    strange: np.ndarray
    labels: np.ndarray
    said: np.ndarray


def draw_words(scenes: list[Scene], tokenizer: Path) -> Words:
    """tokenizer: its folder."""
    from .attributes import labels
    from .text import tokenize

    texts, strange, said = [], [], []
    for scene in scenes:
        for k in range(CAPTIONS):
            rng = np.random.default_rng([scene.seed, _FIRST_STREAM + k])
            text, attributes = describe(scene, rng)
            texts.append(text)
            said.append(attributes)
            strange.append(disturb(text, rng))
    known = _tokenizer(tokenizer)
    shape = (len(scenes), CAPTIONS, -1)
    repeated = [scene for scene in scenes for _ in range(CAPTIONS)]
    return Words(
        [texts[i : i + CAPTIONS] for i in range(0, len(texts), CAPTIONS)],
        tokenize(known, texts).numpy().astype(np.int16).reshape(shape),
        tokenize(known, strange).numpy().astype(np.int16).reshape(shape),
        labels(scenes).numpy().astype(np.int8),
        labels(repeated, said).numpy().astype(np.int8).reshape(shape),
    )


@lru_cache(maxsize=1)
def _tokenizer(folder: Path):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # all cores draw already
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def write_words(path: Path, words: Words) -> None:
    """Whole or not at all."""
    text = np.frombuffer(json.dumps(words.texts).encode(), dtype=np.uint8)

    def save(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, texts=text, **{name: getattr(words, name) for name in Words._fields[1:]})

    write_whole(path, save)


def read_words(paths: list[Path]) -> Words:
    """Of several files, one after another.

    Raises:
        CheckpointError: a file that is missing, damaged, or not of `write_words`.
    """
    found = [_read(path) for path in paths]
    texts = [own for words in found for own in words.texts]
    return Words(
        texts, *(np.concatenate([words[i] for words in found]) for i in range(1, len(Words._fields)))
    )


def _read(path: Path) -> Words:
    check_regular(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in Words._fields}
    except Exception as error:  # NumPy's and zipfile's readers raise a dozen kinds for damaged files
        raise CheckpointError(f"{path} is damaged: {first_line(error)}; {_AGAIN}") from None
    texts = parse_json(arrays.pop("texts").tobytes().decode("utf-8", "replace"), path)
    words = Words(texts, **arrays)
    shapes = [(len(words.texts), CAPTIONS)] if isinstance(texts, list) else []
    shapes += [words.tokens.shape[:2], words.strange.shape[:2], words.said.shape[:2]]
    whole = words.labels.ndim == 2 and all(
        array.ndim == 3 for array in (words.tokens, words.strange, words.said)
    )
    whole = (
        whole and {*shapes} == {(len(words.labels), CAPTIONS)} and words.tokens.shape == words.strange.shape
    )
    kinds = {name: np.int16 if name in ("tokens", "strange") else np.int8 for name in arrays}
    whole = whole and all(array.dtype == kinds[name] for name, array in arrays.items())
    whole = whole and words.said.shape[2] == words.labels.shape[1]
    if not whole or not isinstance(texts, list) or not all(map(_are_texts, texts)):
        raise CheckpointError(f"{path} is damaged: it doesn't hold {CAPTIONS} captions a scene; {_AGAIN}")
    return words


def _are_texts(own: object) -> bool:
    return isinstance(own, list) and len(own) == CAPTIONS and all(isinstance(text, str) for text in own)
