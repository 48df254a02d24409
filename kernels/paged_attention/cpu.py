"""Paged attention in C++ (csrc/cpu/paged_attention.cpp). Unchecked: the public op checks."""

import torch

from .. import _C
from ..dtypes import CODES
from . import SharedPrefixes

_attend = _C.cpu.paged_attention


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    shared: SharedPrefixes | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See the package's `paged_attention`. CPU tensors; q and the cache float32 or bfloat16. `shared` is not
    used: the rows of a group find their pages in the processor's caches."""
    num_tokens, num_heads, head_dim = q.shape
    _, page_size, num_kv_heads, _ = k_cache.shape
    if out is None:
        out = torch.empty_like(q)
    _attend(
        q.data_ptr(),
        CODES[q.dtype],
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        CODES[k_cache.dtype],
        page_table.data_ptr(),
        seq_lens.data_ptr(),
        query_start.data_ptr(),
        out.data_ptr(),
        num_tokens,
        len(seq_lens),
        page_table.stride(0),
        num_heads,
        num_kv_heads,
        head_dim,
        page_size,
        head_dim**-0.5 if scale is None else scale,
        0 if window is None else window,
    )
    return out
