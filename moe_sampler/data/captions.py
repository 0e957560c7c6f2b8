"""Captions as they lie in files, and what no text encoder can take."""

from __future__ import annotations

from collections.abc import Sequence

from .reports import printable, say, some

__all__ = ["check_text", "read_caption", "read_text", "report_cut", "report_empty"]


def read_text(data: bytes, name: str) -> str:
    """UTF-8 without its byte order mark, lines ending in a newline alone.

    Raises:
        ValueError: not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        reason = "it looks like UTF-16" if utf16 else str(error)
        raise ValueError(f"{printable(name)} is not UTF-8 text ({reason}): save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_caption(data: bytes, name: str) -> str:
    """As `read_text`, without white space around it."""
    return read_text(data, name).strip()


def check_text(text: str, name: str) -> str:
    """The text itself.

    Raises:
        ValueError: it holds half of a surrogate pair, as JSON's escapes or a command line's undecodable bytes
            may leave one. That is no character, and no tokenizer takes it.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        place = printable(text[max(0, error.start - 20) : error.start + 20])
        raise ValueError(
            f'{printable(name)} holds half a surrogate pair, no character, at {error.start}: "{place}"'
        ) from None
    return text


def report_empty(names: Sequence[str], count: int, where: object) -> None:
    """One line about captions without a word, if there are any; of `count` in all."""
    if names:
        say(f"{printable(where)}: {len(names)} of {count} captions are empty: {some(names)}")


def report_cut(names: Sequence[str], count: int, limit: int, encoder: str) -> None:
    """One line about captions longer than what an encoder takes, if there are any; of `count` in all."""
    if names:
        say(
            f"{len(names)} of {count} captions are longer than {encoder}'s {limit} tokens and are cut there: "
            + some(names)
        )
