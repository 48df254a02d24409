"""Paged attention by FlashInfer, an optional package: to measure beside, and for who prefers it.

It has never run on a GPU here: it follows FlashInfer's interface as read in its versions 0.6.4 and 0.7.2
(tests/kernels/test_flashinfer.py has the signatures). Results depend on the batch: how the keys are split
between processors does.

Decode (T = R; the engine's captured step) is `trtllm_batch_decode_with_kv_cache`, which needs no plan: XQA on
compute capability 9.x and 12.x, the kernels of TensorRT-LLM on 10.x. Prefill is
`BatchPrefillWithPagedKVCacheWrapper`, whose plan is made on the host from the lengths: it waits for the
device in every layer, and cannot be captured in a graph.
"""

import importlib
from functools import cache
from typing import Any

import torch

from ..flashinfer_support import why_no_flashinfer
from . import SharedPrefixes

CAPABILITIES = (9, 10, 12)
PAGE_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (64, 128, 256)
WORKSPACE_BYTES = 128 << 20


def why_unavailable() -> str | None:
    return why_no_flashinfer(CAPABILITIES)


@cache
def _decode_workspace(device: torch.device) -> torch.Tensor:
    """uint8, zeros before its first use; the kernels leave their counters in it as they found them."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@cache
def _prefill_wrapper(device: torch.device, dtype: torch.dtype) -> Any:
    """One for each dtype: it settles on a kernel with its first plan."""
    module = importlib.import_module("flashinfer.prefill")
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return module.BatchPrefillWithPagedKVCacheWrapper(workspace, kv_layout="NHD")


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
    """As the package's `paged_attention`, where T = R means decode: every row has one query. `shared` is not
    used.

    Raises TypeError unless q and the cache are of one half-precision dtype, ValueError for other head or page
    sizes than FlashInfer's, RuntimeError for prefill during the capture of a graph.
    """
    _check(q, k_cache)
    out = torch.empty_like(q) if out is None else out
    scale = q.shape[2] ** -0.5 if scale is None else scale
    window_left = -1 if window is None else window - 1  # keys before the query's own that it sees
    if len(q) == 0:
        return out
    if len(q) == len(seq_lens):
        _decode(q, k_cache, v_cache, page_table, seq_lens, scale, window_left, out)
    else:
        _prefill(q, k_cache, v_cache, page_table, seq_lens, query_start, scale, window_left, out)
    return out


def _check(q: torch.Tensor, k_cache: torch.Tensor) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16) or k_cache.dtype != q.dtype:
        raise TypeError(
            f"FlashInfer is used with float16 or bfloat16, in the cache as in q; got q {q.dtype} and a cache "
            f"in {k_cache.dtype}"
        )
    if q.shape[2] not in HEAD_DIMS:
        raise ValueError(f"FlashInfer takes head_dim {', '.join(map(str, HEAD_DIMS))}, got {q.shape[2]}")
    if k_cache.shape[1] not in PAGE_SIZES:
        raise ValueError(
            f"FlashInfer takes pages of {', '.join(map(str, PAGE_SIZES))}, got {k_cache.shape[1]}"
        )


def _decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window_left: int,
    out: torch.Tensor,
) -> None:
    decode = importlib.import_module("flashinfer.decode").trtllm_batch_decode_with_kv_cache
    # Idle rows: a length of 0 makes XQA count down from 2^32, and their pages may be anything.
    table = page_table.clamp(0, len(k_cache) - 1).contiguous()
    decode(
        query=q,
        kv_cache=(k_cache, v_cache),
        workspace_buffer=_decode_workspace(q.device),
        block_tables=table,
        seq_lens=seq_lens.clamp(min=1),
        max_seq_len=table.shape[1] * k_cache.shape[1],
        bmm1_scale=scale,
        bmm2_scale=1.0,
        window_left=window_left,
        out=out,
        kv_layout="NHD",
    )
    out.masked_fill_((seq_lens <= 0).view(-1, 1, 1), 0.0)


def _prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    scale: float,
    window_left: int,
    out: torch.Tensor,
) -> None:
    if q.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("FlashInfer plans a prefill on the host: it cannot be captured in a CUDA graph")
    page_size = k_cache.shape[1]
    starts, lens, table = query_start.tolist(), seq_lens.tolist(), page_table.cpu()
    rows = [row for row, length in enumerate(lens) if length > 0 and starts[row + 1] > starts[row]]
    queries = [starts[row + 1] - starts[row] for row in rows]
    for row, count in zip(rows, queries, strict=True):
        if count > lens[row]:
            raise ValueError(f"row {row} has {count} queries, but {lens[row]} tokens")
    if sum(queries) < len(q):
        out.zero_()  # tokens of no row, or of an idle one
    if not rows:
        return
    counts = [-(-lens[row] // page_size) for row in rows]
    wrapper = _prefill_wrapper(q.device, q.dtype)
    wrapper.plan(
        _sums(queries),
        _sums(counts),
        torch.cat([table[row, :count] for row, count in zip(rows, counts, strict=True)]).to(q.device),
        torch.tensor([(lens[row] - 1) % page_size + 1 for row in rows], dtype=torch.int32),
        num_qo_heads=q.shape[1],
        num_kv_heads=k_cache.shape[2],
        head_dim_qk=q.shape[2],
        page_size=page_size,
        causal=True,
        sm_scale=scale,
        window_left=window_left,
        q_data_type=q.dtype,
        kv_data_type=k_cache.dtype,
    )
    if sum(queries) == len(q):
        wrapper.run(q, (k_cache, v_cache), out=out)
        return
    tokens = [token for row in rows for token in range(starts[row], starts[row + 1])]
    own = torch.tensor(tokens, device=q.device)
    out[own] = wrapper.run(q[own], (k_cache, v_cache))


def _sums(counts: list[int]) -> torch.Tensor:
    """0 and the running sums: int32 [len + 1], on the host."""
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
