"""Attention in Triton, a row's own keys: the kernel of decode and prefill, and the one that folds splits."""

import triton
import triton.language as tl

from .triton_sweep import attend_block, fold, fold_stored, store_split

# Arguments that change from call to call: a kernel compiled for one value (1, multiples of 16) gains nothing.
COUNTS = ("num_tokens", "num_rows", "table_stride", "num_splits")


@triton.jit
def _find_row(query_start, num_rows, value, QUERIES: tl.constexpr):
    """The last row r, or num_rows, with query_start[r] // QUERIES <= value."""
    low = 0
    high = num_rows + 1
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // QUERIES <= value:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _store(out, place, live, sums, acc, HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr):
    d_ids = tl.arange(0, D_PAD)
    result = acc / tl.where(sums == 0.0, 1.0, sums)[:, None]
    out_at = out + place[:, None] * HEAD_DIM + d_ids[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=live[:, None] & (d_ids < HEAD_DIM)[None, :])


@triton.jit
def _sweep(
    q_tile,
    k_cache,
    v_cache,
    table,
    partial_out,
    partial_sums,
    kv_head,
    position,
    live,
    place,
    last,
    oldest,
    least,  # position of the tile's first query
    first_split,
    step,
    begin_block,
    end_block,
    num_splits,
    top_all,
    sums_all,
    acc_all,
    scale_log2e,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    PRODUCT: tl.constexpr,
    FP8_BITS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPREAD: tl.constexpr,
    WATCH: tl.constexpr,
):
    """Splits first_split, first_split + step, … by blocks begin_block … end_block - 1 of theirs: each is
    stored where SPREAD, otherwise added to (top_all, sums_all, acc_all). These are returned and, where WATCH,
    1 if there was a NaN or an infinity among values that not every query sees, else 0."""
    BLOCKS: tl.constexpr = SPLIT // BLOCK_N
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    found = 0
    for block in range(begin_block, end_block):  # one loop, so that loads run ahead over the ends of splits
        split = first_split + block // BLOCKS * step
        begin = split * SPLIT + block % BLOCKS * BLOCK_N
        fresh = block % BLOCKS == 0
        top = tl.where(fresh, float("-inf"), top)
        sums = tl.where(fresh, 0.0, sums)
        acc = tl.where(fresh, 0.0, acc)
        top, sums, acc, v = attend_block(
            q_tile,
            k_cache,
            v_cache,
            table,
            kv_head,
            begin,
            last,
            oldest,
            position,
            top,
            sums,
            acc,
            scale_log2e,
            KV_HEADS,
            HEAD_DIM,
            D_PAD,
            PAGE_SIZE,
            WINDOW,
            PRODUCT,
            FP8_BITS,
            BLOCK_N,
            WHOLE=False,
        )
        if WATCH:
            apart = begin + BLOCK_N > least + 1
            if WINDOW > 0:
                apart |= begin <= last - WINDOW
            if apart:
                wide = v.to(tl.float32)
                found |= tl.max((wide - wide != 0.0).to(tl.int32))
        if (block % BLOCKS == BLOCKS - 1) | (block == end_block - 1):
            if SPREAD:
                store_split(
                    partial_out,
                    partial_sums,
                    place,
                    live,
                    split,
                    num_splits,
                    top,
                    sums,
                    acc,
                    HEAD_DIM,
                    D_PAD,
                )
            else:
                top_all, sums_all, acc_all = fold(top_all, sums_all, acc_all, top, sums, acc)
    return top_all, sums_all, acc_all, found


@triton.jit(do_not_specialize=COUNTS)
def attend_kernel(
    q,
    k_cache,
    v_cache,
    page_table,
    seq_lens,
    query_start,
    shared_splits,  # int32 [R], where SHARED: how many splits of the row shared_kernel has done
    out,
    partial_out,  # float32 [T, HEADS, splits, HEAD_DIM], where SPREAD or SHARED
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
    FP8_BITS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUERIES: tl.constexpr,  # of a tile
    SPREAD: tl.constexpr,  # splits go to program_id(2); otherwise this program walks and folds them all
    SHARED: tl.constexpr,
    PDL: tl.constexpr,  # see gpu.dependent_launch; every program waits, also one with nothing to do
):
    """Programs 0 … num_rows take the first QUERIES queries of a row, with those past the last row's as one
    row more; the others the rest. Row r's rest begins at query_start[r] // QUERIES: so each has enough
    programs, and their number is bounded by sizes the host knows."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    BLOCKS: tl.constexpr = SPLIT // BLOCK_N
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    first = 0  # query of the row
    rest = row - num_rows - 1
    if rest >= 0:
        row = _find_row(query_start, num_rows, rest, QUERIES)
        first = (rest - tl.load(query_start + row) // QUERIES + 1) * QUERIES
    is_row = row < num_rows
    start = tl.load(query_start + row)
    count = tl.load(query_start + row + 1, mask=is_row, other=num_tokens) - start
    seq_len = tl.load(seq_lens + row, mask=is_row, other=0)
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
    place = (start + query).to(tl.int64) * HEADS + kv_head * GROUP + m_ids % GROUP
    q_live = live[:, None] & (d_ids < HEAD_DIM)[None, :]
    q_tile = tl.load(q + place[:, None] * HEAD_DIM + d_ids[None, :], mask=q_live, other=0.0).to(PRODUCT)

    top_all = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums_all = tl.zeros([BLOCK_M], tl.float32)
    acc_all = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    end_split = (last + SPLIT) // SPLIT
    first_split = oldest // SPLIT
    if SHARED:
        first_split = tl.minimum(tl.load(shared_splits + row), end_split)
        if not SPREAD:
            top_all, sums_all, acc_all = fold_stored(
                partial_out,
                partial_sums,
                place,
                live,
                0,
                first_split,
                num_splits,
                HEAD_DIM,
                D_PAD,
                BLOCK_M,
                AHEAD=4,
            )
    step = 1
    if SPREAD:
        first_split += tl.program_id(2)
        step = tl.num_programs(2)
    begin_block = tl.maximum(oldest - first_split * SPLIT, 0) // BLOCK_N
    last_split = first_split + (end_split - 1 - first_split) // step * step
    end_block = (last_split - first_split) // step * BLOCKS
    end_block += tl.minimum((last - last_split * SPLIT) // BLOCK_N + 1, BLOCKS)
    if first_split >= end_split:
        end_block = 0

    table = page_table + row.to(tl.int64) * table_stride
    _top, sums, acc, odd = _sweep(
        q_tile,
        k_cache,
        v_cache,
        table,
        partial_out,
        partial_sums,
        kv_head,
        position,
        live,
        place,
        last,
        oldest,
        offset + first,
        first_split,
        step,
        begin_block,
        end_block,
        num_splits,
        top_all,
        sums_all,
        acc_all,
        scale_log2e,
        KV_HEADS,
        HEAD_DIM,
        D_PAD,
        PAGE_SIZE,
        WINDOW,
        PRODUCT,
        FP8_BITS,
        SPLIT,
        BLOCK_M,
        BLOCK_N,
        SPREAD,
        WATCH=QUERIES > 1,
    )
    if not SPREAD:
        _store(out, place, live, sums, acc, HEAD_DIM, D_PAD)
    if QUERIES > 1:
        # A weight of 0 does not keep a NaN or an infinity out of a product. Once more, then, a query at a
        # time: values that it does not see are not loaded.
        again = tl.where(odd > 0, QUERIES, 0)
        for alone in range(again):
            one = live & (query == first + alone)
            at = tl.max(tl.where(one, position, -1))
            since = 0
            if WINDOW > 0:
                since = tl.maximum(at - WINDOW + 1, 0)
            _top, sums, acc, _odd = _sweep(
                q_tile,
                k_cache,
                v_cache,
                table,
                partial_out,
                partial_sums,
                kv_head,
                tl.where(one, position, -1),
                one,
                place,
                at,
                since,
                at,
                first_split,
                step,
                begin_block,
                end_block,
                num_splits,
                top_all,
                sums_all,
                acc_all,
                scale_log2e,
                KV_HEADS,
                HEAD_DIM,
                D_PAD,
                PAGE_SIZE,
                WINDOW,
                PRODUCT,
                FP8_BITS,
                SPLIT,
                BLOCK_M,
                BLOCK_N,
                SPREAD,
                WATCH=False,
            )
            if not SPREAD:
                _store(out, place, one, sums, acc, HEAD_DIM, D_PAD)


@triton.jit(do_not_specialize=COUNTS)
def fold_kernel(
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
    AHEAD: tl.constexpr,  # partial results on their way
    PDL: tl.constexpr,
):
    """A program a token and BLOCK_H heads."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    row = token  # as in decode
    if row < num_rows:
        start = tl.load(query_start + row)
        end = tl.load(query_start + row + 1)
        if (start != token) | (end != token + 1):
            row = _find_row(query_start, num_rows, token, 1)
    else:
        row = _find_row(query_start, num_rows, token, 1)
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
    place = token.to(tl.int64) * HEADS + h_ids
    _top, sums, acc = fold_stored(
        partial_out,
        partial_sums,
        place,
        h_live,
        first_split,
        (position + SPLIT) // SPLIT,
        num_splits,
        HEAD_DIM,
        D_PAD,
        BLOCK_H,
        AHEAD,
    )
    result = acc / tl.where(sums == 0.0, 1.0, sums)[:, None]
    out_at = out + place[:, None] * HEAD_DIM + d_ids[None, :]
    out_live = h_live[:, None] & (d_ids < HEAD_DIM)[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=out_live)
