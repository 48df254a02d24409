"""The budget machine in plain Python: the definition that every other backend is compared with.

A row's state is read into a list of ints, stepped and written back; tensors of a GPU are copied to the host
and back.
"""

from collections.abc import Sequence

import numpy as np
import torch

from .layout import (
    EVENT_WORDS,
    EVENTS,
    MAX_ENDS,
    MAX_EVENTS,
    MAX_PHASES,
    PHASE_WORDS,
    STATE_WORDS,
    AutomatonWord,
    EventWord,
    Finish,
    Flag,
    Header,
    Label,
    PhaseWord,
    State,
)

NONE = -1  # no event, no token


class Machine:
    """One row: `state` is changed in place, `program` and `automata` are read."""

    def __init__(self, state: list[int], program: Sequence[int], automata: Sequence[int]) -> None:
        self.state = state
        self.program = program
        self.automata = automata
        self.base = program[Header.AUTOMATON]

    # Reading the tables.

    def phase(self, word: int) -> int:
        return self.program[Header.PHASES + self.state[State.PHASE] * PHASE_WORDS + word]

    def event(self, event: int, word: EventWord) -> int:
        return self.program[EVENTS + event * EVENT_WORDS + word]

    def automaton(self, word: AutomatonWord) -> int:
        return self.automata[self.base + word]

    def table(self, word: AutomatonWord, index: int) -> int:
        return self.automata[self.base + self.automaton(word) + index]

    def cell(self, token_class: int) -> int:
        return self.state[State.DFA] * self.automaton(AutomatonWord.NUM_CLASSES) + token_class

    def sampling(self) -> bool:
        """The row runs and no forced token is pending: the next token is a draw."""
        return self.state[State.FINISH] == Finish.RUNNING and self.state[State.FORCED_LEFT] == 0

    # Events.

    def event_of(self, token_class: int) -> tuple[int, bool]:
        """The event that a sampled token of this class triggers here, and if by EOS. An end beats EOS."""
        match = self.table(AutomatonWord.MATCH, self.cell(token_class))
        for end in range(MAX_ENDS):
            pattern = self.phase(PhaseWord.ENDS + 2 * end)
            if 0 <= pattern < 32 and match >> pattern & 1:
                return self.phase(PhaseWord.ENDS + 2 * end + 1), False
        if self.table(AutomatonWord.EOS, token_class) and not self.program[Header.IGNORE_EOS]:
            return self.phase(PhaseWord.ON_EOS), True
        return NONE, False

    def resolve(self, event: int) -> int:
        """The event to use in place of one that is spent; NONE where the fallbacks run out."""
        for _ in range(MAX_EVENTS):
            if not 0 <= event < MAX_EVENTS:
                return NONE
            most = self.event(event, EventWord.MAX_COUNT)
            if most < 0 or self.state[State.EVENT_COUNTS + event] < most:
                return event
            event = self.event(event, EventWord.FALLBACK)
        return NONE

    def begin(self, event: int) -> bool:
        """Counts the event and forces its tokens. True where it forces none: the row moves on at once."""
        self.state[State.EVENT_COUNTS + event] += 1
        if self.event(event, EventWord.THINK_END) >= 0:
            self.state[State.THINK_END] = self.event(event, EventWord.THINK_END)
        inject = self.event(event, EventWord.INJECT)
        if inject < 0:
            return True
        entry = 2 * (inject * self.automaton(AutomatonWord.NUM_STATES) + self.state[State.DFA])
        offset, length = (self.table(AutomatonWord.INJECT, entry + i) for i in range(2))
        if length <= 0:
            return True
        self.state[State.FORCED_AT] = self.base + offset
        self.state[State.FORCED_LEFT] = length
        self.state[State.FORCED_NEXT] = self.event(event, EventWord.NEXT)
        return False

    def fire(self, event: int, by_draw: bool) -> None:
        """Fires a resolved event. An expiry keeps the DFA, so a half-written close survives."""
        if self.begin(event):
            if by_draw:
                self.state[State.DFA] = 0
            self.go(self.event(event, EventWord.NEXT))

    def go(self, following: int) -> None:
        """Moves to a phase (or finishes, where negative), then expires it while it has no budget left."""
        state = self.state
        for fired in range(MAX_PHASES + 1):
            if following < 0:
                state[State.FINISH] = -following
                return
            if following != state[State.PHASE]:
                if following >= MAX_PHASES:
                    break
                self.enter(following)
            if state[State.LEFT] < 0 or state[State.USED] < state[State.LEFT]:
                return
            event = self.resolve(self.phase(PhaseWord.ON_EXPIRE))
            if event == NONE:
                return
            if fired == MAX_PHASES:  # a chain longer than there are phases goes in a circle
                break
            if not self.begin(event):
                return
            following = self.event(event, EventWord.NEXT)
        state[State.FINISH] = Finish.INVALID

    def enter(self, following: int) -> None:
        state = self.state
        left, used = state[State.LEFT], state[State.USED]
        state[State.PHASE] = following
        state[State.USED] = 0
        budget = self.phase(PhaseWord.BUDGET)
        if budget >= 0 and self.phase(PhaseWord.CARRY):
            budget = -1 if left < 0 else budget + max(0, left - used)
        state[State.LEFT] = max(budget, -1)

    # The two things a row does.

    def enter_start(self, start: int) -> None:
        for word in range(STATE_WORDS):
            if word not in (State.TOKEN, State.POSITION, State.LIMIT, State.DFA):
                self.state[word] = 0
        if not 0 <= start < MAX_PHASES:
            self.state[State.FINISH] = Finish.INVALID
            return
        self.state[State.PHASE] = start
        self.state[State.LEFT] = max(self.phase(PhaseWord.BUDGET), -1)
        self.go(start)

    def step(self, draw: int) -> tuple[int, int]:
        """One decode step with the token drawn; returns the token emitted or NONE and its flags."""
        state = self.state
        if state[State.FINISH] != Finish.RUNNING:
            return NONE, 0

        # A request to end the thinking waits while tokens are being forced; in SOLVE it is ignored.
        thinking = self.phase(PhaseWord.LABEL) == Label.THINK
        if state[State.END_REQUESTED] and not (thinking and state[State.FORCED_LEFT] > 0):
            state[State.END_REQUESTED] = 0
            event = self.resolve(self.phase(PhaseWord.ON_EXPIRE)) if thinking else NONE
            if event != NONE:
                self.fire(event, by_draw=False)

        event, by_eos, token_class = NONE, False, 0
        if self.sampling():
            if not 0 <= draw < self.automaton(AutomatonWord.VOCAB_SIZE):
                state[State.FINISH] = Finish.INVALID
            else:
                token_class = self.table(AutomatonWord.CLASS_OF, draw)
                event, by_eos = self.event_of(token_class)
                event = self.resolve(event)
                if event != NONE and self.event(event, EventWord.REPLACE):
                    self.fire(event, by_draw=True)  # the DFA is as it was before the draw
                    if self.sampling():  # nothing to emit in the draw's place: a malformed program
                        state[State.FINISH] = Finish.INVALID
        if state[State.FINISH] != Finish.RUNNING:
            return NONE, self.flags(0)

        entry = int(Flag.VALID)
        if self.phase(PhaseWord.LABEL) == Label.SOLVE:
            entry |= Flag.SOLVE
        if state[State.FORCED_LEFT] > 0:
            entry |= Flag.FORCED
            token = self.automata[state[State.FORCED_AT]]
            state[State.FORCED_AT] += 1
            state[State.FORCED_LEFT] -= 1
            if state[State.FORCED_LEFT] == 0:
                state[State.DFA] = 0
                self.go(state[State.FORCED_NEXT])
        else:
            token = draw
            state[State.USED] += 1
            state[State.DFA] = self.table(AutomatonWord.NEXT, self.cell(token_class))
            if event != NONE:
                self.fire(event, by_draw=True)
                if by_eos and state[State.FINISH] == Finish.EOS:
                    entry |= Flag.SOLVE  # EOS as an end belongs to the solution, also when thinking
            else:
                self.go(state[State.PHASE])  # expires it where this token was the last of its budget

        state[State.TOKEN] = token
        state[State.POSITION] += 1
        if state[State.FINISH] == Finish.RUNNING and state[State.POSITION] + 1 >= state[State.LIMIT]:
            state[State.FINISH] = Finish.LENGTH
        return token, self.flags(entry)

    def flags(self, entry: int) -> int:
        finish, think_end = self.state[State.FINISH], self.state[State.THINK_END]
        return entry | finish << Flag.FINISH_SHIFT | think_end << Flag.THINK_END_SHIFT


def budget_step(
    state: torch.Tensor,
    programs: torch.Tensor,
    automata: torch.Tensor,
    slots: torch.Tensor,
    token: torch.Tensor,
    logits: torch.Tensor,
    lse: torch.Tensor,
    sampling_logprob: torch.Tensor,
    temperature: torch.Tensor,
    ring_tokens: torch.Tensor,
    ring_flags: torch.Tensor,
    ring_logprobs: torch.Tensor,
    ring_sampling_logprobs: torch.Tensor,
    ring_index: torch.Tensor,
) -> None:
    at = int(ring_index[0]) % ring_tokens.shape[0]
    changed = (state, ring_tokens, ring_flags, ring_logprobs, ring_sampling_logprobs)
    on_host = [each.cpu() for each in changed]
    all_states = on_host[0].numpy()
    tokens, flags, logprobs, sampling_logprobs = (each.numpy()[at] for each in on_host[1:])
    all_programs, pool = programs.cpu().numpy(), automata.cpu().numpy().data
    scores, norms, scale = (each.cpu().numpy() for each in (logits, lse, temperature))
    draw_logprobs = sampling_logprob.cpu().numpy()
    for row, (slot, draw) in enumerate(zip(slots.tolist(), token.tolist(), strict=True)):
        if slot < 0:
            flags[row] = 0
            continue
        words = all_states[slot].tolist()
        emitted, flags[row] = Machine(words, all_programs[slot].data, pool).step(draw)
        all_states[slot] = words
        if flags[row] & Flag.VALID:
            tokens[row] = emitted
            logprobs[row] = -np.inf
            if 0 <= emitted < logits.shape[1]:
                divisor = scale[slot] if scale[slot] > 0 else np.float32(1)
                with np.errstate(invalid="ignore"):  # NaN where all logits are -inf
                    logprobs[row] = scores[row, emitted] / divisor - norms[row]
            forced = flags[row] & Flag.FORCED
            sampling_logprobs[row] = 0 if forced else draw_logprobs[row]
    for target, source in zip(changed, on_host, strict=True):
        target.copy_(source)


def decode_inputs(
    state: torch.Tensor,
    page_table: torch.Tensor,
    slots: torch.Tensor,
    page_size: int,
    token: torch.Tensor,
    position: torch.Tensor,
    seq_len: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    for row, slot in enumerate(slots.tolist()):
        token[row], position[row], seq_len[row], slot_mapping[row] = 0, 0, 0, -1
        if slot < 0 or state[slot, State.FINISH] != Finish.RUNNING:
            continue
        at = int(state[slot, State.POSITION])
        token[row], position[row], seq_len[row] = state[slot, State.TOKEN], at, at + 1
        if 0 <= at < page_table.shape[1] * page_size and page_table[slot, at // page_size] >= 0:
            slot_mapping[row] = page_table[slot, at // page_size] * page_size + at % page_size


def enter_start(
    state_row: torch.Tensor, program_row: torch.Tensor, automata: torch.Tensor, phase: int
) -> None:
    words = state_row.tolist()
    Machine(words, program_row.tolist(), automata.numpy().data).enter_start(phase)
    state_row.numpy()[:] = words
