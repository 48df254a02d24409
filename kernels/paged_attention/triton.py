"""Paged attention in Triton, for NVIDIA GPUs.

No GPU has run these kernels: they are compared with the reference under Triton's interpreter, in float32 and
float16, and compiled for sm_80, sm_90 and sm_100 (benchmarks/compile_triton.py). Nothing is tuned.

A tile is BLOCK_M rows: the heads that share a kv head, for as many queries as fit, so that decode reads K and
V once for all of them. Keys fall into splits of SPLIT tokens counted from position 0; a split is swept in
blocks of BLOCK_N keys (online softmax) and splits are folded in order. Decode gives splits to programs of
their own and folds them in a second kernel; prefill walks and folds them in one program. Both are the same
code for a split and the same fused multiply-adds for a fold, with the same tile shape: a token's bits do not
depend on which ran.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import SharedPrefixes

INTERPRETING: bool = triton.knobs.runtime.interpret
SPLIT = 256  # keys whose order of summation is independent of all others
WORKSPACE_BYTES = 128 << 20  # partial results at most; past that, programs walk their splits
LOG2_E = 1.4426950408889634
# No contraction that the code does not spell out: variants of a kernel then round alike.
EXACT: dict[str, Any] = {"enable_fp_fusion": False}
# Arguments that change from call to call: a kernel compiled for one value (1, multiples of 16) gains nothing.
COUNTS = ("num_tokens", "num_rows", "table_stride", "num_splits")

TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def why_unavailable() -> str | None:
    if INTERPRETING or torch.cuda.is_available():
        return None
    return "Triton needs a CUDA device (or TRITON_INTERPRET=1, to run slowly on the CPU)"


class Tiling(NamedTuple):
    """How a shape is cut. `rows` and `keys` are powers of two, at least 16 (tl.dot's least)."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int  # 5: the page table is read a stage ahead of the pages, which leaves two buffers of them


# By padded head_dim. Registers decide: none of these spills in decode on sm_80, sm_90 or sm_100.
HALF_TILINGS = {
    16: Tiling(32, 64, 4, 5),
    32: Tiling(32, 64, 4, 5),
    64: Tiling(32, 32, 4, 5),
    128: Tiling(32, 32, 4, 5),
    256: Tiling(16, 32, 4, 5),
}
FLOAT_TILINGS = {  # no tensor cores in full float32
    16: Tiling(16, 32, 4, 5),
    32: Tiling(16, 32, 4, 5),
    64: Tiling(16, 32, 4, 4),
    128: Tiling(16, 32, 4, 5),
    256: Tiling(16, 16, 4, 5),
}


def tiling(head_dim: int, group: int, product: torch.dtype) -> Tiling:
    """For head_dim, query heads a kv head, and the dtype that is multiplied. Decode and prefill share it:
    a token's bits depend on it."""
    table = FLOAT_TILINGS if product == torch.float32 else HALF_TILINGS
    padded = padded_dim(head_dim)
    if padded not in table:
        raise ValueError(f"paged_attention in Triton takes head_dim up to {max(table)}, got {head_dim}")
    tile = table[padded]
    return tile._replace(rows=max(tile.rows, triton.next_power_of_2(group)))


def padded_dim(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def product_dtype(q: torch.dtype, kv: torch.dtype) -> torch.dtype:
    """What products are taken in: float32 where the two differ, and for bfloat16 under the interpreter, whose
    arithmetic works on bfloat16's raw bits; otherwise the dtype of the two."""
    if q != kv or (INTERPRETING and q == torch.bfloat16):
        return torch.float32
    return q


@triton.jit
def _find_row(query_start, num_rows, block, QUERIES: tl.constexpr):
    """The row of a block of queries. Row r's blocks begin at query_start[r] // QUERIES + r: so each has
    enough, and their number is bounded by sizes the host knows. num_rows for blocks past the last row's."""
    low = 0
    high = num_rows + 1
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // QUERIES + middle <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _fold(top, sums, acc, top_new, sums_new, acc_new):
    """One partial result added to another as log-sum-exp, base 2. Without keys: top -inf, sums 0."""
    highest = tl.maximum(top, top_new)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    a = tl.exp2(top - safe)
    b = tl.exp2(top_new - safe)
    return highest, tl.fma(sums_new, b, sums * a), tl.fma(acc_new, b[:, None], acc * a[:, None])


@triton.jit(do_not_specialize=COUNTS)
def _attend_kernel(
    q,
    k_cache,
    v_cache,
    page_table,
    seq_lens,
    query_start,
    out,
    partial_out,  # float32 [T, HEADS, splits, D_PAD], where SPREAD
    partial_sums,  # float32 [T, HEADS, splits, 2]: maximum and sum of weights
    num_tokens,
    num_rows,
    table_stride,
    num_splits,
    scale_log2e,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    PRODUCT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPREAD: tl.constexpr,  # splits go to program_id(2); otherwise this program walks and folds them all
):
    GROUP: tl.constexpr = HEADS // KV_HEADS
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    block = tl.program_id(0)
    kv_head = tl.program_id(1)

    row = _find_row(query_start, num_rows, block, QUERIES)
    is_row = row < num_rows
    start = tl.load(query_start + row)
    count = tl.load(query_start + row + 1, mask=is_row, other=num_tokens) - start
    seq_len = tl.load(
        seq_lens + row, mask=is_row, other=0
    )  # the tokens past the last row: a row without keys
    first = (block - start // QUERIES - row) * QUERIES
    if first >= count:
        return
    offset = seq_len - count  # position of the row's query 0
    last = offset + tl.minimum(first + QUERIES, count) - 1  # newest position of the tile
    if seq_len <= 0:
        last = -1
    oldest = 0
    if WINDOW > 0:
        oldest = tl.maximum(offset + first - WINDOW + 1, 0)

    m_ids = tl.arange(0, BLOCK_M)
    query = first + m_ids // GROUP
    live = (m_ids < QUERIES * GROUP) & (query < count)
    position = tl.where(live & (seq_len > 0), offset + query, -1)
    d_ids = tl.arange(0, D_PAD)
    d_live = d_ids < HEAD_DIM
    head = (start + query).to(tl.int64) * HEADS + kv_head * GROUP + m_ids % GROUP
    q_at = q + head[:, None] * HEAD_DIM + d_ids[None, :]
    q_tile = tl.load(q_at, mask=live[:, None] & d_live[None, :], other=0.0).to(PRODUCT)

    end_split = (last + SPLIT) // SPLIT
    first_split = oldest // SPLIT
    step = 1
    if SPREAD:
        first_split += tl.program_id(2)
        step = tl.num_programs(2)
    top_all = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums_all = tl.zeros([BLOCK_M], tl.float32)
    acc_all = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    table = page_table + row.to(tl.int64) * table_stride

    for split in range(first_split, end_split, step):
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        sums = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
        low = tl.maximum(split * SPLIT, oldest // BLOCK_N * BLOCK_N)
        high = tl.minimum(split * SPLIT + SPLIT, last + 1)
        for begin in range(low, high, BLOCK_N):
            key = begin + tl.arange(0, BLOCK_N)
            present = key <= last
            if WINDOW > 0:
                present &= key >= oldest
            page = tl.load(table + key // PAGE_SIZE, mask=present, other=0)
            slot = page.to(tl.int64) * PAGE_SIZE + key % PAGE_SIZE
            at = ((slot * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + d_ids[None, :]
            kv_live = present[:, None] & d_live[None, :]
            k = tl.load(k_cache + at, mask=kv_live, other=0.0).to(PRODUCT)
            scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee") * scale_log2e
            age = position[:, None] - key[None, :]
            seen = age >= 0
            if WINDOW > 0:
                seen &= age < WINDOW
            scores = tl.where(seen, scores, float("-inf"))
            highest = tl.maximum(top, tl.max(scores, axis=1))
            safe = tl.where(highest == float("-inf"), 0.0, highest)
            decay = tl.exp2(top - safe)
            weights = tl.exp2(scores - safe[:, None])
            sums = tl.fma(sums, decay, tl.sum(weights, axis=1))
            v = tl.load(v_cache + at, mask=kv_live, other=0.0).to(PRODUCT)
            acc = tl.dot(weights.to(PRODUCT), v, acc * decay[:, None], input_precision="ieee")
            top = highest
        if SPREAD:
            to = head * num_splits + split
            tl.store(partial_out + to[:, None] * D_PAD + d_ids[None, :], acc, mask=live[:, None])
            tl.store(partial_sums + to * 2, top, mask=live)
            tl.store(partial_sums + to * 2 + 1, sums, mask=live)
        else:
            top_all, sums_all, acc_all = _fold(top_all, sums_all, acc_all, top, sums, acc)

    if not SPREAD:
        result = acc_all / tl.where(sums_all == 0.0, 1.0, sums_all)[:, None]
        out_at = out + head[:, None] * HEAD_DIM + d_ids[None, :]
        tl.store(out_at, result.to(out.dtype.element_ty), mask=live[:, None] & d_live[None, :])


@triton.jit(do_not_specialize=COUNTS)
def _fold_kernel(
    seq_lens,
    query_start,
    out,
    partial_out,
    partial_sums,
    num_tokens,
    num_rows,
    num_splits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A program a token and BLOCK_H heads."""
    token = tl.program_id(0)
    low = 0  # the last row that begins at or before the token
    high = num_rows + 1
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) <= token:
            low = middle + 1
        else:
            high = middle
    row = low - 1
    is_row = row < num_rows
    end = tl.load(query_start + row + 1, mask=is_row, other=num_tokens)
    seq_len = tl.load(seq_lens + row, mask=is_row, other=0)
    position = tl.where(seq_len > 0, seq_len - end + token, -1)
    first_split = 0
    if WINDOW > 0:
        first_split = tl.maximum(position - WINDOW + 1, 0) // SPLIT

    h_ids = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    h_live = h_ids < HEADS
    d_ids = tl.arange(0, D_PAD)
    head = token.to(tl.int64) * HEADS + h_ids
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, D_PAD], tl.float32)
    for split in tl.range(first_split, (position + SPLIT) // SPLIT, num_stages=4):
        at = head * num_splits + split
        top_new = tl.load(partial_sums + at * 2, mask=h_live, other=float("-inf"))
        sums_new = tl.load(partial_sums + at * 2 + 1, mask=h_live, other=0.0)
        acc_at = partial_out + at[:, None] * D_PAD + d_ids[None, :]
        acc_new = tl.load(acc_at, mask=h_live[:, None], other=0.0)
        top, sums, acc = _fold(top, sums, acc, top_new, sums_new, acc_new)
    result = acc / tl.where(sums == 0.0, 1.0, sums)[:, None]
    out_at = out + head[:, None] * HEAD_DIM + d_ids[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=h_live[:, None] & (d_ids < HEAD_DIM)[None, :])


def programs_for_splits(num_tiles: int, num_splits: int, partial_bytes: int, device: torch.device) -> int:
    """How many programs share a tile's splits: enough for four a processor, since rows differ in length."""
    if num_splits <= 1 or partial_bytes > WORKSPACE_BYTES:
        return 1
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    )
    return min(num_splits, -(-4 * processors // max(1, num_tiles)))


FOLD_HEADS = 4
FOLD_OPTIONS = {"num_warps": 4, **EXACT}


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
    `shared` is not used yet."""
    num_tokens, num_heads, head_dim = q.shape
    _, page_size, num_kv_heads, _ = k_cache.shape
    num_rows, max_pages = page_table.shape
    if out is None:
        out = torch.empty_like(q)
    if num_tokens == 0:
        return out
    product = product_dtype(q.dtype, k_cache.dtype)
    group = num_heads // num_kv_heads
    tile = tiling(head_dim, group, product)
    d_pad = padded_dim(head_dim)
    num_splits = max(1, triton.cdiv(max_pages * page_size, SPLIT))
    blocks = num_tokens // (tile.rows // group) + num_rows + 1
    partial_shape = (num_tokens, num_heads, num_splits, d_pad)
    programs = programs_for_splits(
        blocks * num_kv_heads, num_splits, 4 * torch.Size(partial_shape).numel(), q.device
    )
    spread = programs > 1
    partial_out = partial_sums = out
    if spread:
        partial_out = torch.empty(partial_shape, dtype=torch.float32, device=q.device)
        partial_sums = torch.empty((*partial_shape[:3], 2), dtype=torch.float32, device=q.device)
    _attend_kernel[(blocks, num_kv_heads, programs)](
        q,
        k_cache,
        v_cache,
        page_table,
        seq_lens,
        query_start,
        out,
        partial_out,
        partial_sums,
        num_tokens,
        num_rows,
        page_table.stride(0),
        num_splits,
        (head_dim**-0.5 if scale is None else scale) * LOG2_E,
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        D_PAD=d_pad,
        PAGE_SIZE=page_size,
        WINDOW=window or 0,
        PRODUCT=TL_DTYPES[product],
        SPLIT=SPLIT,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        SPREAD=spread,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **EXACT,
    )
    if spread:
        _fold_kernel[(num_tokens, triton.cdiv(num_heads, FOLD_HEADS))](
            seq_lens,
            query_start,
            out,
            partial_out,
            partial_sums,
            num_tokens,
            num_rows,
            num_splits,
            HEADS=num_heads,
            HEAD_DIM=head_dim,
            D_PAD=d_pad,
            WINDOW=window or 0,
            SPLIT=SPLIT,
            BLOCK_H=FOLD_HEADS,
            **FOLD_OPTIONS,
        )
    return out


def compile_cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """See benchmarks/compile_triton.py. Shapes of models in use: heads, kv heads, head_dim."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    shapes = [(8, 2, 32), (14, 2, 64), (32, 8, 128), (16, 8, 256), (32, 32, 96)]
    dtypes = [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ]
    for (heads, kv_heads, head_dim), (dtype, kv_dtype) in ((s, d) for s in shapes for d in dtypes):
        if dtype != torch.bfloat16 and head_dim not in (64, 128):
            continue
        product = product_dtype(dtype, kv_dtype)
        tile = tiling(head_dim, heads // kv_heads, product)
        common = {"HEADS": heads, "HEAD_DIM": head_dim, "D_PAD": padded_dim(head_dim), "SPLIT": SPLIT}
        signature = {
            **dict.fromkeys(("q", "out"), f"*{names[dtype]}"),
            **dict.fromkeys(("k_cache", "v_cache"), f"*{names[kv_dtype]}"),
            **dict.fromkeys(("page_table", "seq_lens", "query_start"), "*i32"),
            **dict.fromkeys(("partial_out", "partial_sums"), "*fp32"),
            **dict.fromkeys(COUNTS, "i32"),
            "scale_log2e": "fp32",
        }
        for phase, window in (("decode", 0), ("prefill", 0), ("decode", 4096)):
            if window and head_dim != 128:
                continue
            constexprs = {
                **common,
                "KV_HEADS": kv_heads,
                "PAGE_SIZE": 16,
                "WINDOW": window,
                "PRODUCT": TL_DTYPES[product],
                "BLOCK_M": tile.rows,
                "BLOCK_N": tile.keys,
                "SPREAD": phase == "decode",
            }
            name = f"{phase} {names[dtype]}-{names[kv_dtype]} {heads}/{kv_heads}x{head_dim}"
            options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **EXACT}
            yield f"{name} window" if window else name, _attend_kernel, signature, constexprs, options
        if kv_dtype == dtype == torch.bfloat16:
            signature = {
                **dict.fromkeys(("seq_lens", "query_start"), "*i32"),
                "out": f"*{names[dtype]}",
                **dict.fromkeys(("partial_out", "partial_sums"), "*fp32"),
                **dict.fromkeys(("num_tokens", "num_rows", "num_splits"), "i32"),
            }
            constexprs = {**common, "WINDOW": 0, "BLOCK_H": FOLD_HEADS}
            yield f"decode fold x{head_dim}", _fold_kernel, signature, constexprs, FOLD_OPTIONS
