"""`sample` in CUDA C++ (csrc/cuda/draw.cu): two launches."""

import torch

from .. import _C
from ..gpu import stream
from ..gpu import why_no_cuda as why_unavailable
from . import Sampled, SamplingTable, empty

__all__ = ["sample", "why_unavailable", "workspace"]

_address = torch.Tensor.data_ptr


def workspace(logits: torch.Tensor, table: SamplingTable) -> torch.Tensor:
    """The working memory of one call, not initialised."""
    modifies = table.output_counts is not None or table.ban_ids.shape[1] + table.bias_ids.shape[1] > 0
    size = _C.cuda.draw_work_bytes(*logits.shape, modifies)
    return torch.empty(size, dtype=torch.uint8, device=logits.device)


def sample(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    table: SamplingTable,
    *,
    out: Sampled | None = None,
) -> Sampled:
    """See `kernels.sample.sample`; unchecked. On PyTorch's current stream."""
    if out is None:
        out = empty(logits)
    counts, prompt_mask = table[13:]
    work = workspace(logits, table)
    _C.cuda.sample(
        *map(_address, out),
        logits.data_ptr(),
        slots.data_ptr(),
        positions.data_ptr(),
        *logits.shape,
        *map(_address, table[:13]),
        table.ban_ids.shape[1],
        table.bias_ids.shape[1],
        0 if counts is None else counts.data_ptr(),
        0 if prompt_mask is None else prompt_mask.data_ptr(),
        work.data_ptr(),
        stream(logits.device),
    )
    return out
