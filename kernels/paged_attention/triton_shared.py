"""Attention in Triton, the prefixes that rows of a decode batch share: read once for a tile of rows."""

import triton
import triton.language as tl

from .triton_sweep import attend_block, store_split


@triton.jit(do_not_specialize=("num_rows", "table_stride", "num_splits"))
def shared_kernel(
    q,
    k_cache,
    v_cache,
    page_table,
    seq_lens,
    group_start,
    shared_len,
    shared_splits,  # int32 [R], written: splits of the row whose partial results are stored here
    partial_out,  # float32 [R, HEADS, splits, HEAD_DIM]
    partial_sums,  # float32 [R, HEADS, splits, 2]: maximum and sum of weights
    num_rows,
    table_stride,
    num_splits,
    scale_log2e,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRODUCT: tl.constexpr,
    FP8_BITS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes BLOCK_M // GROUP adjacent rows and one kv head, a group among them after the other, and
    of a group's shared splits every num_programs(2)-th. Only whole splits: the rest, and all of a group of
    one, is for the rows' own programs. Every row sees all these keys, so nothing is masked."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    ROWS: tl.constexpr = BLOCK_M // GROUP
    BLOCKS: tl.constexpr = SPLIT // BLOCK_N
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    begin_row = tl.program_id(0) * ROWS
    kv_head = tl.program_id(1)
    end_row = tl.minimum(begin_row + ROWS, num_rows)

    m_ids = tl.arange(0, BLOCK_M)
    row = begin_row + m_ids // GROUP
    in_tile = (m_ids < ROWS * GROUP) & (row < num_rows)
    lens = tl.load(seq_lens + row, mask=in_tile, other=0)
    running = in_tile & (lens > 0)
    d_ids = tl.arange(0, D_PAD)
    place = row.to(tl.int64) * HEADS + kv_head * GROUP + m_ids % GROUP
    q_live = running[:, None] & (d_ids < HEAD_DIM)[None, :]
    q_tile = tl.load(q + place[:, None] * HEAD_DIM + d_ids[None, :], mask=q_live, other=0.0).to(PRODUCT)

    low = 0  # the last group that begins at or before the tile
    high = num_rows + 1
    while low < high:
        middle = (low + high) // 2
        if tl.load(group_start + middle) <= begin_row:
            low = middle + 1
        else:
            high = middle
    group = low - 1
    start = tl.load(group_start + group)
    while start < end_row:
        end = tl.load(group_start + group + 1)
        length = tl.load(shared_len + group)
        member = (row >= start) & (row < end)
        live = running & member
        leader = tl.min(tl.where(live, row, num_rows))  # a row whose pages say where the prefix is
        alone = (end - start < 2) | (leader == num_rows)
        count = tl.where(alone, 0, tl.minimum(length // SPLIT, num_splits))
        if (kv_head == 0) & (tl.program_id(2) == 0):
            tl.store(shared_splits + row, tl.zeros([BLOCK_M], tl.int32) + count, mask=in_tile & member)
        table = page_table + leader.to(tl.int64) * table_stride
        first = tl.program_id(2)
        step = tl.num_programs(2)
        mine = tl.maximum(count - first + step - 1, 0) // step
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        sums = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
        for i in range(mine * BLOCKS):
            split = first + i // BLOCKS * step
            within = i % BLOCKS
            fresh = within == 0
            top = tl.where(fresh, float("-inf"), top)
            sums = tl.where(fresh, 0.0, sums)
            acc = tl.where(fresh, 0.0, acc)
            begin = split * SPLIT + within * BLOCK_N
            top, sums, acc, _v = attend_block(
                q_tile,
                k_cache,
                v_cache,
                table,
                kv_head,
                begin,
                begin,
                begin,
                row,
                top,
                sums,
                acc,
                scale_log2e,
                KV_HEADS,
                HEAD_DIM,
                D_PAD,
                PAGE_SIZE,
                0,
                PRODUCT,
                FP8_BITS,
                BLOCK_N,
                WHOLE=True,
            )
            if within == BLOCKS - 1:
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
        group += 1
        start = end
