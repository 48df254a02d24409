"""Programs by hand and at random, for the tests of every backend and for the engine's check of a new device.

`automaton`, `event`, `phase` and `program` lay out the tables of layout.py; elastic_decode's compiler does
the same from a policy. `random_tables` makes programs that use every feature, some of them malformed in the
ways that the machine promises to survive, and `RandomTables.draws` makes streams full of ends and EOS for
them.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .layout import (
    AUTOMATON_WORDS,
    EVENT_WORDS,
    EVENTS,
    MAX_ENDS,
    MAX_EVENTS,
    MAX_PHASES,
    PHASE_WORDS,
    PROGRAM_WORDS,
    STATE_WORDS,
    AutomatonWord,
    EventWord,
    Finish,
    Header,
    Label,
    PhaseWord,
    State,
    ThinkEnd,
)


def automaton(
    class_of: Sequence[int],
    following: Sequence[Sequence[int]],
    match: Sequence[Sequence[int]],
    eos: Sequence[int],
    injects: Sequence[Sequence[Sequence[int]]],
) -> list[int]:
    """An automaton's words: `following` and `match` by [state][class], `injects[i][state]` a token list."""
    words = [0] * AUTOMATON_WORDS

    def append(word: AutomatonWord, values: Sequence[int]) -> None:
        words[word] = len(words)
        words.extend(values)

    words[AutomatonWord.NUM_STATES] = len(following)
    words[AutomatonWord.NUM_CLASSES] = len(eos)
    words[AutomatonWord.NUM_INJECTS] = len(injects)
    words[AutomatonWord.VOCAB_SIZE] = len(class_of)
    append(AutomatonWord.CLASS_OF, class_of)
    append(AutomatonWord.NEXT, [state for row in following for state in row])
    append(AutomatonWord.MATCH, [bits for row in match for bits in row])
    append(AutomatonWord.EOS, eos)
    spans: list[int] = []
    forced: list[int] = []
    start = len(words) + 2 * len(injects) * len(following)
    for tokens in (tokens for inject in injects for tokens in inject):
        spans += [start + len(forced), len(tokens)]
        forced += tokens
    append(AutomatonWord.INJECT, spans + forced)
    return words


def event(
    next: int,
    *,
    inject: int = -1,
    replace: bool = False,
    max_count: int = -1,
    fallback: int = -1,
    think_end: int = -1,
) -> list[int]:
    """The words of an event; `next` is a phase index or -Finish."""
    words = [0] * EVENT_WORDS
    words[EventWord.INJECT] = inject
    words[EventWord.NEXT] = next
    words[EventWord.REPLACE] = int(replace)
    words[EventWord.MAX_COUNT] = max_count
    words[EventWord.FALLBACK] = fallback
    words[EventWord.THINK_END] = think_end
    return words


def phase(
    label: Label,
    budget: int = -1,
    *,
    carry: bool = False,
    ends: Sequence[tuple[int, int]] = (),
    on_expire: int = -1,
    on_eos: int = -1,
) -> list[int]:
    """The words of a phase; `ends` are pairs (pattern, event)."""
    words = [0] * PHASE_WORDS
    words[PhaseWord.LABEL] = label
    words[PhaseWord.BUDGET] = budget
    words[PhaseWord.CARRY] = int(carry)
    words[PhaseWord.ON_EXPIRE] = on_expire
    words[PhaseWord.ON_EOS] = on_eos
    pairs = [*ends, *[(-1, -1)] * (MAX_ENDS - len(ends))]
    words[PhaseWord.ENDS :] = [word for pair in pairs for word in pair]
    return words


def program(
    at: int, phases: Sequence[list[int]], events: Sequence[list[int]], *, ignore_eos: bool = False
) -> list[int]:
    """The words of a program whose automaton lies at offset `at` of the pool."""
    words = [0] * PROGRAM_WORDS
    words[Header.AUTOMATON] = at
    words[Header.NUM_PHASES] = len(phases)
    words[Header.IGNORE_EOS] = int(ignore_eos)
    for tables, start, size in ((phases, int(Header.PHASES), PHASE_WORDS), (events, EVENTS, EVENT_WORDS)):
        for index, table in enumerate(tables):
            words[start + index * size : start + (index + 1) * size] = table
    return words


@dataclass(frozen=True)
class RandomAutomaton:
    """An automaton and what makes a token stream interesting for it."""

    words: list[int]
    num_patterns: int
    always_forces: list[int]  # injects that force something wherever the DFA stands
    eos_tokens: list[int]
    end_tokens: list[list[int]]  # by DFA state


def random_automaton(rng: random.Random) -> RandomAutomaton:
    vocab_size, num_classes, num_states = rng.randint(3, 24), rng.randint(1, 6), rng.randint(1, 5)
    num_patterns, num_injects = rng.randint(1, 4), rng.randint(1, 4)
    states, classes = range(num_states), range(num_classes)
    class_of = [rng.randrange(num_classes) for _ in range(vocab_size)]
    eos = [int(rng.random() < 0.2) for _ in classes]
    following = [[rng.randrange(num_states) for _ in classes] for _ in states]
    match = [[rng.getrandbits(num_patterns) if rng.random() < 0.25 else 0 for _ in classes] for _ in states]
    injects, always_forces = [], []
    for index in range(num_injects):
        # As a compiled delimiter: what is left of one sequence, given how much of it is written.
        tokens = [rng.randrange(vocab_size + 2) for _ in range(rng.randint(1, 4))]
        written = [rng.randint(0, len(tokens) - (index % 2 == 0)) for _ in states]
        injects.append([tokens[skip:] for skip in written])
        if max(written) < len(tokens):
            always_forces.append(index)
    return RandomAutomaton(
        words=automaton(class_of, following, match, eos, injects),
        num_patterns=num_patterns,
        always_forces=always_forces,
        eos_tokens=[token for token in range(vocab_size) if eos[class_of[token]]],
        end_tokens=[[t for t in range(vocab_size) if match[state][class_of[t]]] for state in states],
    )


def random_program(rng: random.Random, at: int, machine: RandomAutomaton) -> list[int]:
    """A program for the automaton at offset `at`; one in thirty is malformed in ways the machine survives."""
    malformed = rng.random() < 1 / 30
    num_phases = rng.choice((1, 2, 2, 3, 3, 4, MAX_PHASES))
    num_events = rng.choice((1, 2, 4, 6, MAX_EVENTS))
    num_injects = machine.words[AutomatonWord.NUM_INJECTS]

    def random_event(index: int) -> list[int]:
        replace = rng.random() < 0.3
        inject = rng.choice([-1, *range(num_injects)])
        if replace and not malformed:
            inject = rng.choice(machine.always_forces)
        following = rng.randrange(num_phases)
        if rng.random() < 0.25:
            following = -rng.choice((Finish.EOS, Finish.BUDGET))
        elif malformed and rng.random() < 0.2:
            following = MAX_PHASES
        return event(
            following,
            inject=inject,
            replace=replace,
            max_count=rng.choice((-1, -1, 0, 1, 2)),
            # Fallbacks lead to later events, so they end; malformed ones may lead in a circle.
            fallback=rng.choice([-1, *range(0 if malformed else index + 1, num_events)]),
            think_end=rng.choice((-1, ThinkEnd.NATURAL, ThinkEnd.FORCED, ThinkEnd.EOS)),
        )

    def random_phase() -> list[int]:
        def some_event() -> int:
            return rng.randrange(num_events) if rng.random() < 0.9 else -1

        patterns = rng.sample(range(machine.num_patterns), rng.randint(0, machine.num_patterns))
        return phase(
            rng.choice((Label.THINK, Label.SOLVE)),
            rng.choice((-1, 0, 1, 2, 3, 5, 8)),
            carry=rng.random() < 0.3,
            ends=[(pattern, some_event()) for pattern in patterns],
            on_expire=some_event(),
            on_eos=some_event(),
        )

    return program(
        at,
        [random_phase() for _ in range(num_phases)],
        [random_event(index) for index in range(num_events)],
        ignore_eos=rng.random() < 0.2,
    )


@dataclass(frozen=True)
class RandomTables:
    """Tables of `len(starts)` slots, on the CPU; `state` has TOKEN, POSITION, LIMIT and DFA: enter `starts`
    first."""

    state: torch.Tensor
    programs: torch.Tensor
    automata: torch.Tensor
    starts: list[int]
    machines: list[RandomAutomaton]

    def draws(self, rng: random.Random, state: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        """A draw a row, given where the rows stand in `state`: many ends and EOS, a few impossible ones."""
        out = []
        for slot, dfa in zip(slots, state[list(slots), State.DFA].tolist(), strict=True):
            machine = self.machines[slot]
            vocab_size = machine.words[AutomatonWord.VOCAB_SIZE]
            kind = rng.random()
            some = machine.end_tokens[dfa] if kind < 0.3 else machine.eos_tokens if kind < 0.4 else None
            if kind > 0.99:
                some = [-1, vocab_size, 2**31 - 1]
            out.append(rng.choice(some) if some else rng.randrange(vocab_size))
        return torch.tensor(out, dtype=torch.int32, device="cpu")


def random_tables(rng: random.Random, num_slots: int, num_automata: int = 6) -> RandomTables:
    pool, offsets = [-7] * rng.randint(0, 3), []
    automata = [random_automaton(rng) for _ in range(num_automata)]
    for each in automata:
        offsets.append(len(pool))
        pool += each.words
    state = torch.full((num_slots, STATE_WORDS), -99, dtype=torch.int32, device="cpu")
    programs, starts, machines = [], [], []
    for slot in range(num_slots):
        which = rng.randrange(num_automata)
        programs.append(random_program(rng, offsets[which], automata[which]))
        starts.append(rng.randrange(programs[-1][Header.NUM_PHASES]))
        machines.append(automata[which])
        position = rng.randrange(100)
        limit = position + rng.choice((2, 5, 1000, 1000, 1000))
        begun = rng.randrange(automata[which].words[AutomatonWord.NUM_STATES]) if rng.random() < 0.2 else 0
        kept = ((State.TOKEN, 1), (State.POSITION, position), (State.LIMIT, limit), (State.DFA, begun))
        for word, value in kept:
            state[slot, word] = value
    return RandomTables(
        state,
        torch.tensor(programs, dtype=torch.int32, device="cpu"),
        torch.tensor(pool, dtype=torch.int32, device="cpu"),
        starts,
        machines,
    )
