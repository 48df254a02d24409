"""Paged attention in Triton, for NVIDIA GPUs.

No GPU has run these kernels: they are compared with the reference under Triton's interpreter, in float32 and
float16, and compiled for sm_80, sm_90 and sm_100 (benchmarks/compile_triton.py). Nothing is tuned.

A tile is BLOCK_M rows: the heads that share a kv head, in prefill for as many queries as fit, so that K and
V are read once for all of them. Keys fall into splits of SPLIT tokens counted from position 0; a split is
swept in blocks of BLOCK_N keys (online softmax) and splits are folded in order. Where there are too few tiles
to fill the GPU, splits are spread over programs, and a second kernel folds them; otherwise one program walks
and folds them. Splits that the rows of a group share are swept before (triton_shared.py). All three are the
same code for a split and the same fused multiply-adds for a fold, in tiles whose rows do not touch: a token's
bits do not depend on which of them ran.
"""

import torch
import triton

from .. import gpu
from . import SharedPrefixes
from .triton_cases import compile_cases as compile_cases
from .triton_rows import attend_kernel, fold_kernel
from .triton_shared import shared_kernel
from .triton_tilings import (
    EXACT,
    FOLD_AHEAD,
    FOLD_HEADS,
    FOLD_OPTIONS,
    SPLIT,
    TL_DTYPES,
    padded_dim,
    product_dtype,
    programs_for_splits,
    stored_splits,
    takes_fp8_bits,
    tiling,
)

LOG2_E = 1.4426950408889634


def why_unavailable() -> str | None:
    return gpu.why_no_triton()


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
    """See the package's `paged_attention`. Reads no tensor on the host. page_table should be no wider than
    the longest row needs: the workspace for partial results grows with its width.

    With `shared`, whole splits of SPLIT tokens are read once for as many rows as fit a tile; not where there
    is a window, which begins elsewhere for every row."""
    num_tokens, num_heads, head_dim = q.shape
    _, page_size, num_kv_heads, _ = k_cache.shape
    num_rows, max_pages = page_table.shape
    if out is None:
        out = torch.empty_like(q)
    if num_tokens == 0:
        return out
    arch = gpu.architecture(q.device)
    group = num_heads // num_kv_heads
    product = product_dtype(q.dtype, k_cache.dtype)
    # One query a tile if that can be all: then no row of a tile sees keys that another does not.
    wide = num_tokens > num_rows
    tile = tiling(arch, head_dim, group, product, k_cache.dtype, wide)
    queries = tile.rows // group if wide else 1
    num_splits = max(1, triton.cdiv(max_pages * page_size, SPLIT))
    share = shared is not None and not window
    programs_0 = num_rows if share else num_rows + 1 + num_tokens // queries
    split_bytes = 4 * num_tokens * num_heads * (head_dim + 2)
    programs = programs_for_splits(programs_0 * num_kv_heads, num_splits, split_bytes, q.device)
    spread = programs > 1
    stored = num_splits if spread else stored_splits(num_splits, split_bytes) if share else 0
    share = share and stored > 0
    partial_out = partial_sums = out
    if stored:
        partial_out = torch.empty(
            (num_tokens, num_heads, stored, head_dim), dtype=torch.float32, device=q.device
        )
        partial_sums = torch.empty((num_tokens, num_heads, stored, 2), dtype=torch.float32, device=q.device)
    fp8_bits = takes_fp8_bits(arch, k_cache.dtype)
    if fp8_bits:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    scale_log2e = (head_dim**-0.5 if scale is None else scale) * LOG2_E
    sizes = {"HEADS": num_heads, "HEAD_DIM": head_dim, "D_PAD": padded_dim(head_dim), "SPLIT": SPLIT}
    cache = {
        "KV_HEADS": num_kv_heads,
        "PAGE_SIZE": page_size,
        "PRODUCT": TL_DTYPES[product],
        "FP8_BITS": fp8_bits,
        "BLOCK_N": tile.keys,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **EXACT,
    }
    dependent = gpu.dependent_launch(q.device)
    shared_splits = seq_lens
    if shared is not None and share:
        shared_splits = torch.empty_like(seq_lens)
        wide_tile = tiling(arch, head_dim, group, product, k_cache.dtype, True)
        tiles = triton.cdiv(num_rows, wide_tile.rows // group)
        shared_programs = programs_for_splits(tiles * num_kv_heads, stored, 0, q.device)
        shared_kernel[(tiles, num_kv_heads, shared_programs)](
            q,
            k_cache,
            v_cache,
            page_table,
            seq_lens,
            *shared,
            shared_splits,
            partial_out,
            partial_sums,
            num_rows,
            page_table.stride(0),
            stored,
            scale_log2e,
            BLOCK_M=wide_tile.rows,
            **sizes,
            **cache,
            **dependent,
        )
    attend_kernel[(programs_0, num_kv_heads, programs)](
        q,
        k_cache,
        v_cache,
        page_table,
        seq_lens,
        query_start,
        shared_splits,
        out,
        partial_out,
        partial_sums,
        num_tokens,
        num_rows,
        page_table.stride(0),
        stored,
        scale_log2e,
        WINDOW=window or 0,
        BLOCK_M=tile.rows,
        QUERIES=queries,
        SPREAD=spread,
        SHARED=share,
        **sizes,
        **cache,
        **dependent,
    )
    if spread:
        fold_kernel[(num_tokens, triton.cdiv(num_heads, FOLD_HEADS))](
            seq_lens,
            query_start,
            out,
            partial_out,
            partial_sums,
            num_tokens,
            num_rows,
            stored,
            WINDOW=window or 0,
            BLOCK_H=FOLD_HEADS,
            AHEAD=FOLD_AHEAD,
            **sizes,
            **FOLD_OPTIONS,
            **dependent,
        )
    return out
