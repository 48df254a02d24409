"""The budget machine in Triton: a row a thread, 32 rows a program, one launch a step.

Never run on a GPU: it is compared with the reference under Triton's interpreter, and compiled for GPUs.

Threads do not branch by themselves: each part of the step is done for the rows it concerns, by mask, and left
out where it concerns none. Events are rare, so an ordinary step is a few dozen loads. The order is that of
csrc/budget.h.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from . import layout
from .cpu import enter_start as enter_start  # the start is the host's work whatever runs the steps

# A warp a program; the interpreter takes as long for a lane as for hundreds.
ROWS = tl.constexpr(256 if triton.knobs.runtime.interpret else 32)

COUNTS = tl.constexpr(triton.next_power_of_2(layout.MAX_EVENTS))


def why_unavailable() -> str | None:
    if triton.knobs.runtime.interpret or torch.cuda.is_available():
        return None
    return "Triton needs a CUDA device (or TRITON_INTERPRET=1, to run slowly on the CPU)"


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
def _resolve(event, program, counts):
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
    finish, phase, used, budget, dfa, think_end, at, left, following,
):  # fmt: skip
    """Fires `event` where `firing`, moves to `target` where `going`, and expires phases without budget left.

    An event of a draw leaves nothing half written; an expiry keeps the DFA.
    """
    base = automata + automaton
    moves = tl.zeros([ROWS], tl.int32)
    while _any(firing | going):
        # Count the events and force their tokens; those that force none move on at once.
        counted = tl.load(counts + event, mask=firing, other=0)
        tl.store(counts + event, counted + 1, mask=firing)
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
        carried = tl.where(budget < 0, -1, fresh + tl.maximum(budget - used, 0))
        fresh = tl.where((fresh >= 0) & (carry != 0), carried, fresh)
        budget = tl.where(entering, tl.maximum(fresh, -1), budget)
        phase = tl.where(entering, target, phase)
        used = tl.where(entering, 0, used)

        # Expire what has no budget left; a chain longer than there are phases goes in a circle.
        spent = going & (target >= 0) & ~wrong & (budget >= 0) & (used >= budget)
        event = _phase_word(program, phase, layout.PhaseWord.ON_EXPIRE, spent)
        event = _resolve(event, program, counts)
        wrong |= (event >= 0) & (moves == layout.MAX_PHASES)
        finish = tl.where(wrong, layout.Finish.INVALID, finish)
        firing = (event >= 0) & ~wrong
        going = going & False
        moves += 1
    return finish, phase, used, budget, dfa, think_end, at, left, following


@triton.jit(do_not_specialize=["rows", "logits_width", "ring_length", "ring_width"])
def _step_kernel(
    state_ptr,
    programs_ptr,
    automata,
    slots_ptr,
    draws_ptr,
    logits_ptr,
    lse_ptr,
    draw_logprob_ptr,
    temperature_ptr,
    ring_tokens_ptr,
    ring_flags_ptr,
    ring_logprobs_ptr,
    ring_sampling_logprobs_ptr,
    ring_index_ptr,
    rows,
    logits_width,
    ring_length,
    ring_width,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    slot = tl.load(slots_ptr + row, mask=inside, other=-1)
    draw = tl.load(draws_ptr + row, mask=inside, other=-1)
    safe_slot = tl.maximum(slot, 0).to(tl.int64)
    state = state_ptr + safe_slot * layout.STATE_WORDS
    counts = state + layout.State.EVENT_COUNTS
    program = programs_ptr + safe_slot * layout.PROGRAM_WORDS
    finish = tl.load(state + layout.State.FINISH, mask=slot >= 0, other=layout.Finish.HOST)
    active = finish == layout.Finish.RUNNING

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
    ignore_eos = tl.load(program + layout.Header.IGNORE_EOS, mask=active, other=1) != 0
    base = automata + automaton
    vocab_size = tl.load(base + layout.AutomatonWord.VOCAB_SIZE, mask=active, other=0)
    num_classes = tl.load(base + layout.AutomatonWord.NUM_CLASSES, mask=active, other=0)
    class_table = tl.load(base + layout.AutomatonWord.CLASS_OF, mask=active, other=0)
    next_table = tl.load(base + layout.AutomatonWord.NEXT, mask=active, other=0)
    match_table = tl.load(base + layout.AutomatonWord.MATCH, mask=active, other=0)
    eos_table = tl.load(base + layout.AutomatonWord.EOS, mask=active, other=0)
    nowhere = tl.full([ROWS], -1, tl.int32)
    nobody = active & False

    # A request to end the thinking waits while tokens are being forced; in SOLVE it is dropped.
    if _any(active & (requested != 0)):
        label = _phase_word(program, phase, layout.PhaseWord.LABEL, active)
        thinking = label == layout.Label.THINK
        heard = active & (requested != 0) & ~(thinking & (left > 0))
        tl.store(state + layout.State.END_REQUESTED, 0, mask=heard)
        expiry = _phase_word(program, phase, layout.PhaseWord.ON_EXPIRE, heard & thinking)
        expiry = _resolve(expiry, program, counts)
        finish, phase, used, budget, dfa, think_end, at, left, following = _settle(
            expiry, expiry >= 0, nobody, nowhere, nobody,
            program, counts, automata, automaton,
            finish, phase, used, budget, dfa, think_end, at, left, following,
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
    by_eos = is_eos & ~ignore_eos
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
        event = _resolve(tl.where(by_eos, on_eos, event), program, counts)

        # A replaced draw is no token; what is forced in its place depends on the DFA before it.
        replace = _event_word(program, event, layout.EventWord.REPLACE, event >= 0)
        replacing = (event >= 0) & (replace != 0)
        finish, phase, used, budget, dfa, think_end, at, left, following = _settle(
            event, replacing, replacing, nowhere, nobody,
            program, counts, automata, automaton,
            finish, phase, used, budget, dfa, think_end, at, left, following,
        )  # fmt: skip
        nothing = replacing & (finish == layout.Finish.RUNNING) & (left == 0)
        finish = tl.where(nothing, layout.Finish.INVALID, finish)

    # Emission: a forced token, or the draw.
    emitting = active & (finish == layout.Finish.RUNNING)
    forced = emitting & (left > 0)
    sampled = emitting & (left == 0)
    label = _phase_word(program, phase, layout.PhaseWord.LABEL, emitting)
    token = tl.where(forced, tl.load(automata + at, mask=forced, other=0), draw)
    at += forced.to(tl.int32)
    left -= forced.to(tl.int32)
    written = forced & (left == 0)
    used += sampled.to(tl.int32)
    dfa = tl.where(written, 0, tl.where(sampled, next_dfa, dfa))
    fired = sampled & (event >= 0)
    expired = sampled & (event < 0) & (budget >= 0) & (used >= budget)
    finish, phase, used, budget, dfa, think_end, at, left, following = _settle(
        event, fired, fired, tl.where(written, following, phase), written | expired,
        program, counts, automata, automaton,
        finish, phase, used, budget, dfa, think_end, at, left, following,
    )  # fmt: skip
    final_eos = fired & by_eos & (finish == layout.Finish.EOS)
    solving = emitting & ((label == layout.Label.SOLVE) | final_eos)
    position += emitting.to(tl.int32)
    too_long = emitting & (finish == layout.Finish.RUNNING) & (position + 1 >= limit)
    finish = tl.where(too_long, layout.Finish.LENGTH, finish)

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
    tl.store(state + layout.State.THINK_END, think_end, mask=active)

    ring_row = tl.load(ring_index_ptr) % ring_length
    ring_row = tl.where(ring_row < 0, ring_row + ring_length, ring_row)
    entry = ring_row.to(tl.int64) * ring_width + row
    flags = tl.where(emitting, layout.Flag.VALID, 0)
    flags |= tl.where(forced, layout.Flag.FORCED, 0) | tl.where(solving, layout.Flag.SOLVE, 0)
    flags |= (finish << layout.Flag.FINISH_SHIFT) | (think_end << layout.Flag.THINK_END_SHIFT)
    tl.store(ring_flags_ptr + entry, tl.where(active, flags, 0), mask=inside)
    tl.store(ring_tokens_ptr + entry, token, mask=emitting)
    scored = emitting & (token >= 0) & (token < logits_width)
    logit = tl.load(logits_ptr + row.to(tl.int64) * logits_width + token, mask=scored, other=0.0)
    temperature = tl.load(temperature_ptr + safe_slot, mask=scored, other=1.0)
    scale = tl.where(temperature > 0, temperature, 1.0)
    logprob = tl.div_rn(logit, scale) - tl.load(lse_ptr + row, mask=scored, other=0.0)
    tl.store(ring_logprobs_ptr + entry, tl.where(scored, logprob, -float("inf")), mask=emitting)
    draw_logprob = tl.load(draw_logprob_ptr + row, mask=sampled, other=0.0)
    tl.store(ring_sampling_logprobs_ptr + entry, draw_logprob, mask=emitting)


@triton.jit(do_not_specialize=["rows", "max_pages", "page_size"])
def _inputs_kernel(
    state_ptr,
    page_table_ptr,
    slots_ptr,
    token_ptr,
    position_ptr,
    seq_len_ptr,
    slot_mapping_ptr,
    rows,
    max_pages,
    page_size,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    slot = tl.load(slots_ptr + row, mask=inside, other=-1)
    safe_slot = tl.maximum(slot, 0).to(tl.int64)
    state = state_ptr + safe_slot * layout.STATE_WORDS
    finish = tl.load(state + layout.State.FINISH, mask=slot >= 0, other=layout.Finish.HOST)
    active = finish == layout.Finish.RUNNING
    token = tl.load(state + layout.State.TOKEN, mask=active, other=0)
    position = tl.load(state + layout.State.POSITION, mask=active, other=0)
    index = position // page_size
    paged = active & (position >= 0) & (index < max_pages)
    page = tl.load(page_table_ptr + safe_slot * max_pages + index, mask=paged, other=-1)
    mapping = tl.where(page >= 0, page * page_size + position % page_size, -1)
    tl.store(token_ptr + row, token, mask=inside)
    tl.store(position_ptr + row, position, mask=inside)
    tl.store(seq_len_ptr + row, tl.where(active, position + 1, 0), mask=inside)
    tl.store(slot_mapping_ptr + row, mapping, mask=inside)


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
    rows, width = logits.shape
    if rows == 0:
        return
    tensors = (state, programs, automata, slots, token, logits, lse, sampling_logprob, temperature)
    ring = (ring_tokens, ring_flags, ring_logprobs, ring_sampling_logprobs, ring_index)
    _step_kernel[(triton.cdiv(rows, ROWS.value),)](
        *tensors, *ring, rows, width, *ring_tokens.shape, num_warps=1
    )


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
    rows = slots.shape[0]
    if rows == 0:
        return
    tensors = (state, page_table, slots, token, position, seq_len, slot_mapping)
    grid = (triton.cdiv(rows, ROWS.value),)
    _inputs_kernel[grid](*tensors, rows, page_table.shape[1], page_size, num_warps=1)


def compile_cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What `make compile-check` compiles: (name, kernel, signature, constexprs, options)."""
    floats = ("logits_ptr", "lse_ptr", "draw_logprob_ptr", "temperature_ptr", "ring_logprobs_ptr")
    for name, kernel in (("budget_step", _step_kernel), ("decode_inputs", _inputs_kernel)):
        signature = {
            argument: "*i32" if argument.endswith("_ptr") or argument == "automata" else "i32"
            for argument in kernel.arg_names
        }
        signature |= {each: "*fp32" for each in (*floats, "ring_sampling_logprobs_ptr") if each in signature}
        yield name, kernel, signature, {}, {"num_warps": 1}
