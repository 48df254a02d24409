"""The words of the budget machine's tables: what the host writes and every backend reads.

csrc/budget.h numbers them alike (a test compares).

Three int32 tables:
- `state [num_slots, STATE_WORDS]`: a row a slot, columns `State`; the last MAX_EVENTS columns count how often
  each event fired.
- `programs [num_slots, PROGRAM_WORDS]`: a compiled PhaseProgram a slot: `Header`, then MAX_PHASES phases of
  `PhaseWord`, then MAX_EVENTS events of `EventWord`.
- `automata [any]`: one flat pool. A program's `Header.AUTOMATON` is the offset of its automaton:
  `AutomatonWord`s, whose offsets are relative to that one, then
    class_of  [vocab_size]                          token id -> token class
    next      [num_states, num_classes]             DFA over token classes
    match     [num_states, num_classes]             bit p set: the token completes pattern p
    eos       [num_classes]                         1 where the class holds EOS ids
    inject    [num_injects, num_states, 2]          (offset, length) of the tokens to force, given where the
                                                    DFA stands: a half-written delimiter is completed,
                                                    not restarted. This offset, too, is relative
  followed by the forced tokens themselves.
"""

from enum import IntEnum

MAX_PHASES = 8
MAX_EVENTS = 24
MAX_ENDS = 4


class State(IntEnum):
    FINISH = 0  # a Finish code; anything but RUNNING makes the row idle
    TOKEN = 1  # the last token of the sequence: the next step's input
    POSITION = 2  # its position, counted from the start of the prompt
    LIMIT = 3  # positions the sequence may have (max_model_len)
    PHASE = 4  # index of the phase in the program
    USED = 5  # tokens sampled in the phase
    LEFT = 6  # the phase's budget, what it carried over included; -1 = none
    DFA = 7
    FORCED_AT = 8  # absolute offset in `automata` of the next token to force
    FORCED_LEFT = 9  # how many are still to be forced
    FORCED_NEXT = 10  # afterwards: phase index, or -Finish
    END_REQUESTED = 11  # end_thinking: expire the THINK phase before the next draw
    THINK_END = 12  # a ThinkEnd code
    EVENT_COUNTS = 16


STATE_WORDS = int(State.EVENT_COUNTS) + MAX_EVENTS


class Header(IntEnum):
    AUTOMATON = 0
    NUM_PHASES = 1
    IGNORE_EOS = 2
    PHASES = 8


class PhaseWord(IntEnum):
    LABEL = 0  # a Label
    BUDGET = 1  # sampled tokens, -1 = none
    CARRY = 2  # 1: add what the previous phase left
    ON_EXPIRE = 3  # event index, -1 = none
    ON_EOS = 4  # event index, -1 = EOS is an ordinary token
    ENDS = 8  # MAX_ENDS pairs (pattern index or -1, event index); the first that matches wins


PHASE_WORDS = int(PhaseWord.ENDS) + 2 * MAX_ENDS


class EventWord(IntEnum):
    INJECT = 0  # inject index, -1 = none
    NEXT = 1  # phase index, or -Finish; the current phase's own index keeps its count running
    REPLACE = 2  # 1: the triggering draw is no token
    MAX_COUNT = 3  # -1 = any number of times
    FALLBACK = 4  # the event to use once MAX_COUNT is spent; -1: none, an ordinary token
    THINK_END = 5  # ThinkEnd to record, -1 = leave


EVENT_WORDS = 8
EVENTS = int(Header.PHASES) + MAX_PHASES * PHASE_WORDS
PROGRAM_WORDS = EVENTS + MAX_EVENTS * EVENT_WORDS


class AutomatonWord(IntEnum):
    NUM_STATES = 0
    NUM_CLASSES = 1
    NUM_INJECTS = 2
    VOCAB_SIZE = 3
    CLASS_OF = 4
    NEXT = 5
    MATCH = 6
    EOS = 7
    INJECT = 8


AUTOMATON_WORDS = 16


class Label(IntEnum):
    THINK = 0
    SOLVE = 1


class Finish(IntEnum):
    RUNNING = 0
    EOS = 1
    BUDGET = 2
    LENGTH = 3
    INVALID = 4  # no candidate in the row's logits (all NaN or -inf), or a malformed program
    HOST = 5  # the host ended the row: stop string, abort


class ThinkEnd(IntEnum):
    NONE = 0
    NATURAL = 1
    FORCED = 2
    EOS = 3


class Flag(IntEnum):
    """Bits of a ring entry's `flags`; 0 = the row was idle and the entry holds nothing."""

    VALID = 1
    FORCED = 2
    SOLVE = 4  # the token's phase label; an EOS that ends the run is always SOLVE
    FINISH_SHIFT = 4  # bits 4-7: Finish after this token
    THINK_END_SHIFT = 8  # bits 8-9: ThinkEnd so far
