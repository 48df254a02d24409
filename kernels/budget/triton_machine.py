"""The budget machine's step in Triton, for the kernels that contain it: a row a lane, ROWS rows a program.

Lanes do not branch by themselves: each part of the step is done for the rows it concerns, by mask, and left
out where it concerns none. Events are rare, so an ordinary step is a few dozen loads, nearly all of them in
`load_rows`, which a kernel can begin long before it knows the draw; after the draw come two more that wait
for one another: the token's class, then its cell of the automaton. The order is that of csrc/budget.h.

With one row a program, every thread of it holds the row, and one of them stores. Event counts are the only
words that are stored and read again within a step, so SHARED puts barriers around those.
"""

import triton
import triton.language as tl

from . import layout


@triton.jit
def _any(mask):
    return tl.max(mask.to(tl.int32), axis=0) > 0


@triton.jit
def _phase_word(program, phase, word, mask):
    return tl.load(program + layout.Header.PHASES + phase * layout.PHASE_WORDS + word, mask=mask, other=-1)


@triton.jit
def _event_word(program, event, word, mask):
    return tl.load(program + layout.EVENTS + event * layout.EVENT_WORDS + word, mask=mask, other=-1)


@triton.jit
def _resolve(event, program, counts, ROWS: tl.constexpr):
    """The event to use in place of one that is spent; -1 where the fallbacks run out."""
    searching = (event >= 0) & (event < layout.MAX_EVENTS)
    event = tl.where(searching, event, -1)
    hops = tl.zeros([ROWS], tl.int32)
    while _any(searching):
        most = _event_word(program, event, layout.EventWord.MAX_COUNT, searching)
        limited = searching & (most >= 0)
        spent = limited & (tl.load(counts + event, mask=limited, other=-1) >= most)
        fallback = _event_word(program, event, layout.EventWord.FALLBACK, spent)
        hops += 1
        searching = spent & (fallback >= 0) & (fallback < layout.MAX_EVENTS) & (hops < layout.MAX_EVENTS)
        event = tl.where(searching, fallback, tl.where(spent, -1, event))
    return event


@triton.jit
def _settle(
    event, firing, by_draw, target, going,
    program, counts, automata, automaton,
    finish, phase, label, used, budget, dfa, think_end, at, left, following,
    ROWS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Fires `event` where `firing`, moves to `target` where `going`, and expires phases without budget left.

    An event of a draw leaves nothing half written; an expiry keeps the DFA.
    """
    base = automata + automaton
    moves = tl.zeros([ROWS], tl.int32)
    while _any(firing | going):
        # Count the events and force their tokens; those that force none move on at once.
        counted = tl.load(counts + event, mask=firing, other=0)
        if SHARED:
            tl.debug_barrier()
        tl.store(counts + event, counted + 1, mask=firing)
        if SHARED:
            tl.debug_barrier()
        recorded = _event_word(program, event, layout.EventWord.THINK_END, firing)
        think_end = tl.where(recorded >= 0, recorded, think_end)
        after = _event_word(program, event, layout.EventWord.NEXT, firing)
        inject = _event_word(program, event, layout.EventWord.INJECT, firing)
        injecting = firing & (inject >= 0)
        states = tl.load(base + layout.AutomatonWord.NUM_STATES, mask=injecting, other=0)
        table = tl.load(base + layout.AutomatonWord.INJECT, mask=injecting, other=0)
        span = base + table + 2 * (inject * states + dfa)
        offset = tl.load(span, mask=injecting, other=0)
        length = tl.load(span + 1, mask=injecting, other=0)
        forcing = length > 0
        at = tl.where(forcing, automaton + offset, at)
        left = tl.where(forcing, length, left)
        following = tl.where(forcing, after, following)
        passing = firing & ~forcing
        dfa = tl.where(passing & by_draw & (moves == 0), 0, dfa)
        target = tl.where(passing, after, target)
        going |= passing

        # Move: finish, or enter the target unless the row is there already.
        finish = tl.where(going & (target < 0), -target, finish)
        entering = going & (target >= 0) & (target != phase)
        wrong = entering & (target >= layout.MAX_PHASES)
        entering &= target < layout.MAX_PHASES
        fresh = _phase_word(program, target, layout.PhaseWord.BUDGET, entering)
        carry = _phase_word(program, target, layout.PhaseWord.CARRY, entering & (fresh >= 0))
        label = tl.where(entering, _phase_word(program, target, layout.PhaseWord.LABEL, entering), label)
        carried = tl.where(budget < 0, -1, fresh + tl.maximum(budget - used, 0))
        fresh = tl.where((fresh >= 0) & (carry != 0), carried, fresh)
        budget = tl.where(entering, tl.maximum(fresh, -1), budget)
        phase = tl.where(entering, target, phase)
        used = tl.where(entering, 0, used)

        # Expire what has no budget left; a chain longer than there are phases goes in a circle.
        spent = going & (target >= 0) & ~wrong & (budget >= 0) & (used >= budget)
        event = _phase_word(program, phase, layout.PhaseWord.ON_EXPIRE, spent)
        event = _resolve(event, program, counts, ROWS)
        wrong |= (event >= 0) & (moves == layout.MAX_PHASES)
        finish = tl.where(wrong, layout.Finish.INVALID, finish)
        firing = (event >= 0) & ~wrong
        going = going & False
        moves += 1
    return finish, phase, label, used, budget, dfa, think_end, at, left, following


@triton.jit
def is_running(state, slot):
    """Where a row takes part in a step; `state` points to its slot's words, slot < 0 is an idle row."""
    finish = tl.load(state + layout.State.FINISH, mask=slot >= 0, other=layout.Finish.HOST)
    return finish == layout.Finish.RUNNING


@triton.jit
def is_forced(state, active):
    """Where the next token is forced whatever is drawn."""
    return tl.load(state + layout.State.FORCED_LEFT, mask=active, other=0) > 0


@triton.jit
def load_rows(state, program, automata, active):
    """What `step_rows` needs to know of the `active` rows before their draws are known."""
    position = tl.load(state + layout.State.POSITION, mask=active, other=0)
    limit = tl.load(state + layout.State.LIMIT, mask=active, other=0)
    phase = tl.load(state + layout.State.PHASE, mask=active, other=0)
    used = tl.load(state + layout.State.USED, mask=active, other=0)
    budget = tl.load(state + layout.State.LEFT, mask=active, other=0)
    dfa = tl.load(state + layout.State.DFA, mask=active, other=0)
    at = tl.load(state + layout.State.FORCED_AT, mask=active, other=0)
    left = tl.load(state + layout.State.FORCED_LEFT, mask=active, other=0)
    following = tl.load(state + layout.State.FORCED_NEXT, mask=active, other=0)
    requested = tl.load(state + layout.State.END_REQUESTED, mask=active, other=0)
    think_end = tl.load(state + layout.State.THINK_END, mask=active, other=0)
    automaton = tl.load(program + layout.Header.AUTOMATON, mask=active, other=0)
    ignore_eos = tl.load(program + layout.Header.IGNORE_EOS, mask=active, other=1)
    label = _phase_word(program, phase, layout.PhaseWord.LABEL, active)
    base = automata + automaton
    vocab_size = tl.load(base + layout.AutomatonWord.VOCAB_SIZE, mask=active, other=0)
    num_classes = tl.load(base + layout.AutomatonWord.NUM_CLASSES, mask=active, other=0)
    class_table = tl.load(base + layout.AutomatonWord.CLASS_OF, mask=active, other=0)
    next_table = tl.load(base + layout.AutomatonWord.NEXT, mask=active, other=0)
    match_table = tl.load(base + layout.AutomatonWord.MATCH, mask=active, other=0)
    eos_table = tl.load(base + layout.AutomatonWord.EOS, mask=active, other=0)
    return (
        position, limit, phase, used, budget, dfa, at, left, following, requested, think_end,
        automaton, ignore_eos, label,
        vocab_size, num_classes, class_table, next_table, match_table, eos_table,
    )  # fmt: skip


@triton.jit
def step_rows(
    state, program, automata, active, draw,
    position, limit, phase, used, budget, dfa, at, left, following, requested, think_end,
    automaton, ignore_eos, label,
    vocab_size, num_classes, class_table, next_table, match_table, eos_table,
    ROWS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Steps the `active` rows with their draws; `position` and what follows come from `load_rows`.

    Everything is a block of [ROWS]: pointers, masks, int32. Returns the token, whether one was emitted,
    whether it was forced, and the ring's flags.
    """
    counts = state + layout.State.EVENT_COUNTS
    base = automata + automaton
    finish = tl.full([ROWS], layout.Finish.RUNNING, tl.int32)
    nowhere = tl.full([ROWS], -1, tl.int32)
    nobody = active & False

    # A request to end the thinking waits while tokens are being forced; in SOLVE it is dropped.
    asked = active & (requested != 0)
    if _any(asked):
        thinking = label == layout.Label.THINK
        heard = asked & ~(thinking & (left > 0))
        requested = tl.where(heard, 0, requested)
        expiry = _phase_word(program, phase, layout.PhaseWord.ON_EXPIRE, heard & thinking)
        expiry = _resolve(expiry, program, counts, ROWS)
        finish, phase, label, used, budget, dfa, think_end, at, left, following = _settle(
            expiry, expiry >= 0, nobody, nowhere, nobody,
            program, counts, automata, automaton,
            finish, phase, label, used, budget, dfa, think_end, at, left, following, ROWS, SHARED,
        )  # fmt: skip

    # The draw and the event it triggers: the first of the phase's ends, else EOS.
    sampling = active & (finish == layout.Finish.RUNNING) & (left == 0)
    possible = sampling & (draw >= 0) & (draw < vocab_size)
    finish = tl.where(sampling & ~possible, layout.Finish.INVALID, finish)
    token_class = tl.load(base + class_table + draw, mask=possible, other=0)
    cell = dfa * num_classes + token_class
    match = tl.load(base + match_table + cell, mask=possible, other=0)
    is_eos = tl.load(base + eos_table + token_class, mask=possible, other=0) != 0
    next_dfa = tl.load(base + next_table + cell, mask=possible, other=0)
    event = nowhere
    by_eos = is_eos & (ignore_eos == 0)
    if _any((match != 0) | by_eos):
        undecided = possible
        for end in range(layout.MAX_ENDS):
            pattern = _phase_word(program, phase, layout.PhaseWord.ENDS + 2 * end, undecided)
            known = (pattern >= 0) & (pattern < 32)
            hit = known & (((match >> tl.where(known, pattern, 0)) & 1) != 0)
            ended = _phase_word(program, phase, layout.PhaseWord.ENDS + 2 * end + 1, hit)
            event = tl.where(hit, ended, event)
            undecided &= ~hit
        by_eos &= undecided
        on_eos = _phase_word(program, phase, layout.PhaseWord.ON_EOS, by_eos)
        event = _resolve(tl.where(by_eos, on_eos, event), program, counts, ROWS)

        # A replaced draw is no token; what is forced in its place depends on the DFA before it.
        replace = _event_word(program, event, layout.EventWord.REPLACE, event >= 0)
        replacing = (event >= 0) & (replace != 0)
        finish, phase, label, used, budget, dfa, think_end, at, left, following = _settle(
            event, replacing, replacing, nowhere, nobody,
            program, counts, automata, automaton,
            finish, phase, label, used, budget, dfa, think_end, at, left, following, ROWS, SHARED,
        )  # fmt: skip
        nothing = replacing & (finish == layout.Finish.RUNNING) & (left == 0)
        finish = tl.where(nothing, layout.Finish.INVALID, finish)

    # Emission: a forced token, or the draw. Its label is that of the phase before it moves on.
    emitting = active & (finish == layout.Finish.RUNNING)
    forced = emitting & (left > 0)
    sampled = emitting & (left == 0)
    solving = label == layout.Label.SOLVE
    token = tl.where(forced, tl.load(automata + at, mask=forced, other=0), draw)
    at += forced.to(tl.int32)
    left -= forced.to(tl.int32)
    written = forced & (left == 0)
    used += sampled.to(tl.int32)
    dfa = tl.where(written, 0, tl.where(sampled, next_dfa, dfa))
    fired = sampled & (event >= 0)
    expired = sampled & (event < 0) & (budget >= 0) & (used >= budget)
    finish, phase, label, used, budget, dfa, think_end, at, left, following = _settle(
        event, fired, fired, tl.where(written, following, phase), written | expired,
        program, counts, automata, automaton,
        finish, phase, label, used, budget, dfa, think_end, at, left, following, ROWS, SHARED,
    )  # fmt: skip
    solving |= fired & by_eos & (finish == layout.Finish.EOS)
    position += emitting.to(tl.int32)
    too_long = emitting & (finish == layout.Finish.RUNNING) & (position + 1 >= limit)
    finish = tl.where(too_long, layout.Finish.LENGTH, finish)

    if SHARED:
        tl.debug_barrier()  # every thread has read the words that one of them now writes
    tl.store(state + layout.State.FINISH, finish, mask=active)
    tl.store(state + layout.State.TOKEN, token, mask=emitting)
    tl.store(state + layout.State.POSITION, position, mask=active)
    tl.store(state + layout.State.PHASE, phase, mask=active)
    tl.store(state + layout.State.USED, used, mask=active)
    tl.store(state + layout.State.LEFT, budget, mask=active)
    tl.store(state + layout.State.DFA, dfa, mask=active)
    tl.store(state + layout.State.FORCED_AT, at, mask=active)
    tl.store(state + layout.State.FORCED_LEFT, left, mask=active)
    tl.store(state + layout.State.FORCED_NEXT, following, mask=active)
    tl.store(state + layout.State.END_REQUESTED, requested, mask=asked)
    tl.store(state + layout.State.THINK_END, think_end, mask=active)

    flags = tl.where(emitting, layout.Flag.VALID, 0)
    flags |= tl.where(forced, layout.Flag.FORCED, 0) | tl.where(emitting & solving, layout.Flag.SOLVE, 0)
    flags |= (finish << layout.Flag.FINISH_SHIFT) | (think_end << layout.Flag.THINK_END_SHIFT)
    return token, emitting, forced, tl.where(active, flags, 0)
