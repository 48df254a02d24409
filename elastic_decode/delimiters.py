"""Where thinking opens and closes, and what ends an output: resolved from the tokenizer, never hard-coded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic_decode.core import Phase
from elastic_decode.errors import DelimiterError
from elastic_decode.vocabulary import Vocabulary, added_ids, vocabulary_bytes

__all__ = ["Delimiters", "Marker", "resolve", "start_phase", "vocabulary_bytes"]


@dataclass(frozen=True)
class Marker:
    """A delimiter. Without `text` it is recognised by exactly `ids`; with `text`, wherever these bytes are
    printed, however the tokens split or merge them, and `ids` are the canonical way to write it.
    """

    ids: tuple[int, ...]
    text: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(int(i) for i in self.ids))
        if not self.ids:
            raise DelimiterError("a marker needs at least one token id")
        if min(self.ids) < 0:
            raise DelimiterError(f"token ids are >= 0, got {list(self.ids)}")
        if self.text == "":
            raise DelimiterError(
                "a marker's text must not be empty; None means that it is matched by its ids"
            )


@dataclass(frozen=True)
class Delimiters:
    """What separates thinking from solution. `open` may be None where no text in use opens thinking."""

    open: Marker | None
    close: Marker
    eos_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "eos_ids", tuple(sorted({int(i) for i in self.eos_ids})))
        if not self.eos_ids:
            raise DelimiterError("no EOS id: an output could only end by its budget; pass eos_ids=")


# (open, close) in use; text of several added tokens is a sequence of ids.
_HARMONY = ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>")
_HARMONY_TOKENS = ("<|start|>", "<|end|>", "<|channel|>", "<|message|>")
_PAIRS = (
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("◁think▷", "◁/think▷"),
)
_HOW = (
    "Pass think_open= and think_close= (a string, a token id or a list of ids), or Delimiters("
    "open=Marker(…), close=Marker(…), eos_ids=…)."
)

MarkerLike = Marker | str | int | Sequence[int]


class _Reader:
    """A tokenizer, asked for markers."""

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary | None) -> None:
        self.tokenizer = tokenizer
        self.vocab: dict[str, int] = tokenizer.get_vocab()
        self.added = added_ids(tokenizer)
        self._vocabulary = vocabulary

    @property
    def vocabulary(self) -> Vocabulary:
        if self._vocabulary is None:
            try:
                self._vocabulary = vocabulary_bytes(self.tokenizer)
            except ValueError as error:
                raise DelimiterError(f"a textual delimiter needs the bytes of the tokens: {error}") from error
        return self._vocabulary

    def token(self, text: str) -> int | None:
        """The id of a token that is `text` and that no other token can spell a part of, or None."""
        for i, content in self.added.items():
            if content == text:
                return i
        known = self.vocab.get(text)
        return known if known is not None and self._alone(known, text.encode("utf-8")) else None

    def _alone(self, i: int, data: bytes) -> bool:
        if self.vocabulary[i] != data:
            return False
        starts = tuple(data[:n] for n in range(1, len(data) + 1))
        ends = tuple(data[n:] for n in range(len(data)))
        return not any(
            token and (data in token or token in data or token.endswith(starts) or token.startswith(ends))
            for other, token in enumerate(self.vocabulary)
            if other != i and other not in self.added
        )

    def marker(self, name: str, given: MarkerLike) -> Marker:
        if isinstance(given, Marker):
            return self._in_range(name, given)
        if isinstance(given, int):
            return self._in_range(name, Marker((given,)))
        if not isinstance(given, str):
            return self._in_range(name, Marker(tuple(given)))
        if not given:
            raise DelimiterError(f"{name} is an empty string")
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        one = self.token(given)
        if one is not None and one != unknown:
            return Marker((one,))
        ids = [int(i) for i in self.tokenizer.encode(given, add_special_tokens=False)]
        if not ids or (unknown is not None and unknown in ids):
            raise DelimiterError(
                f"{name}={given!r} is not in the tokenizer's vocabulary: it encodes to {ids}, with the "
                "unknown token among them. Pass the ids the model was trained with."
            )
        if ids[0] in self.added and ids[-1] in self.added:  # nothing can merge with its ends
            return Marker(tuple(ids))
        exact = self.vocabulary.spell(given.encode("utf-8"))
        if exact is None:
            raise DelimiterError(f"{name}={given!r} cannot be spelled with the tokenizer's vocabulary")
        return Marker(exact, given)

    def _in_range(self, name: str, marker: Marker) -> Marker:
        size = max([*self.vocab.values(), *self.added], default=-1) + 1
        if max(marker.ids) >= size:
            raise DelimiterError(
                f"{name} has token id {max(marker.ids)}, the tokenizer has ids 0 … {size - 1}"
            )
        return marker


def _template_text(tokenizer: Any, chat_template: Any) -> str:
    template = chat_template if chat_template is not None else getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        return "\n".join(str(text) for text in template.values())
    if isinstance(template, (list, tuple)):
        return "\n".join(str(entry.get("template", "")) for entry in template)
    return template or ""


def _partner(text: object, side: int) -> str | None:
    """The known other half of a known delimiter."""
    return next((pair[1 - side] for pair in (*_PAIRS, _HARMONY) if pair[side] == text), None)


def _detect(reader: _Reader, template: str) -> tuple[str, str]:
    """The one pair this tokenizer and template use. Raises DelimiterError where there is none, or several."""
    pairs = [pair for pair in _PAIRS if all(reader.token(text) is not None for text in pair)]
    if all(text in reader.vocab for text in _HARMONY_TOKENS):
        pairs.append(_HARMONY)
    where = "are tokens of the vocabulary"
    if len(pairs) > 1:
        named = [pair for pair in pairs if any(_mentions(template, text) for text in pair)]
        pairs = named or pairs
    if not pairs:
        where = "appear in the chat template"
        pairs = [pair for pair in _PAIRS if any(text in template for text in pair)]
    if len(pairs) == 1:
        return pairs[0]
    if pairs:
        listed = ", ".join(f"{a} … {b}" for a, b in pairs)
        raise DelimiterError(f"the thinking delimiters are ambiguous: {listed} all {where}. {_HOW}")
    looked = ", ".join(f"{a} … {b}" for a, b in (*_PAIRS, _HARMONY))
    saw = (
        f"the chat template ({len(template)} characters)" if template else "the chat template (there is none)"
    )
    raise DelimiterError(
        f"no thinking delimiters found. Looked for {looked} as tokens of the vocabulary "
        f"({len(reader.vocab)} tokens) and as text in {saw}. {_HOW}"
    )


def _mentions(template: str, text: str) -> bool:
    # A template builds gpt-oss's sequence from pieces.
    return "<|channel|>" in template if text in _HARMONY else text in template


def _eos_ids(tokenizer: Any, generation_config: Any, given: int | Iterable[int] | None) -> tuple[int, ...]:
    def listed(value: Any) -> list[int]:
        if value is None:
            return []
        return [int(value)] if isinstance(value, int) else [int(i) for i in value]

    if given is not None:
        ids = listed(given)
    else:
        if isinstance(generation_config, Mapping):
            configured = generation_config.get("eos_token_id")
        else:
            configured = getattr(generation_config, "eos_token_id", None)
        ids = listed(configured) + listed(getattr(tokenizer, "eos_token_id", None))
    if not ids:
        raise DelimiterError(
            "no EOS id: neither generation_config.eos_token_id nor the tokenizer's eos_token_id is set. "
            "Pass eos_ids=."
        )
    return tuple(ids)


def resolve(
    tokenizer: Any,
    *,
    generation_config: Any = None,
    chat_template: str | Mapping[str, str] | None = None,
    think_open: MarkerLike | None = None,
    think_close: MarkerLike | None = None,
    eos_ids: int | Iterable[int] | None = None,
    vocabulary: Vocabulary | None = None,
) -> Delimiters:
    """The delimiters of a model, from its tokenizer and chat template.

    Known pairs are looked for as tokens of the vocabulary, then as text in the chat template (default: the
    tokenizer's). What is given wins: a string is one added token, a sequence of ids between added tokens, or
    else a text that is found however BPE splits it; an int or a list of ints is exactly these ids. One half
    given, the other is its known partner; an unknown open is None. EOS: `eos_ids`, else the union of
    generation_config's (a dict or a GenerationConfig) and the tokenizer's. vocabulary: that of
    `vocabulary_bytes`, to save building it again. Raises DelimiterError where a delimiter or EOS id is
    missing or ambiguous.
    """
    reader = _Reader(tokenizer, vocabulary)
    ends = _eos_ids(tokenizer, generation_config, eos_ids)
    if think_open is None and think_close is None:
        think_open, think_close = _detect(reader, _template_text(tokenizer, chat_template))
    elif think_close is None:
        think_close = _partner(think_open, 0)
        if think_close is None:
            raise DelimiterError(f"think_open={think_open!r} has no known close: pass think_close= as well")
    elif think_open is None:
        think_open = _partner(think_close, 1)
    close = reader.marker("think_close", think_close)
    opened = None if think_open is None else reader.marker("think_open", think_open)
    if opened is not None and opened.ids == close.ids:
        raise DelimiterError(f"think_open and think_close are the same tokens {list(close.ids)}")
    return Delimiters(opened, close, ends)


def start_phase(
    token_ids: Sequence[int], delimiters: Delimiters, vocabulary: Sequence[bytes] | None = None
) -> Phase:
    """The phase in which the output begins: THINK after an open or without any marker, SOLVE after a close.

    The last marker decides. token_ids: the whole prompt for ids and strings; for a chat only the generation
    prompt, so that no message can open or close anything. vocabulary: the tokens' bytes; needed for textual
    markers.
    """
    ids = list(token_ids)
    opened = _last(ids, delimiters.open, vocabulary) if delimiters.open is not None else None
    closed = _last(ids, delimiters.close, vocabulary)
    if closed is None or (opened is not None and opened > closed):
        return Phase.THINK
    return Phase.SOLVE


def _last(ids: list[int], marker: Marker, vocabulary: Sequence[bytes] | None) -> tuple[int, int, int] | None:
    """Where `marker` was last complete: (its last token's index, bytes of that token used, its length), or
    None.
    """
    if marker.text is None:
        wanted, n = list(marker.ids), len(marker.ids)
        at = next((i for i in range(len(ids) - n, -1, -1) if ids[i : i + n] == wanted), None)
        return None if at is None else (at + n - 1, 1 << 30, n)
    if vocabulary is None:
        raise DelimiterError(
            f"the delimiter {marker.text!r} is a text: start_phase needs the vocabulary's bytes"
        )
    data = marker.text.encode("utf-8")
    tokens = [vocabulary[i] if 0 <= i < len(vocabulary) else b"" for i in ids]
    at = b"".join(tokens).rfind(data)
    if at < 0:
        return None
    left = at + len(data)
    for index, token in enumerate(tokens):
        if left <= len(token):
            return index, left, len(data)
        left -= len(token)
    raise AssertionError("a match ends inside the text it was found in")
