"""Paged attention in CUDA C++ (csrc/cuda/paged_attention.cu), for sm_80 and newer.

No GPU has run it: it is compared with the reference on an emulated device, and compiled for sm_80, sm_90 and
sm_100.

Made for decode, and right for every call: a token is computed alone, whatever its row's other queries, so its
bits are the same in decode, in a prefill of any chunks and where a prefix hit leaves one token to recompute.
The price is that a prompt's token costs as much as a decoded one, a read of all keys before it (from L2 where
they fit). q is bfloat16 or float16, keys and values the same or float8_e4m3fn; Triton has the rest.
"""

import torch

from .. import _C
from ..gpu import architecture, num_processors, stream, why_no_cuda
from . import SharedPrefixes

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
FLOAT8_HEAD_DIMS = (32, 64, 96, 128, 256)
PROCESSOR_SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # bytes of shared memory, by architecture
WORKSPACE_BYTES = 128 << 20  # partial results at most; tokens past that have to wait for a second pass


def why_unavailable() -> str | None:
    return why_no_cuda()


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
    """See the package's `paged_attention`. Reads no tensor on the host; `shared` is not used. page_table
    should be no wider than the longest row needs: the workspace for partial results grows with its width.

    Raises TypeError for dtypes and ValueError for a head_dim that have no kernel.
    """
    num_tokens, num_heads, head_dim = q.shape
    _, page_size, num_kv_heads, _ = k_cache.shape
    float8 = k_cache.dtype == torch.float8_e4m3fn
    if q.dtype not in (torch.bfloat16, torch.float16) or not (float8 or k_cache.dtype == q.dtype):
        raise TypeError(
            "paged_attention in CUDA takes bfloat16 or float16, keys and values in q's dtype or "
            f"float8_e4m3fn, got {q.dtype} and {k_cache.dtype}; use backend triton"
        )
    head_dims = FLOAT8_HEAD_DIMS if float8 else HEAD_DIMS
    if head_dim not in head_dims:
        raise ValueError(
            f"paged_attention in CUDA takes head_dim {', '.join(map(str, head_dims))} with keys and values "
            f"in {k_cache.dtype}, got {head_dim}; use backend triton"
        )
    if out is None:
        out = torch.empty_like(q)
    if num_tokens == 0:
        return out
    num_splits = max(1, -(-page_table.shape[1] * page_size // _C.cuda.SPLIT))
    tokens_at_once, partial_out, partial_sums = num_tokens, 0, 0
    if num_splits > 1:
        partials = num_heads * num_splits
        tokens_at_once = max(1, min(num_tokens, WORKSPACE_BYTES // (4 * partials * (head_dim + 2))))
        workspace = torch.empty(
            tokens_at_once * partials * (head_dim + 2), dtype=torch.float32, device=q.device
        )
        partial_out = workspace.data_ptr()
        partial_sums = partial_out + 4 * tokens_at_once * partials * head_dim
    arch = architecture(q.device)
    _C.cuda.paged_attention(
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        page_table.data_ptr(),
        seq_lens.data_ptr(),
        query_start.data_ptr(),
        out.data_ptr(),
        partial_out,
        partial_sums,
        page_table.stride(0),
        num_tokens,
        len(seq_lens),
        num_heads,
        num_kv_heads,
        page_size,
        num_splits,
        tokens_at_once,
        window or 0,
        head_dim**-0.5 if scale is None else scale,
        num_processors(q.device),
        PROCESSOR_SHARED[arch],
        arch >= 90,
        head_dim,
        q.dtype == torch.bfloat16,
        float8,
        stream(q.device),
    )
    return out
