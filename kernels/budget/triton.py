"""The budget machine in Triton: a row a thread, 32 rows a program, one launch a step (triton_machine.py).

Never run on a GPU: it is compared with the reference under Triton's interpreter, and compiled for GPUs.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ..gpu import why_no_triton
from . import layout
from .cpu import enter_start as enter_start  # the start is the host's work whatever runs the steps
from .triton_machine import is_running, load_rows, step_rows

# A warp a program; the interpreter takes as long for a lane as for hundreds.
ROWS = tl.constexpr(256 if triton.knobs.runtime.interpret else 32)
OPTIONS: dict[str, Any] = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False}

why_unavailable = why_no_triton


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
    program = programs_ptr + safe_slot * layout.PROGRAM_WORDS
    active = is_running(state, slot)
    loaded = load_rows(state, program, automata, active)
    token, emitting, forced, flags = step_rows(
        state, program, automata, active, draw, *loaded, ROWS=ROWS, SHARED=False
    )

    ring_row = tl.load(ring_index_ptr) % ring_length
    ring_row = tl.where(ring_row < 0, ring_row + ring_length, ring_row)
    entry = ring_row.to(tl.int64) * ring_width + row
    tl.store(ring_flags_ptr + entry, flags, mask=inside)
    tl.store(ring_tokens_ptr + entry, token, mask=emitting)
    scored = emitting & (token >= 0) & (token < logits_width)
    logit = tl.load(logits_ptr + row.to(tl.int64) * logits_width + token, mask=scored, other=0.0)
    temperature = tl.load(temperature_ptr + safe_slot, mask=scored, other=1.0)
    scale = tl.where(temperature > 0, temperature, 1.0)
    logprob = tl.div_rn(logit, scale) - tl.load(lse_ptr + row, mask=scored, other=0.0)
    tl.store(ring_logprobs_ptr + entry, tl.where(scored, logprob, -float("inf")), mask=emitting)
    draw_logprob = tl.load(draw_logprob_ptr + row, mask=emitting & ~forced, other=0.0)
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
    active = is_running(state, slot)
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
        *tensors, *ring, rows, width, *ring_tokens.shape, **OPTIONS
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
    _inputs_kernel[grid](*tensors, rows, page_table.shape[1], page_size, **OPTIONS)


def compile_cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """See benchmarks/compile_triton.py."""
    floats = ("logits_ptr", "lse_ptr", "draw_logprob_ptr", "temperature_ptr", "ring_logprobs_ptr")
    for name, kernel in (("budget_step", _step_kernel), ("decode_inputs", _inputs_kernel)):
        signature = {
            argument: "*i32" if argument.endswith("_ptr") or argument == "automata" else "i32"
            for argument in kernel.arg_names
        }
        signature |= {each: "*fp32" for each in (*floats, "ring_sampling_logprobs_ptr") if each in signature}
        yield name, kernel, signature, {}, OPTIONS
