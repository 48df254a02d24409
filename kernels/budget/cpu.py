"""The budget machine in C++ (csrc/budget.h). Unchecked: the public functions in __init__.py check."""

import torch

from .. import _C

_budget_step = _C.cpu.budget_step
_decode_inputs = _C.cpu.decode_inputs
_enter_start = _C.cpu.enter_start


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
    ring_length, ring_width = ring_tokens.shape
    _budget_step(
        state.data_ptr(),
        programs.data_ptr(),
        automata.data_ptr(),
        slots.data_ptr(),
        token.data_ptr(),
        logits.data_ptr(),
        lse.data_ptr(),
        sampling_logprob.data_ptr(),
        temperature.data_ptr(),
        ring_tokens.data_ptr(),
        ring_flags.data_ptr(),
        ring_logprobs.data_ptr(),
        ring_sampling_logprobs.data_ptr(),
        ring_index.data_ptr(),
        rows,
        width,
        ring_length,
        ring_width,
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
    _decode_inputs(
        state.data_ptr(),
        page_table.data_ptr(),
        slots.data_ptr(),
        token.data_ptr(),
        position.data_ptr(),
        seq_len.data_ptr(),
        slot_mapping.data_ptr(),
        slots.shape[0],
        page_table.shape[1],
        page_size,
    )


def enter_start(
    state_row: torch.Tensor, program_row: torch.Tensor, automata: torch.Tensor, phase: int
) -> None:
    _enter_start(state_row.data_ptr(), program_row.data_ptr(), automata.data_ptr(), phase)
