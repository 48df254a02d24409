"""Attention of ragged queries over keys and values in pages: decode, chunked prefill, or both in one call."""

import itertools
from typing import NamedTuple

import torch

from .. import registry
from ..checks import check_tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CACHE_DTYPES = (*FLOAT_DTYPES, torch.float8_e4m3fn)


class SharedPrefixes(NamedTuple):
    """Which adjacent rows of a decode call begin with the same tokens in the same pages.

    group_start  int32 [R + 1]: rows group_start[g]:group_start[g + 1] are group g. From 0, never falling;
                 every row is in a group, alone if need be; groups past the last are R:R
    shared_len   int32 [R]: positions 0 … shared_len[g] - 1 of group g's rows lie in the same pages; at least
                 one position of every row is its own: seq_len > shared_len[g]. Idle rows (seq_len 0) may be
                 among the others; their pages and lengths say nothing
    """

    group_start: torch.Tensor
    shared_len: torch.Tensor


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
    backend: str = "auto",
) -> torch.Tensor:
    """softmax(scale * q k^T) v for every query over its row's keys, causal (Vaswani et al. 2017, eq. 1).

    q            [T, Hq, D] float: the new tokens of all rows, row after row
    k_cache,
    v_cache      [num_pages, page_size, Hkv, D] float, of q's dtype or another; Hq is a multiple of Hkv, query
                 head h reads kv head h // (Hq / Hkv). The new tokens' own keys and values are already in
                 them. The GPU's backends and the reference also take float8_e4m3fn (no scales)
    page_table   int32 [R, max_pages]: token j of row r is in page page_table[r, j // page_size] at offset
                 j % page_size; entries past the seq_len tokens may be anything. May be the first
                 columns of a wider table; all other tensors are contiguous
    seq_lens     int32 [R]: tokens of the row, the new ones included
    query_start  int32 [R + 1]: row r's n_r queries are tokens query_start[r]:query_start[r + 1], at positions
                 seq_lens[r] - n_r … seq_lens[r] - 1. n_r = 1 is decode, n_r > 1 (chunked) prefill
    scale        D ** -0.5 unless given
    window       query p sees keys j with p - window < j <= p; None sees all j <= p
    shared       in decode (T = R, every row has one query): the prefixes that rows share. It changes no bit
                 of the result; a backend may use it to read such keys and values once a group

    Returns [T, Hq, D] in q's dtype, in `out` if given. Rows with seq_len 0 or without queries are idle; the
    outputs of tokens without a row, of an idle row or at a negative position are 0.

    A token's bits depend on its own query, its keys and values and its position alone: not on page size,
    chunking, the other rows or the number of threads. They do differ between backends and instruction sets.

    Raises TypeError for wrong dtypes; ValueError for wrong shapes, devices, strides and, on the CPU, for
    index values that would read outside the tensors (on other devices they are not looked at: that would wait
    for the device); RuntimeError where the backend cannot run.
    """
    scale, window, backend = _check(
        q, k_cache, v_cache, page_table, seq_lens, query_start, scale, window, shared, out, backend
    )
    tensors = q, k_cache, v_cache, page_table, seq_lens, query_start
    if torch.compiler.is_compiling():
        groups = (None, None) if shared is None else shared
        result = _compiled(*tensors, scale, window, backend, *groups)
        return result if out is None else out.copy_(result)
    if q.device.type == "cpu":
        _check_indices(q, k_cache, page_table, seq_lens, query_start)
        if shared is not None:
            _check_groups(shared, k_cache.shape[1], page_table, seq_lens, query_start)
    run = registry.implementation("paged_attention", backend)
    return run(*tensors, scale=scale, window=window or None, shared=shared, out=out)


@torch.library.custom_op("elastic_decode::paged_attention", mutates_args=())
def _compiled(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    scale: float,
    window: int,
    backend: str,
    group_start: torch.Tensor | None,
    shared_len: torch.Tensor | None,
) -> torch.Tensor:
    shared = None
    if group_start is not None and shared_len is not None:
        shared = SharedPrefixes(group_start, shared_len)
    run = registry.implementation("paged_attention", backend)
    return run(
        q,
        k_cache,
        v_cache,
        page_table,
        seq_lens,
        query_start,
        scale=scale,
        window=window or None,
        shared=shared,
    )


@_compiled.register_fake
def _fake(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    scale: float,
    window: int,
    backend: str,
    group_start: torch.Tensor | None,
    shared_len: torch.Tensor | None,
) -> torch.Tensor:
    return torch.empty_like(q)


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    scale: float | None,
    window: int | None,
    shared: SharedPrefixes | None,
    out: torch.Tensor | None,
    backend: str,
) -> tuple[float, int, str]:
    """What needs no look at values. Returns scale, window (0 for none) and backend, defaults filled in."""
    check_tensor("q", q, (None, None, None), FLOAT_DTYPES)
    num_tokens, num_heads, head_dim = q.shape
    device = q.device
    check_tensor("k_cache", k_cache, (None, None, None, head_dim), CACHE_DTYPES, device)
    check_tensor("v_cache", v_cache, k_cache.shape, k_cache.dtype, device)
    check_tensor("page_table", page_table, (None, None), torch.int32, device, contiguous=False)
    if page_table.shape[1] > 1 and page_table.stride(1) != 1:
        raise ValueError(f"the rows of page_table must be contiguous, got strides {page_table.stride()}")
    num_rows = page_table.shape[0]
    check_tensor("seq_lens", seq_lens, (num_rows,), torch.int32, device)
    check_tensor("query_start", query_start, (num_rows + 1,), torch.int32, device)
    num_kv_heads = k_cache.shape[2]
    if head_dim == 0 or k_cache.shape[1] == 0:
        raise ValueError(f"head_dim and page_size must be positive, got {head_dim} and {k_cache.shape[1]}")
    if num_kv_heads == 0 or num_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"the {num_heads} heads of q are not a multiple of the {num_kv_heads} heads of k_cache"
        )
    if out is not None:
        check_tensor("out", out, (num_tokens, num_heads, head_dim), q.dtype, device)
    if shared is not None:
        check_tensor("shared.group_start", shared.group_start, (num_rows + 1,), torch.int32, device)
        check_tensor("shared.shared_len", shared.shared_len, (num_rows,), torch.int32, device)
        if num_tokens != num_rows:
            raise ValueError(f"shared is for decode, one query a row: got {num_tokens} for {num_rows} rows")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (or None), got {window}")
    if backend == "auto":
        backend = registry.default_backend(device.type)
    if backend == "cpu":
        check_tensor("q", q, q.shape, (torch.float32, torch.bfloat16), torch.device("cpu"))
        check_tensor("k_cache", k_cache, k_cache.shape, (torch.float32, torch.bfloat16))
    return head_dim**-0.5 if scale is None else float(scale), window or 0, backend


def _check_indices(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
) -> None:
    """Raises ValueError for index values with which a kernel would read outside the tensors."""
    num_pages, page_size = k_cache.shape[:2]
    starts = query_start.tolist()
    if starts[0] != 0 or starts[-1] > q.shape[0] or any(b < a for a, b in itertools.pairwise(starts)):
        raise ValueError(
            f"query_start must rise from 0 to at most {q.shape[0]} (the tokens of q), got {starts}"
        )
    capacity = page_table.shape[1] * page_size
    for row, seq_len in enumerate(seq_lens.tolist()):
        if seq_len > capacity:
            raise ValueError(
                f"seq_lens[{row}] is {seq_len}, but {page_table.shape[1]} pages of {page_size} "
                f"hold {capacity} tokens"
            )
        if seq_len <= 0 or starts[row] == starts[row + 1]:
            continue
        pages = page_table[row, : -(-seq_len // page_size)]
        low, high = int(pages.min()), int(pages.max())
        if low < 0 or high >= num_pages:
            raise ValueError(
                f"page_table[{row}] names page {low if low < 0 else high} for its {seq_len} tokens; "
                f"k_cache has {num_pages} pages"
            )


def _check_groups(
    shared: SharedPrefixes,
    page_size: int,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
) -> None:
    """Raises ValueError where `shared` is not what SharedPrefixes says."""
    num_rows = len(seq_lens)
    if query_start.tolist() != list(range(num_rows + 1)):
        raise ValueError(f"shared is for decode, one query a row: got query_start {query_start.tolist()}")
    starts = shared.group_start.tolist()
    if starts[0] != 0 or starts[-1] != num_rows or any(b < a for a, b in itertools.pairwise(starts)):
        raise ValueError(f"shared.group_start must rise from 0 to {num_rows} (the rows), got {starts}")
    lens = seq_lens.tolist()
    for group, ((start, end), length) in enumerate(
        zip(itertools.pairwise(starts), shared.shared_len.tolist(), strict=True)
    ):
        rows = [row for row in range(start, end) if lens[row] > 0]
        if not rows:
            continue
        if not 0 <= length < min(lens[row] for row in rows):
            raise ValueError(
                f"shared.shared_len[{group}] is {length}, must be at least 0 and less than the seq_lens of "
                f"rows {start}:{end}, the least of which is {min(lens[row] for row in rows)}"
            )
        prefixes = page_table[rows, : -(-length // page_size)]
        if not torch.equal(prefixes, prefixes[:1].expand_as(prefixes)):
            raise ValueError(f"rows {start}:{end} do not have their first {length} tokens in the same pages")
