"""Rotary position embedding in C++ (csrc/cpu/rope.cpp), unchecked."""

import torch

from .. import _C
from ..dtypes import CODES

_rope = _C.cpu.rope


def rope(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    tokens = qkv.shape[0]
    head_dim = cos_sin.shape[1]
    if out is None:
        out = torch.empty((tokens, num_heads, head_dim), dtype=qkv.dtype)
    _rope(
        out.data_ptr(),
        qkv.data_ptr(),
        cos_sin.data_ptr(),
        positions.data_ptr(),
        slot_mapping.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        0 if q_weight is None else q_weight.data_ptr(),
        0 if k_weight is None else k_weight.data_ptr(),
        tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        eps,
        CODES[qkv.dtype],
        CODES[k_cache.dtype],
    )
    return out
