"""A CLIP tokenizer whose words are the captions' words.

CLIPTokenizer splits by byte-pair merges, so a whole-word vocabulary is written as merges that build each word
from its letters. Any other word falls apart into known pieces, as in CLIP itself: nothing is out of
vocabulary, but a word the captions never use carries no meaning for the experts.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from .captions import vocabulary

MAX_LENGTH = 56
"""Tokens of a prompt, with those that begin and end it: a caption that says everything fits."""
_END = "</w>"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes that GPT-2 and CLIP use, in their order."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) for byte in visible] + [chr(256 + i) for i in range(len(hidden))]


def _split(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word under the given merges."""
    pieces = [*word[:-1], word[-1] + _END]
    while len(pieces) > 1:
        pairs = list(pairwise(pieces))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined, i = [], 0
        while i < len(pieces):
            if i + 1 < len(pieces) and (pieces[i], pieces[i + 1]) == best:
                joined.append(pieces[i] + pieces[i + 1])
                i += 2
            else:
                joined.append(pieces[i])
                i += 1
        pieces = joined
    return pieces


def build_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges under which each word becomes one token.

    Word by word: whatever pieces the merges so far leave are joined from left to right by new merges. New
    merges rank last, so words done earlier still come out whole.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = _split(word, ranks)
        while len(pieces) > 1:
            ranks[(pieces[0], pieces[1])] = len(ranks)
            pieces = _split(word, ranks)
    return list(ranks)


def write_tokenizer(folder: Path) -> None:
    """Write vocab.json, merges.txt and the configs in Hugging Face's format."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    merges = build_merges(vocabulary())
    alphabet = byte_alphabet()
    entries = [*alphabet, *(c + _END for c in alphabet), *dict.fromkeys(a + b for a, b in merges), BOS, EOS]
    vocab = {entry: i for i, entry in enumerate(entries)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        unk_token=EOS,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=MAX_LENGTH,
    )
    tokenizer.save_pretrained(folder)
