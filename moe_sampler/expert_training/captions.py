"""The texts that describe images: chosen and tokenised ahead, so that a step only looks rows up.

Every image has K texts; which of them a sample sees is drawn a step. Row 0 is the empty text, which guidance
needs and some samples see instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from .._transfers import OnDevice, to_device
from ..pipelines.prompts import tokenize
from ..training.draws import Draws

__all__ = ["Captions", "StatesTable", "TextStates", "TextTable"]

_AT_ONCE = 4096


class Captions:
    """Texts of N images, K of each.

    Args:
        rows: int64 [N, K], places in `texts`.
        texts: each once, the first one empty.
    """

    def __init__(self, rows: Tensor, texts: list[str]) -> None:
        if rows.ndim != 2 or rows.dtype != torch.int64:
            raise ValueError(f"rows must be int64 [N, K], got {rows.dtype} {list(rows.shape)}")
        if not texts or texts[0]:
            raise ValueError("the first of the texts must be the empty one")
        self.rows, self.texts = rows, texts
        self._rows = OnDevice(rows)

    @classmethod
    def of(cls, captions: Sequence[Sequence[str] | str]) -> Captions:
        """captions: of every image a text, or as many texts as of every other.

        Raises:
            ValueError: more or fewer of one than of another.
        """
        lists = [[own] if isinstance(own, str) else list(own) for own in captions]
        if len({len(own) for own in lists}) > 1 or not all(lists):
            raise ValueError("every image needs the same number of captions, at least one")
        places: dict[str, int] = {"": 0}
        rows = [[places.setdefault(text, len(places)) for text in own] for own in lists]
        return cls(torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1), list(places))

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, first: int, last: int) -> Captions:
        """Of these images alone."""
        return Captions(self.rows[first:last], self.texts)

    def of_image(self, index: int) -> list[str]:
        return [self.texts[row] for row in self.rows[index].tolist()]

    def first(self, indices: Sequence[int]) -> list[str]:
        """Every image's first text."""
        return [self.texts[row] for row in self.rows[list(indices), 0].tolist()]

    def draw(self, images: Tensor, draws: Draws, dropout: float) -> Tensor:
        """Rows of the texts that samples see: int64 [B] on the draws' device.

        images: int64 [B], there. dropout: share of the samples that see the empty text.
        """
        own = self._rows.on(images.device)[images, draws.integers("caption", self.rows.shape[1])]
        return own.masked_fill(draws.uniform("caption dropout") < dropout, 0)


class TextTable(Protocol):
    """Texts by row, as the experts' cross-attention is shown them."""

    def states(self, rows: Tensor) -> Tensor:
        """float32 [B, tokens, channels] of rows: int64 [B], on their device."""
        ...


class StatesTable:
    """Texts that were encoded ahead.

    Args:
        states: float [U, tokens, channels]; of a file that is mapped from disk only what is used is read.
    """

    def __init__(self, states: Tensor) -> None:
        self._states = OnDevice(states)

    def states(self, rows: Tensor) -> Tensor:
        return self._states.on(rows.device)[rows].float()


class TextStates:
    """Captions as the experts' cross-attention is shown them, by a frozen text encoder.

    Args:
        model, tokenizer: of the pipeline; longer texts than the tokenizer's length are cut, without a word.
    """

    def __init__(self, model: CLIPTextModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self._device = next(model.parameters()).device
        self._masked = bool(getattr(model.config, "use_attention_mask", False))

    def __call__(self, texts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """float32 [B, tokens, channels]."""
        ids, mask = self.tokenize(texts)
        return self.encode(to_device(ids, device), None if mask is None else to_device(mask, device))

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """int64 [B, tokens], and which of them count: int64 [B, tokens], where the encoder asks for it."""
        tokens = tokenize(texts, self.tokenizer, self.tokenizer.model_max_length)[0]
        return tokens.input_ids, tokens.attention_mask if self._masked else None

    def too_long(self, texts: Sequence[str]) -> list[bool]:
        """Which of them are cut."""
        return [bool(cut) for cut in tokenize(texts, self.tokenizer, self.tokenizer.model_max_length)[1]]

    @torch.no_grad()
    def encode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """What `tokenize` gives, on any device, to float32 [B, tokens, channels] there."""
        if self._device != ids.device:
            self.model.to(ids.device)  # pyright: ignore[reportArgumentType]
            self._device = ids.device
        return self.model(ids, attention_mask=mask).last_hidden_state.float()

    def table(self, texts: Sequence[str]) -> TextTable:
        """Texts that are tokenised now, and encoded when they are asked for."""
        return _TokenTable(self, texts)


class _TokenTable:
    """Tokens take a thousandth of the room of states."""

    def __init__(self, text: TextStates, texts: Sequence[str]) -> None:
        self._text = text
        parts = [text.tokenize(texts[i : i + _AT_ONCE]) for i in range(0, len(texts), _AT_ONCE)]
        self._ids = OnDevice(torch.cat([ids.int() for ids, _ in parts]))
        masks = [mask.int() for _, mask in parts if mask is not None]
        self._mask = OnDevice(torch.cat(masks)) if masks else None

    def states(self, rows: Tensor) -> Tensor:
        ids = self._ids.on(rows.device)[rows].long()
        mask = None if self._mask is None else self._mask.on(rows.device)[rows].long()
        return self._text.encode(ids, mask)
