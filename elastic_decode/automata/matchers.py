"""Matchers: one pattern each, read token by token; and the one automaton over token classes that runs them
all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from elastic_decode.errors import BudgetError
from elastic_decode.phases import IdSequence, Pattern
from elastic_decode.vocabulary import Vocabulary

MAX_CELLS = 1 << 22  # states x classes of one automaton: 16 MiB a table


class Matcher(Protocol):
    """A state is an int, 0 where nothing is written yet. Tokens of one kind act alike in every state."""

    kind_of: np.ndarray  # int64 [vocab_size]: the kind of every token

    def step(self, state: int, kind: int) -> tuple[int, bool]:
        """The state after a token of this kind, and whether the token completes the pattern."""

    def progress(self, state: int) -> int:
        """How much of the pattern is written: tokens of an id sequence, bytes of a text."""


class IdMatcher:
    """An id sequence. Bit i of a state: the last i + 1 tokens may be the sequence's first i + 1."""

    def __init__(self, pattern: IdSequence, vocab_size: int) -> None:
        steps = pattern.steps
        worst = max(max(step) for step in steps)
        if worst >= vocab_size or min(min(step) for step in steps) < 0:
            raise BudgetError(f"a pattern has token id {worst}, the model has ids 0 … {vocab_size - 1}")
        fits: dict[int, int] = {}
        for at, step in enumerate(steps):
            for i in step:
                fits[i] = fits.get(i, 0) | 1 << at
        self._kinds = [0, *dict.fromkeys(fits.values())]
        number = {mask: kind for kind, mask in enumerate(self._kinds)}
        self.kind_of = np.zeros(vocab_size, np.int64)
        for i, mask in fits.items():
            self.kind_of[i] = number[mask]
        self._last = 1 << len(steps) - 1

    def step(self, state: int, kind: int) -> tuple[int, bool]:
        reached = (state << 1 | 1) & self._kinds[kind]
        return reached & ~self._last, bool(reached & self._last)

    def progress(self, state: int) -> int:
        return state.bit_length()


class TextMatcher:
    """A text in the tokens' bytes, by Knuth, Morris and Pratt. A state is how many of its bytes are written.

    Every token is run through the text once for every state; only those that hold, continue or begin it are
    looked at. stay: the state of a text that was just completed is kept, to ask whether the output stands
    behind it.
    """

    def __init__(self, text: str, vocabulary: Vocabulary, vocab_size: int, *, stay: bool = False) -> None:
        data = text.encode("utf-8")
        n = len(data)
        follow, border = _transitions(data)
        states = n + 1 if stay else n

        def run(state: int, token: bytes) -> tuple[int, bool]:
            done = False
            for byte in token:
                state = follow[state][byte]
                done = done or state == n
            return (border if state == n and not stay else state), done

        begins, continues = tuple(data[:i] for i in range(1, n + 1)), tuple(data[i:] for i in range(n))
        nothing = ((0, False),) * states
        number: dict[tuple[tuple[int, bool], ...], int] = {nothing: 0}
        seen: dict[bytes, int] = {}
        self.kind_of = np.zeros(vocab_size, np.int64)
        printed = vocabulary.tokens[:vocab_size]
        printed += (b"",) * (vocab_size - len(printed))  # ids that the tokenizer does not use
        for i, token in enumerate(printed):
            # The tests of one byte are cheaper than the exact ones behind them, and rule most tokens out.
            touches = (
                data in token
                or (token[-1:] in data and token.endswith(begins))
                or (token[:1] in data and (token.startswith(continues) or token in data))
            )
            if touches:
                if token not in seen:
                    moves = tuple(run(state, token) for state in range(states))
                    seen[token] = number.setdefault(moves, len(number))
                self.kind_of[i] = seen[token]
        self._kinds = list(number)

    def step(self, state: int, kind: int) -> tuple[int, bool]:
        return self._kinds[kind][state]

    def progress(self, state: int) -> int:
        return state


def _transitions(data: bytes) -> tuple[list[list[int]], int]:
    """The text's KMP automaton, next state [len + 1][256], and the longest border of the whole text."""
    table: list[list[int]] = []
    border = 0
    for state, byte in enumerate([*data, None]):
        row = list(table[border]) if state else [0] * 256
        if byte is not None:
            border, row[byte] = (row[byte] if state else 0), state + 1
        table.append(row)
    return table, border


@dataclass(frozen=True)
class Automaton:
    """All matchers as one DFA. State 0: nothing is written."""

    class_of: np.ndarray  # int32 [vocab_size]
    next: np.ndarray  # int32 [num_states, num_classes]
    match: np.ndarray  # int32 [num_states, num_classes]: bit p: pattern p is completed
    eos: np.ndarray  # int32 [num_classes]
    states: list[tuple[int, ...]]  # each matcher's state


@lru_cache(maxsize=32)
def make_matcher(
    pattern: Pattern, vocabulary: Vocabulary | None, vocab_size: int, *, stay: bool = False
) -> Matcher:
    if isinstance(pattern, IdSequence):
        return IdMatcher(pattern, vocab_size)
    if vocabulary is None:
        raise BudgetError(f"the text pattern {pattern.text!r} needs the vocabulary's bytes")
    return TextMatcher(pattern.text, vocabulary, vocab_size, stay=stay)


def combine(
    matchers: Sequence[Matcher], num_patterns: int, eos_ids: Sequence[int], vocab_size: int
) -> Automaton:
    """The product of the matchers over the states that can be reached; only the first `num_patterns` set
    match bits.
    """
    ends = np.zeros(vocab_size, np.int64)
    ends[list(eos_ids)] = 1
    class_of, first = ends, np.zeros(0, np.int64)
    for column in [ends, *(matcher.kind_of for matcher in matchers)]:
        mixed = class_of * (int(column.max(initial=0)) + 1) + column
        _, first, class_of = np.unique(mixed, return_index=True, return_inverse=True)
    # One row a class: the kind each matcher sees in it, told by its first token.
    kinds = [[int(matcher.kind_of[token]) for matcher in matchers] for token in first]

    start = (0,) * len(matchers)
    number, states = {start: 0}, [start]
    follow: list[list[int]] = []
    match: list[list[int]] = []
    for state in states:  # grows while it is walked
        if len(states) * len(kinds) > MAX_CELLS:
            raise BudgetError(
                f"this policy's delimiters and texts need an automaton of at least {len(states)} states by "
                f"{len(kinds)} token classes; use shorter ones"
            )
        follow.append([])
        match.append([])
        for row in kinds:
            moves = [matcher.step(s, kind) for matcher, s, kind in zip(matchers, state, row, strict=True)]
            after = tuple(move[0] for move in moves)
            if after not in number:
                number[after] = len(states)
                states.append(after)
            follow[-1].append(number[after])
            match[-1].append(sum(1 << p for p in range(num_patterns) if moves[p][1]))
    return Automaton(
        class_of=class_of.astype(np.int32),
        next=np.array(follow, np.int32),
        match=np.array(match, np.int32),
        eos=ends[first].astype(np.int32),
        states=states,
    )
