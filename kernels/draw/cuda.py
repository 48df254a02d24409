"""`draw` in CUDA C++ (csrc/cuda/draw.cu): two launches."""

import torch

from .. import _C
from ..gpu import stream
from ..gpu import why_no_cuda as why_unavailable
from ..sample import SamplingTable
from ..sample.cuda import workspace
from . import Machine, Ring

__all__ = ["draw", "why_unavailable"]

_address = torch.Tensor.data_ptr


def draw(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    table: SamplingTable,
    machine: Machine,
    ring: Ring,
) -> None:
    """See `kernels.draw.draw`; unchecked. On PyTorch's current stream."""
    counts, prompt_mask = table[13:]
    work = workspace(logits, table)
    _C.cuda.draw(
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
        work.data_ptr(),
        stream(logits.device),
    )
