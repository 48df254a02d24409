"""`draw` in C++ (csrc/cpu/draw.cpp)."""

import torch

from .. import _C
from ..sample import SamplingTable
from . import Machine, Ring

_draw = _C.cpu.draw
_address = torch.Tensor.data_ptr


def draw(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    table: SamplingTable,
    machine: Machine,
    ring: Ring,
) -> None:
    """See `kernels.draw.draw`; unchecked."""
    counts, prompt_mask = table[13:]
    _draw(
        logits.data_ptr(),
        slots.data_ptr(),
        positions.data_ptr(),
        *logits.shape,
        *map(_address, table[:13]),
        table.ban_ids.shape[1],
        table.bias_ids.shape[1],
        0 if counts is None else counts.data_ptr(),
        0 if prompt_mask is None else prompt_mask.data_ptr(),
        *map(_address, machine),
        *map(_address, ring),
        *ring.tokens.shape,
    )
