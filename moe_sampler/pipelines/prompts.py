"""Prompts to text features: one for all experts, negative ones each expert's own if wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from diffusers.utils import logging
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .._transfers import to_device
from ..data.captions import check_text
from .settings import by_expert

__all__ = [
    "as_list",
    "check_clip_skip",
    "check_prompts",
    "cut_silently",
    "encode_prompts",
    "negative_embeds",
    "prompt_count",
    "tokenize",
    "warn_of_cuts",
]

_SILENT: ContextVar[bool] = ContextVar("_SILENT", default=False)

Texts = str | Sequence[str]
Negative = Texts | Mapping[str, Texts]


def as_list(value: Any) -> Any:
    """A tuple as a list, also those in a mapping; anything else as it is."""
    if isinstance(value, Mapping):
        return {name: as_list(one) for name, one in value.items()}
    return list(value) if isinstance(value, tuple) else value


def prompt_count(prompt: Texts | None, prompt_embeds: torch.Tensor | None) -> int:
    if prompt_embeds is not None:
        return len(prompt_embeds)
    return 1 if isinstance(prompt, str) else len(prompt or ())


def check_prompts(
    prompt: Any,
    prompt_embeds: Any,
    negative_prompt: Any,
    negative_prompt_embeds: Any,
    experts: Sequence[str],
    features: int,
) -> None:
    """Raise ValueError for what is wrong with them.

    Args:
        prompt, prompt_embeds, negative_prompt, negative_prompt_embeds: as the pipeline takes them.
        experts: names, which negative prompts may be keyed by.
        features: channels of the text encoder.
    """
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("give either prompt or prompt_embeds")
    prompts = [] if prompt is None else [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts) or prompt == []:
        raise ValueError(f"prompt must be a string or a non-empty list of strings, got {prompt!r}")
    for text in prompts:
        check_text(text, "the prompt")
    if prompt_embeds is not None:
        _check_embeds("prompt_embeds", prompt_embeds, features)
    count = prompt_count(prompt, prompt_embeds)
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("give either negative_prompt or negative_prompt_embeds, not both")
    for name, negative in by_expert("negative_prompt", negative_prompt, experts).items():
        texts = negative if isinstance(negative, list) else [negative or ""]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{name}: a negative prompt is a string or a list of strings, got {negative!r}")
        for text in texts:
            check_text(text, f"{name}: the negative prompt")
        if isinstance(negative, list) and len(negative) != count:
            raise ValueError(f"{count} prompts need as many negative prompts, got {len(negative)}")
    for embeds in by_expert("negative_prompt_embeds", negative_prompt_embeds, experts).values():
        if embeds is not None:
            _check_embeds("negative_prompt_embeds", embeds, features)
            if len(embeds) not in (1, count):
                raise ValueError(f"{count} prompts need as many negative_prompt_embeds, got {len(embeds)}")


def _check_embeds(what: str, embeds: Any, features: int) -> None:
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 3 or embeds.shape[-1] != features:
        shape = tuple(embeds.shape) if isinstance(embeds, torch.Tensor) else type(embeds).__name__
        raise ValueError(f"{what} must be [prompts, tokens, {features}], as encode_prompt gives, got {shape}")
    if not len(embeds):
        raise ValueError(f"{what} must hold at least one prompt")


def tokenize(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[BatchEncoding, list[str]]:
    """(Tokens of texts, padded and cut to `length`, as tensors; what was cut off of each text, or "").

    Raises:
        ValueError: a text that holds no text.
    """
    texts = [check_text(text, "a text") for text in texts]
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=False, verbose=False)
    long = [ids for ids in tokens.input_ids if len(ids) > length]
    cut = [
        str(tokenizer.decode(ids[length - 1 :], skip_special_tokens=True)) or "..."
        if len(ids) > length
        else ""
        for ids in tokens.input_ids
    ]
    if long:
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True)
    return tokens.convert_to_tensors("pt"), cut


@contextmanager
def cut_silently() -> Iterator[None]:
    """A block without `warn_of_cuts`: for the captions of a data set, whose long ones are counted instead."""
    token = _SILENT.set(True)
    try:
        yield
    finally:
        _SILENT.reset(token)


def warn_of_cuts(cut: Sequence[str], length: int) -> None:
    """A line for every prompt that was too long."""
    for text in () if _SILENT.get() else filter(None, cut):
        logging.get_logger(__name__).warning(
            f"the prompt is longer than {length} tokens; this was cut off: {text!r}"
        )


def check_clip_skip(clip_skip: Any, text_encoder: Any) -> None:
    """Raise ValueError unless so many layers may be left out; None is none."""
    if clip_skip is None:
        return
    layers = text_encoder.config.num_hidden_layers
    if isinstance(clip_skip, bool) or not isinstance(clip_skip, int) or not 0 <= clip_skip < layers:
        raise ValueError(
            f"clip_skip is how many of the text encoder's {layers} layers are left out, 0 to {layers - 1}, "
            f"got {clip_skip!r}"
        )


def encode_prompts(
    prompts: Sequence[str],
    tokenizer: Any,
    text_encoder: Any,
    device: torch.device,
    clip_skip: int | None = None,
) -> torch.Tensor:
    """[B, tokens, channels] in the encoder's dtype: CLIP's hidden states. Too long a prompt is cut, with a
    warning that says what was cut.

    clip_skip: how many of the last layers are left out, as diffusers counts them; the final norm stays.
    """
    length = tokenizer.model_max_length
    tokens, cut = tokenize(prompts, tokenizer, length)
    warn_of_cuts(cut, length)
    mask = None
    if getattr(text_encoder.config, "use_attention_mask", False):
        mask = to_device(tokens.attention_mask, device)
    ids = to_device(tokens.input_ids, device)
    if not clip_skip:
        return text_encoder(ids, attention_mask=mask)[0]
    states = text_encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    # Older transformers keep the layers in a module of their own.
    return getattr(text_encoder, "text_model", text_encoder).final_layer_norm(states[-(clip_skip + 1)])


def negative_embeds(
    negative: Negative | None,
    embeds: torch.Tensor | Mapping[str, torch.Tensor] | None,
    guided: Sequence[str],
    experts: Sequence[str],
    count: int,
    encode: Any,
) -> dict[str, torch.Tensor]:
    """What guidance leads away from, by expert: [B, tokens, channels]. Shared texts are encoded once.

    Args:
        negative, embeds: one for all experts, or by expert; nothing is the empty prompt.
        guided: the experts that need it.
        experts: all names.
        count: prompts.
        encode: from texts to features.
    """
    own = by_expert("negative_prompt", negative, experts) if negative is not None else {}
    given = by_expert("negative_prompt_embeds", embeds, experts) if embeds is not None else {}
    encoded: dict[tuple[str, ...], torch.Tensor] = {}
    result = {}
    for name in guided:
        if given.get(name) is not None:
            result[name] = given[name].expand(count, -1, -1)
            continue
        text = own.get(name) or ""
        texts = (text,) if isinstance(text, str) else tuple(text)
        if texts not in encoded:
            encoded[texts] = encode(list(texts)).expand(count, -1, -1)
        result[name] = encoded[texts]
    return result
