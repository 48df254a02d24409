"""Programs compiled to the budget machine's tables (`elastic_decode.kernels.budget.layout`).

The patterns of a program become one automaton over token classes, with a table of what to force from each of
its states. Budgets live in the program's row only: requests that differ in nothing else share their
automaton.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from elastic_decode.automata.bounds import most_tokens, settle
from elastic_decode.automata.matchers import Automaton, Matcher, combine, make_matcher
from elastic_decode.core import Phase
from elastic_decode.delimiters import Delimiters, Marker
from elastic_decode.errors import BudgetError
from elastic_decode.kernels.budget.layout import (
    AUTOMATON_WORDS,
    EVENT_WORDS,
    EVENTS,
    PHASE_WORDS,
    PROGRAM_WORDS,
    AutomatonWord,
    EventWord,
    Finish,
    Header,
    Label,
    PhaseWord,
)
from elastic_decode.phases import Event, Inject, Pattern, PhaseProgram, Printed, Text, pattern_of
from elastic_decode.vocabulary import Vocabulary

__all__ = ["CompiledProgram", "compile"]

MAX_PATTERNS = 31  # bits of a match word
_LONGEST_TAIL = 256  # tokens of a prompt that may be part of a delimiter


@dataclass(frozen=True)
class Tables:
    """An automaton, packed. `longest[i]`: the most tokens that inject i can force."""

    words: torch.Tensor  # int32 [any], offsets relative to its start
    key: str
    longest: tuple[int, ...]
    automaton: Automaton = field(repr=False)


@dataclass(frozen=True)
class CompiledProgram:
    """A program ready for a slot.

    program_row: int32 [PROGRAM_WORDS], Header.AUTOMATON still 0: the offset at which `automaton` is placed
    goes there. automaton: int32, shared by every program with the same `key`: read it, do not write it.
    start: phase index a label. max_new: the tokens that fit behind the prompt, or None where compile was not
    told.
    """

    program_row: torch.Tensor
    automaton: torch.Tensor
    key: str
    start: Mapping[Label, int]
    program: PhaseProgram
    max_new: int | None
    start_label: Label
    _most: int | None
    _tables: Tables = field(repr=False)

    def bound(self) -> int | None:
        """The most tokens, sampled and forced, an output can have, at most max_new; None = no limit."""
        return self._most

    def start_state(self, prompt_ids: Sequence[int]) -> int:
        """The automaton's state with which an output begins behind this prompt.

        Not 0 where the prompt has begun a close (gpt-oss's generation prompt is the first part of it) or ends
        in what `unless_after` asks for: what is forced then goes on from there.
        """
        return self.walk(prompt_ids[-_LONGEST_TAIL:])

    def walk(self, token_ids: Iterable[int], state: int = 0) -> int:
        """The automaton's state after these sampled tokens: where a fork resumes, or how a prompt's tail
        leaves it.
        """
        automaton = self._tables.automaton
        for i in token_ids:
            state = int(automaton.next[state, automaton.class_of[i]])
        return state


def compile(
    program: PhaseProgram,
    delimiters: Delimiters,
    vocabulary: Sequence[bytes] | None,
    vocab_size: int,
    *,
    max_new: int | None = None,
    start: Phase | Label = Label.THINK,
    ignore_eos: bool = False,
) -> CompiledProgram:
    """Compiles a program for a model with logits of `vocab_size` tokens.

    vocabulary: what `vocabulary_bytes` gave (any sequence of bytes will do, but only that one spells text as
    the tokenizer would, and only over it are automata cached); None where the program holds no text. max_new:
    tokens that fit behind the prompt (max_model_len minus its length); needed to settle an open thinking
    budget. start: where the output begins. Raises BudgetError where the program can never fit, where a text
    cannot be spelled, or where a limit of the tables is passed.
    """
    start = _label(start)
    eos_ids = delimiters.eos_ids
    if max(eos_ids) >= vocab_size:
        raise BudgetError(
            f"EOS id {max(eos_ids)} is not a token of the model, which has ids 0 … {vocab_size - 1}"
        )
    events = program.events()
    injects = tuple(dict.fromkeys(event.inject for event in events if event.inject is not None))
    patterns = tuple(dict.fromkeys(pattern for phase in program.phases for pattern, _ in phase.ends))
    texts = any(isinstance(pattern, Printed) for pattern in patterns) or any(map(_holds_text, injects))
    known: Vocabulary | None = None
    if texts:
        if vocabulary is None:
            raise BudgetError(f"{program.name} holds text: compile needs the vocabulary's bytes")
        known = vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary(vocabulary)
    tables = _tables(patterns, injects, eos_ids, vocab_size, known)

    longest = dict(zip(injects, tables.longest, strict=True))
    lengths = {event: longest[event.inject] if event.inject is not None else 0 for event in events}
    first = program.start_think if start == Label.THINK else program.start_solve
    if max_new is None:
        most = most_tokens(program, first, lengths)
    else:
        program, most = settle(program, first, lengths, max_new)

    names = [phase.name for phase in program.phases]
    return CompiledProgram(
        program_row=_program_row(program, patterns, injects, ignore_eos),
        automaton=tables.words,
        key=tables.key,
        start={Label.THINK: names.index(program.start_think), Label.SOLVE: names.index(program.start_solve)},
        program=program,
        max_new=max_new,
        start_label=start,
        _most=most,
        _tables=tables,
    )


def _label(start: Phase | Label) -> Label:
    if isinstance(start, Phase):
        return Label.THINK if start is Phase.THINK else Label.SOLVE
    return Label(start)


def _holds_text(inject: Inject) -> bool:
    by_text = inject.close is not None and inject.close.text is not None
    return by_text or (isinstance(inject.before, str) and bool(inject.before)) or bool(inject.unless_after)


def _program_row(
    program: PhaseProgram, patterns: Sequence[Pattern], injects: Sequence[Inject], ignore_eos: bool
) -> torch.Tensor:
    row = np.zeros(PROGRAM_WORDS, np.int32)
    events = program.events()
    event_number = {event: i for i, event in enumerate(events)}
    phase_number = {phase.name: i for i, phase in enumerate(program.phases)}

    def number(event: Event | None) -> int:
        return -1 if event is None else event_number[event]

    row[Header.NUM_PHASES] = len(program.phases)
    row[Header.IGNORE_EOS] = ignore_eos
    for i, phase in enumerate(program.phases):
        words = row[Header.PHASES + i * PHASE_WORDS :][:PHASE_WORDS]
        words[PhaseWord.LABEL] = phase.label
        words[PhaseWord.BUDGET] = -1 if phase.budget is None else phase.budget
        words[PhaseWord.CARRY] = phase.carry
        words[PhaseWord.ON_EXPIRE] = number(phase.on_expire)
        words[PhaseWord.ON_EOS] = number(phase.on_eos)
        words[PhaseWord.ENDS :] = -1
        for at, (pattern, event) in enumerate(phase.ends):
            words[PhaseWord.ENDS + 2 * at :][:2] = patterns.index(pattern), number(event)
    for i, event in enumerate(events):
        words = row[EVENTS + i * EVENT_WORDS :][:EVENT_WORDS]
        words[EventWord.INJECT] = -1 if event.inject is None else injects.index(event.inject)
        words[EventWord.NEXT] = -event.next if isinstance(event.next, Finish) else phase_number[event.next]
        words[EventWord.REPLACE] = event.replace
        words[EventWord.MAX_COUNT] = -1 if event.max_count is None else event.max_count
        words[EventWord.FALLBACK] = number(event.fallback)
        words[EventWord.THINK_END] = -1 if event.think_end is None else event.think_end
    return torch.from_numpy(row)


@lru_cache(maxsize=32)
def _tables(
    patterns: tuple[Pattern, ...],
    injects: tuple[Inject, ...],
    eos_ids: tuple[int, ...],
    vocab_size: int,
    vocabulary: Vocabulary | None,
) -> Tables:
    """The automaton of these patterns, and what each injection forces from each of its states."""
    if len(patterns) > MAX_PATTERNS:
        raise BudgetError(f"a program has {len(patterns)} patterns, at most {MAX_PATTERNS} fit")
    # Closes that are forced are followed whether or not they end a phase; so is what `unless_after` asks for.
    closes = [pattern_of(inject.close) for inject in injects if inject.close is not None]
    followed = list(dict.fromkeys([*patterns, *closes]))
    behind = list(dict.fromkeys(inject.unless_after for inject in injects if inject.unless_after))
    matchers: list[Matcher] = [make_matcher(pattern, vocabulary, vocab_size) for pattern in followed]
    matchers += [make_matcher(Printed(text), vocabulary, vocab_size, stay=True) for text in behind]
    automaton = combine(matchers, len(patterns), eos_ids, vocab_size)

    def forced(inject: Inject, state: tuple[int, ...]) -> tuple[int, ...]:
        ids = _spell(inject.before, vocabulary)
        if inject.unless_after:
            at = len(followed) + behind.index(inject.unless_after)
            if matchers[at].progress(state[at]) == len(inject.unless_after.encode("utf-8")):
                ids = ()
        if inject.close is None:
            return ids
        at = followed.index(pattern_of(inject.close))
        written = matchers[at].progress(state[at])
        rest = _rest(inject.close, written, vocabulary)
        return rest if written else (*ids, *rest)

    chosen = [[forced(inject, state) for state in automaton.states] for inject in injects]
    for ids in {ids for row in chosen for ids in row}:
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise BudgetError(f"token id {max(ids)} is to be forced, the model has ids 0 … {vocab_size - 1}")
    words = _pack(automaton, chosen, vocab_size)
    return Tables(
        words=torch.from_numpy(words),
        key=hashlib.sha256(words.tobytes()).hexdigest(),
        longest=tuple(max(map(len, row)) for row in chosen),
        automaton=automaton,
    )


def _spell(text: Text, vocabulary: Vocabulary | None) -> tuple[int, ...]:
    if not isinstance(text, str):
        return text
    if not text:
        return ()
    assert vocabulary is not None  # compile has asked for it
    data = text.encode("utf-8")
    # A vocabulary of words has them with the space that goes before: then the text comes with one, too.
    ids = vocabulary.spell(data) or vocabulary.spell(b" " + data)
    if ids is None:
        raise BudgetError(f"the vocabulary cannot spell {text!r}; pass token ids instead")
    return ids


def _rest(close: Marker, written: int, vocabulary: Vocabulary | None) -> tuple[int, ...]:
    """What is missing of a close of which `written` ids (bytes, for a text) are there."""
    if close.text is None:
        return close.ids[written:]
    assert vocabulary is not None
    data = close.text.encode("utf-8")
    if not written:
        if vocabulary.join(close.ids) != data:
            raise BudgetError(
                f"the close {close.text!r} has ids {list(close.ids)}, but they print "
                f"{vocabulary.join(close.ids)!r}"
            )
        return close.ids
    ids = vocabulary.spell(data[written:])
    if ids is None:
        raise BudgetError(
            f"the vocabulary cannot spell {data[written:]!r}, the rest of a half-written {close.text!r}"
        )
    return ids


def _pack(automaton: Automaton, chosen: Sequence[Sequence[tuple[int, ...]]], vocab_size: int) -> np.ndarray:
    header = np.zeros(AUTOMATON_WORDS, np.int32)
    num_states, num_classes = automaton.next.shape
    header[AutomatonWord.NUM_STATES] = num_states
    header[AutomatonWord.NUM_CLASSES] = num_classes
    header[AutomatonWord.NUM_INJECTS] = len(chosen)
    header[AutomatonWord.VOCAB_SIZE] = vocab_size
    parts, size = [header], AUTOMATON_WORDS
    sections = {
        AutomatonWord.CLASS_OF: automaton.class_of,
        AutomatonWord.NEXT: automaton.next,
        AutomatonWord.MATCH: automaton.match,
        AutomatonWord.EOS: automaton.eos,
    }
    for word, section in sections.items():
        header[word] = size
        parts.append(section.reshape(-1))
        size += section.size
    header[AutomatonWord.INJECT] = size
    size += 2 * len(chosen) * num_states
    spans: list[int] = []
    tokens: list[int] = []
    at: dict[tuple[int, ...], int] = {}
    for row in chosen:
        for ids in row:
            if ids not in at:
                at[ids] = size + len(tokens)
                tokens += ids
            spans += [at[ids], len(ids)]
    return np.concatenate([*parts, np.array(spans, np.int32), np.array(tokens, np.int32)]).astype(np.int32)
