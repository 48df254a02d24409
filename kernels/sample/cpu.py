"""`sample` in C++ (csrc/cpu/sample.cpp)."""

import torch

from .. import _C
from . import Sampled, SamplingTable, empty

_sample = _C.cpu.sample


def sample(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    table: SamplingTable,
    *,
    out: Sampled | None = None,
) -> Sampled:
    """See `kernels.sample.sample`; unchecked."""
    if out is None:
        out = empty(logits)
    (temperature, top_k, top_p, min_p, seed, sample_index, repetition, presence, frequency) = table[:9]
    ban_ids, bias_ids, counts = table.ban_ids, table.bias_ids, table.output_counts
    _sample(
        out[0].data_ptr(),
        out[1].data_ptr(),
        out[2].data_ptr(),
        logits.data_ptr(),
        slots.data_ptr(),
        positions.data_ptr(),
        *logits.shape,
        temperature.data_ptr(),
        top_k.data_ptr(),
        top_p.data_ptr(),
        min_p.data_ptr(),
        seed.data_ptr(),
        sample_index.data_ptr(),
        repetition.data_ptr(),
        presence.data_ptr(),
        frequency.data_ptr(),
        table.ban_until.data_ptr(),
        ban_ids.data_ptr(),
        bias_ids.data_ptr(),
        table.bias_values.data_ptr(),
        ban_ids.shape[1],
        bias_ids.shape[1],
        0 if counts is None else counts.data_ptr(),
        0 if table.prompt_mask is None else table.prompt_mask.data_ptr(),
    )
    return out
