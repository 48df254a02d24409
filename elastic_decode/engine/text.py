"""Tokens to text: incremental decoding that never shows half a character, stop strings, and the
thinking/solution split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from elastic_decode.core import Phase, ThinkEnd
from elastic_decode.delimiters import Delimiters, Marker

REPLACEMENT = "\ufffd"
# A character is at most four bytes, so at most three replacement characters can be one that is still being
# written.
_OPEN_CHARACTER = 3
_CONTEXT = 8  # tokens kept before the unread ones: decoders look back (leading spaces, byte runs)
_WINDOW = 32


class Tokenizer(Protocol):
    def decode(
        self, token_ids: list[int], skip_special_tokens: bool = ..., clean_up_tokenization_spaces: bool = ...
    ) -> str: ...


def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    return tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStream:
    """Feeds on token ids, yields what each adds to the text.

    All pieces and the final `flush` joined are the text of all ids. What is out stays out: where a tokenizer
    turns a run of byte pieces into replacement characters until its last character is whole (sentencepiece's
    byte fallback), nothing comes out meanwhile.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # the window decoded again for each token begins here
        self._shown = ""  # the part of the window's text that is out
        self._whole = 0  # how many ids had been seen when the text was last as expected

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = decode(self._tokenizer, self._ids[self._start :])
        if not text.startswith(self._shown):
            if len(self._ids) - self._whole <= _OPEN_CHARACTER:
                return ""
            # No character is that long: these bytes are none, so what follows is read without what was
            # before.
            self._start, self._shown = self._whole, ""
            text = decode(self._tokenizer, self._ids[self._start :])
        self._whole = len(self._ids)
        held = min(len(text) - len(text.rstrip(REPLACEMENT)), _OPEN_CHARACTER)
        ready = max(len(text) - held, len(self._shown))
        piece = text[len(self._shown) : ready]
        self._shown = text[:ready]
        if len(self._ids) - self._start > _WINDOW and ready == len(text):
            self._slide(text)
        return piece

    def flush(self) -> str:
        """The rest: an incomplete character at the end of the output shows as a replacement character."""
        text = decode(self._tokenizer, self._ids[self._start :])
        piece = text[len(self._shown) :] if text.startswith(self._shown) else REPLACEMENT
        self._shown += piece
        return piece

    def _slide(self, text: str) -> None:
        """Begin the window later, at a token where decoding afresh gives the same characters."""
        for context in range(_CONTEXT, 2 * _CONTEXT):
            start = len(self._ids) - context
            tail = decode(self._tokenizer, self._ids[start:])
            if tail and text.endswith(tail):
                self._start, self._shown = start, tail
                return


def text_of(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text of a finished output, the same whether it was streamed or not."""
    text = decode(tokenizer, token_ids)
    if not text.endswith(REPLACEMENT):
        return text
    stream = TextStream(tokenizer)
    return "".join([stream.push(token) for token in token_ids]) + stream.flush()


class StopScanner:
    """Holds back text that may begin a stop string, and cuts at the first one that is complete."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The part of the text so far that is now known to be before any stop."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        for length in range(min(len(text), len(stop) - 1), 0, -1):
            if stop.startswith(text[-length:]):
                return length
        return 0


def _find(ids: Sequence[int], pattern: Sequence[int]) -> int:
    size = len(pattern)
    for at in range(len(ids) - size + 1):
        if tuple(ids[at : at + size]) == tuple(pattern):
            return at
    return -1


def _strip_open(tokenizer: Tokenizer, ids: list[int], marker: Marker | None) -> list[int]:
    """Without the open delimiter, where the model wrote it itself and nothing but white space came before."""
    if marker is not None and marker.text is None:
        at = _find(ids, marker.ids)
        if at >= 0 and not decode(tokenizer, ids[:at]).strip():
            return ids[at + len(marker.ids) :]
    return ids


def split_text(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    phases: Sequence[Phase],
    think_end: ThinkEnd,
    delimiters: Delimiters,
) -> tuple[str, str]:
    """(thinking, solution) without delimiters. `token_ids` exclude a final EOS.

    Where the close is text, a token may hold its end and what follows: that rest belongs to the solution.
    """
    think = [token for token, phase in zip(token_ids, phases, strict=True) if phase is Phase.THINK]
    solve = [token for token, phase in zip(token_ids, phases, strict=True) if phase is Phase.SOLVE]
    think = _strip_open(tokenizer, think, delimiters.open)
    close = delimiters.close
    rest = ""
    if close.text is None:
        size = len(close.ids)
        if think_end != "none" and size and tuple(think[-size:]) == tuple(close.ids):
            think = think[:-size]
        thinking = decode(tokenizer, think)
    else:
        thinking = decode(tokenizer, think)
        at = thinking.rfind(close.text) if think_end != "none" else -1
        if at >= 0:
            rest = thinking[at + len(close.text) :]
            thinking = thinking[:at]
    open_text = delimiters.open.text if delimiters.open is not None else None
    if open_text is not None and thinking.lstrip().startswith(open_text):
        thinking = thinking.lstrip()[len(open_text) :]
    return thinking, rest + decode(tokenizer, solve)
