"""What every attention kernel in Triton does with a block of keys, and how partial results are added up."""

import triton
import triton.language as tl


@triton.jit
def converted(x, PRODUCT: tl.constexpr, FP8_BITS: tl.constexpr):
    """Elements of the KV cache in the dtype of the products.

    FP8_BITS: they are the bytes of float8_e4m3fn, converted here. Moved up by 7, its bits are a float16 that
    is 2^8 too small (the exponents' biases are 7 and 15), subnormals included."""
    if FP8_BITS:
        half = ((x & 0x7F).to(tl.uint16) << 7) | ((x & 0x80).to(tl.uint16) << 8)
        value = half.to(tl.float16, bitcast=True) * 256.0
        return tl.where((x & 0x7F) == 0x7F, float("nan"), value).to(PRODUCT)
    return x.to(PRODUCT)


@triton.jit
def attend_block(
    q_tile,
    k_cache,
    v_cache,
    table,  # the row's page ids
    kv_head,
    begin,
    last,  # newest position that any row of the tile sees
    oldest,  # least
    position,  # newest that each row sees
    top,
    sums,
    acc,
    scale_log2e,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    PRODUCT: tl.constexpr,
    FP8_BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,  # every row sees every key of the block
):
    """The keys begin … begin + BLOCK_N - 1 added to (maximum, sum of weights, weighted sum of V): online
    softmax, base 2 (Milakov and Gimelshein 2018). Returns these and the values."""
    key = begin + tl.arange(0, BLOCK_N)
    d_ids = tl.arange(0, D_PAD)
    d_live = d_ids < HEAD_DIM
    if WHOLE:
        present = tl.full([BLOCK_N], True, tl.int1)
    else:
        present = key <= last
        if WINDOW > 0:
            present &= key >= oldest
    page = tl.load(table + key // PAGE_SIZE, mask=present, other=0)
    slot = page.to(tl.int64) * PAGE_SIZE + key % PAGE_SIZE
    at = ((slot * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + d_ids[None, :]
    kv_live = present[:, None] & d_live[None, :]
    NOTHING: tl.constexpr = 0 if FP8_BITS else 0.0
    k = converted(tl.load(k_cache + at, mask=kv_live, other=NOTHING), PRODUCT, FP8_BITS)
    scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee") * scale_log2e
    age = position[:, None] - key[None, :]
    seen = age >= 0
    if WINDOW > 0:
        seen &= age < WINDOW
    if not WHOLE:
        scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, axis=1))
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    decay = tl.exp2(top - safe)
    weights = tl.exp2(scores - safe[:, None])
    sums = tl.fma(sums, decay, tl.sum(weights, axis=1))
    v = converted(tl.load(v_cache + at, mask=kv_live, other=NOTHING), PRODUCT, FP8_BITS)
    acc = tl.dot(weights.to(PRODUCT), v, acc * decay[:, None], input_precision="ieee")
    return highest, sums, acc, v


@triton.jit
def fold(top, sums, acc, top_new, sums_new, acc_new):
    """One partial result added to another as log-sum-exp, base 2. Without keys: top -inf, sums 0."""
    highest = tl.maximum(top, top_new)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    a = tl.exp2(top - safe)
    b = tl.exp2(top_new - safe)
    return highest, tl.fma(sums_new, b, sums * a), tl.fma(acc_new, b[:, None], acc * a[:, None])


@triton.jit
def fold_stored(
    partial_out,
    partial_sums,
    place,  # int64: which [splits] of partial results each row of the tile has
    live,
    first_split,
    end_split,
    num_splits,
    HEAD_DIM: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """The stored results of splits first_split … end_split - 1, folded in order."""
    d_ids = tl.arange(0, D_PAD)
    acc_live = live[:, None] & (d_ids < HEAD_DIM)[None, :]
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D_PAD], tl.float32)
    for split in tl.range(first_split, end_split, num_stages=AHEAD):
        at = place * num_splits + split
        top_new = tl.load(partial_sums + at * 2, mask=live, other=float("-inf"))
        sums_new = tl.load(partial_sums + at * 2 + 1, mask=live, other=0.0)
        acc_new = tl.load(partial_out + at[:, None] * HEAD_DIM + d_ids[None, :], mask=acc_live, other=0.0)
        top, sums, acc = fold(top, sums, acc, top_new, sums_new, acc_new)
    return top, sums, acc


@triton.jit
def store_split(
    partial_out,
    partial_sums,
    place,
    live,
    split,
    num_splits,
    top,
    sums,
    acc,
    HEAD_DIM: tl.constexpr,
    D_PAD: tl.constexpr,
):
    d_ids = tl.arange(0, D_PAD)
    at = place * num_splits + split
    acc_live = live[:, None] & (d_ids < HEAD_DIM)[None, :]
    tl.store(partial_out + at[:, None] * HEAD_DIM + d_ids[None, :], acc, mask=acc_live)
    tl.store(partial_sums + at * 2, top, mask=live)
    tl.store(partial_sums + at * 2 + 1, sums, mask=live)
