"""A sample's text, as it comes, into thinking and solution without the delimiters between them."""

from __future__ import annotations

from elastic_decode.core import Phase, TokenEvent
from elastic_decode.delimiters import Delimiters
from elastic_decode.engine.text import Tokenizer, decode

_Piece = tuple[int | None, str]  # a token and what it added to the text


class Segments:
    """Feeds on a sample's events, yields what each adds to thinking and to solution.

    All pieces joined are `Completion.thinking` and `.solution`; so what may yet turn out to be a delimiter is
    held back.
    """

    def __init__(self, delimiters: Delimiters, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._open, self._close = delimiters.open, delimiters.close
        self._opening: list[_Piece] | None = None if self._open is None else []
        self._held: list[_Piece] = []  # may be the close, or its beginning
        self._solving = False
        self._behind_open: _Beginning | None = None
        self._behind_close = _Beginning(tokenizer)
        self.thinking = ""
        self.solution = ""

    def push(self, event: TokenEvent) -> tuple[str, str]:
        """(what thinking has more of, what the solution has more of)."""
        thinking = solution = ""
        if event.phase is Phase.THINK:
            for piece in self._past_open((event.token_id, event.text)):
                thinking += self._think(piece)
        else:
            if not self._solving:
                self._solving = True
                thinking, solution = self._closed()
            solution += self._behind_close.push(event.token_id, event.text)
        if event.completion is not None:  # nothing can follow, so nothing is held back any more
            whole = event.completion
            if whole.thinking.startswith(self.thinking + thinking):
                thinking = whole.thinking[len(self.thinking) :]
            if whole.solution.startswith(self.solution + solution):
                solution = whole.solution[len(self.solution) :]
        self.thinking += thinking
        self.solution += solution
        return thinking, solution

    def _past_open(self, piece: _Piece) -> list[_Piece]:
        """Pieces of the thinking itself: none while only white space and a part of the open have come; the
        open, where the model wrote one, and what is before it are dropped.
        """
        if self._opening is None or self._open is None:
            return [piece]
        self._opening.append(piece)
        pieces = self._opening
        if self._open.text is not None:
            text = _joined(pieces).lstrip()
            if text.startswith(self._open.text):
                pieces = [(None, text[len(self._open.text) :])]
            elif self._open.text.startswith(text):
                return []
        else:
            ids, marker = [token for token, _ in pieces], list(self._open.ids)
            at = next(at for at in range(len(ids) + 1) if _agree(ids[at:], marker))
            if not _joined(pieces[:at]).strip():
                if len(ids) - at < len(marker):
                    return []
                pieces = pieces[at + len(marker) :]
                self._behind_open = _Beginning(self._tokenizer)
        self._opening = None
        return pieces

    def _think(self, piece: _Piece) -> str:
        """What is now known to be thinking, of this and of what was held."""
        token, text = piece
        if self._behind_open is not None:
            text = self._behind_open.push(token, text)
        self._held.append((token, text))
        if self._close.text is not None:
            whole = _joined(self._held)
            at = whole.rfind(self._close.text)
            if at < 0:
                at = len(whole) - _overlap(whole, self._close.text)
            self._held = [(None, whole[at:])]
            return whole[:at]
        ids, marker = [token for token, _ in self._held], list(self._close.ids)
        at = next(
            at for at in range(len(ids) + 1) if len(ids) - at <= len(marker) and _agree(ids[at:], marker)
        )
        ready, self._held = self._held[:at], self._held[at:]
        return _joined(ready)

    def _closed(self) -> tuple[str, str]:
        """What was held at the end of thinking, without the close: (thinking's, the solution's)."""
        held, self._held = [*(self._opening or ()), *self._held], []
        self._opening = None
        if self._close.text is None:
            size = len(self._close.ids)
            if [token for token, _ in held[-size:]] == list(self._close.ids):
                held = held[:-size]
            return _joined(held), ""
        text = _joined(held)
        at = text.rfind(self._close.text)
        return (text, "") if at < 0 else (text[:at], text[at + len(self._close.text) :])


class _Beginning:
    """A segment's first piece as it is when the segment is decoded on its own: some tokenizers
    (sentencepiece, Metaspace) write no space before a text's first word.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begun = False

    def push(self, token_id: int | None, piece: str) -> str:
        if self._begun:
            return piece
        if token_id is not None:
            self._ids.append(token_id)
        self._begun = bool(piece)
        if piece.startswith(" ") and not decode(self._tokenizer, self._ids).startswith(" "):
            return piece[1:]
        return piece


def _joined(pieces: list[_Piece]) -> str:
    return "".join([text for _, text in pieces])


def _agree(ids: list[int | None], marker: list[int]) -> bool:
    """Whether one of the two begins the other."""
    size = min(len(ids), len(marker))
    return ids[:size] == marker[:size]


def _overlap(text: str, pattern: str) -> int:
    """Length of the longest end of `text` that begins `pattern`, all of it included."""
    return next(
        (size for size in range(min(len(text), len(pattern)), 0, -1) if pattern.startswith(text[-size:])), 0
    )
