"""The bytes of every token: what a text pattern reads, and how exact bytes are spelled with tokens again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "▁"  # sentencepiece's space


class Vocabulary(Sequence[bytes]):
    """`vocabulary[id]` is what the token prints, as bytes; b"" where it prints nothing or the id is not in
    use.

    Compared by identity, so that compiled automata can be cached by it: build it once a tokenizer. encode:
    text -> ids without special tokens, used to spell text as the model would. excluded: ids that text is
    never spelled with where `encode` does not give exact bytes (added tokens). last_resort: ids used only
    where no others will do (byte pieces).
    """

    def __init__(
        self,
        tokens: Iterable[bytes],
        *,
        encode: Callable[[str], Sequence[int]] | None = None,
        excluded: Iterable[int] = (),
        last_resort: Iterable[int] = (),
    ) -> None:
        self.tokens = tuple(tokens)
        self._encode = encode
        self._excluded = frozenset(excluded)
        self._last_resort = frozenset(last_resort)
        self._ids: dict[bytes, int] | None = None
        self._spelled: dict[bytes, tuple[int, ...] | None] = {}

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[bytes, ...]: ...
    def __getitem__(self, index: int | slice) -> bytes | tuple[bytes, ...]:
        return self.tokens[index]

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.tokens)

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def join(self, ids: Iterable[int]) -> bytes:
        """The bytes that a run of tokens prints; ids past the vocabulary print nothing."""
        tokens, size = self.tokens, len(self.tokens)
        return b"".join(tokens[i] for i in ids if 0 <= i < size)

    def spell(self, data: bytes) -> tuple[int, ...] | None:
        """Tokens whose bytes are exactly `data`, as the tokenizer would split it where it can; None where no
        tokens do.

        Tokenizers that put a space before a text (sentencepiece) or cannot read half a character are met by
        encoding behind a newline, then by the fewest tokens that spell `data`.
        """
        if data not in self._spelled:
            self._spelled[data] = self._spell_by_tokenizer(data) or self._spell_fewest(data)
        return self._spelled[data]

    def _spell_by_tokenizer(self, data: bytes) -> tuple[int, ...] | None:
        if self._encode is None or not data:
            return None
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:  # a half-written character: only bytes can finish it
            return None
        for anchor in ("", "\n"):
            ids = tuple(int(i) for i in self._encode(anchor + text))
            for start in range(len(ids)):
                if self.join(ids[start:]) == data and all(i < len(self.tokens) for i in ids[start:]):
                    return ids[start:]
                if not anchor:
                    break
        return None

    def _spell_fewest(self, data: bytes) -> tuple[int, ...] | None:
        if self._ids is None:
            usable = [i for i, token in enumerate(self.tokens) if token and i not in self._excluded]
            usable.sort(
                key=self._last_resort.__contains__
            )  # stable: the lowest id of the preferred kind comes first
            self._ids = {}
            for i in usable:
                self._ids.setdefault(self.tokens[i], i)
        # best[i]: (cost, tokens) of data[i:]; a byte piece costs as much as two others would.
        best: list[tuple[int, tuple[int, ...]] | None] = [None] * len(data) + [(0, ())]
        for at in range(len(data) - 1, -1, -1):
            for end in range(len(data), at, -1):  # longest first: it wins ties
                rest, token = best[end], self._ids.get(data[at:end])
                if rest is None or token is None:
                    continue
                cost = rest[0] + (2 if token in self._last_resort else 1)
                here = best[at]
                if here is None or cost < here[0]:
                    best[at] = (cost, (token, *rest[1]))
        return best[0][1] if best[0] else None


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's printable stand-ins for bytes, as a `str.translate` table: code point -> byte."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in set(kept)]
    return {**{byte: byte for byte in kept}, **{256 + i: byte for i, byte in enumerate(moved)}}


_ALPHABET = _byte_alphabet()
_ALPHABET_ONLY = re.compile("[" + "".join(re.escape(chr(c)) for c in _ALPHABET) + "]*")


def _from_byte_level(token: str) -> bytes:
    if _ALPHABET_ONLY.fullmatch(token) is None:
        return token.encode("utf-8")
    return token.translate(_ALPHABET).encode("latin-1")


def _from_sentencepiece(token: str) -> bytes:
    piece = _BYTE_PIECE.fullmatch(token)
    if piece is not None:
        return bytes([int(piece.group(1), 16)])
    return token.replace(_SPACE_MARK, " ").encode("utf-8")


def _from_wordpiece(token: str) -> bytes:
    return (token[2:] if token.startswith("##") else " " + token).encode("utf-8")


def _verbatim(token: str) -> bytes:
    return token.encode("utf-8")


def _decoder_kinds(decoder: Any) -> set[str]:
    """The types named in a `tokenizers` decoder, those inside a Sequence included."""

    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if node.get("type") == "Replace" and _SPACE_MARK in json.dumps(
                node.get("pattern"), ensure_ascii=False
            ):
                yield "Metaspace"
            elif "type" in node:
                yield str(node["type"])
            for child in node.get("decoders", ()):
                yield from walk(child)

    return set() if decoder is None else set(walk(json.loads(decoder.__getstate__())))


def _reader(tokenizer: Any, tokens: Iterable[str]) -> Callable[[str], bytes]:
    """How this tokenizer's tokens turn into bytes: by its decoder where it has one, else by the marks in its
    tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        kinds = _decoder_kinds(backend.decoder)
        if "ByteLevel" in kinds:
            return _from_byte_level
        if kinds & {"Metaspace", "ByteFallback"}:
            return _from_sentencepiece
        if "WordPiece" in kinds:
            return _from_wordpiece
        if kinds & {"BPEDecoder", "CTC"}:
            raise ValueError(
                f"no bytes are known for tokens of a {sorted(kinds)} decoder; use delimiters given as ids"
            )
        return _verbatim
    marks = {token[0] for token in tokens if token}
    if "Ġ" in marks:
        return _from_byte_level
    return _from_sentencepiece if _SPACE_MARK in marks else _verbatim


def added_ids(tokenizer: Any) -> dict[int, str]:
    """Id -> content of the tokens that are cut out of a text before the tokenizer's model sees it."""
    decoder = getattr(tokenizer, "added_tokens_decoder", None)
    if decoder is not None:
        return {int(i): str(getattr(token, "content", token)) for i, token in decoder.items()}
    return {int(i): token for token, i in tokenizer.get_added_vocab().items()}


def vocabulary_bytes(tokenizer: Any, vocab_size: int | None = None) -> Vocabulary:
    """The bytes of every id below `vocab_size` (default: as many as the tokenizer has).

    Byte-level BPE is read by GPT-2's byte alphabet, sentencepiece with `▁` as a space and `<0xNN>` as a byte,
    added tokens verbatim. Ids the tokenizer does not use give b"". Raises ValueError for a tokenizer whose
    tokens have no known bytes.
    """
    vocab: dict[str, int] = tokenizer.get_vocab()
    added = added_ids(tokenizer)
    size = max([*vocab.values(), *added], default=-1) + 1 if vocab_size is None else vocab_size
    read = _reader(tokenizer, vocab)
    table = [b""] * size
    for token, i in vocab.items():
        if i < size:
            table[i] = read(token)
    for i, token in added.items():
        if i < size:
            table[i] = token.encode("utf-8")
    pieces = [i for token, i in vocab.items() if read is _from_sentencepiece and _BYTE_PIECE.fullmatch(token)]
    return Vocabulary(
        table,
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        excluded=added,
        last_resort=pieces,
    )
