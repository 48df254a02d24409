"""The budget machine in CUDA C++ (csrc/cuda/budget.cu). Unchecked; on PyTorch's current stream."""

import torch

from .. import _C
from ..gpu import stream
from ..gpu import why_no_cuda as why_unavailable
from .cpu import enter_start  # the start is the host's work whatever runs the steps

__all__ = ["budget_step", "decode_inputs", "enter_start", "why_unavailable"]


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
    tensors = (state, programs, automata, slots, token, logits, lse, sampling_logprob, temperature)
    ring = (ring_tokens, ring_flags, ring_logprobs, ring_sampling_logprobs, ring_index)
    addresses = map(torch.Tensor.data_ptr, (*tensors, *ring))
    _C.cuda.budget_step(*addresses, *logits.shape, *ring_tokens.shape, stream(state.device))


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
    tensors = (state, page_table, slots, token, position, seq_len, slot_mapping)
    addresses = map(torch.Tensor.data_ptr, tensors)
    rows, max_pages = slots.shape[0], page_table.shape[1]
    _C.cuda.decode_inputs(*addresses, rows, max_pages, page_size, stream(state.device))
