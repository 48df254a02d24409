"""`sample` in Triton, for NVIDIA GPUs: two launches, whatever the options.

No GPU has run these kernels: they are compared with the reference under Triton's interpreter, and compiled
for sm_80, sm_90 and sm_100 (benchmarks/compile_triton.py). Nothing is tuned.

The first launch has a program for every TILE ids of every row; the second, a program a row, folds what they
found. A single launch with a program a row would leave most of the GPU idle at the batches of decoding.
Greedy rows and rows without filters are drawn in the first launch. Filtered rows find their thresholds in the
second, by bisection over the bits of a float, among the few entries above a cheap bound: nothing is sorted.

Tiles and the order of folding depend on the vocabulary alone: a row's bits do not depend on the batch.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from . import Sampled, SamplingTable, empty
from .triton_noise import gumbel, log, words

TILE = 2048  # ids a program of the first launch
GROUPS = 32  # of a tile, whose maxima bound the k-th largest
BLOCK = 4096  # ids at a time in the second launch: a multiple of TILE
CAPACITY = 16384  # candidates listed a row; past that, the second launch searches the row itself
# No contraction that the code does not spell out.
SCAN_OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}
FINISH_OPTIONS: dict[str, Any] = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": False}

LEAST = tl.constexpr(-3.4028234663852886e38)
TABLE = SamplingTable._fields


def why_unavailable() -> str | None:
    if triton.knobs.runtime.interpret or torch.cuda.is_available():
        return None
    return "Triton needs a CUDA device (or TRITON_INTERPRET=1, to run slowly on the CPU)"


@triton.jit
def _inverse(temperature):
    """1 / T, 1 for a greedy row; finite, so that 0 times it is 0."""
    return tl.minimum(tl.div_rn(1.0, tl.where(temperature > 0, temperature, 1.0)), -LEAST)


@triton.jit
def _is_modified(
    slot, position, repetition, presence, frequency, ban_until, ban_ids, bias_ids, vocab,
    PENALTIES: tl.constexpr, BANS: tl.constexpr, BIASES: tl.constexpr,
    BAN_PAD: tl.constexpr, BIAS_PAD: tl.constexpr,
):  # fmt: skip
    """Whether there are penalties, bias, bans to apply: three int32."""
    penalized = 0
    if PENALTIES:
        on = (tl.load(repetition + slot) != 1.0) | (tl.load(presence + slot) != 0.0)
        penalized = (on | (tl.load(frequency + slot) != 0.0)).to(tl.int32)
    biased = 0
    if BIASES > 0:
        at = tl.arange(0, BIAS_PAD)
        ids = tl.load(bias_ids + slot * BIASES + at, mask=at < BIASES, other=-1)
        biased = tl.max(((ids >= 0) & (ids < vocab)).to(tl.int32), axis=0)
    banned = 0
    if BANS > 0:
        at = tl.arange(0, BAN_PAD)
        ids = tl.load(ban_ids + slot * BANS + at, mask=at < BANS, other=-1)
        banned = tl.max(((ids >= 0) & (ids < vocab)).to(tl.int32), axis=0)
        banned = tl.where(position < tl.load(ban_until + slot), banned, 0)
    return penalized, biased, banned


@triton.jit
def _max_and_mass(x, inverse):
    """A tile's maximum (NaN where it holds one), the sum of exp((x - max) / T), and (x - max) / T."""
    nan = tl.max((x != x).to(tl.int32), axis=0)
    x = tl.where(x == x, x, float("-inf"))
    top = tl.max(x, axis=0)
    y = (x - tl.where(tl.abs(top) == float("inf"), 0.0, top)) * inverse
    return tl.where(nan > 0, float("nan"), top), tl.sum(tl.exp(y), axis=0), y


@triton.jit
def _scan_kernel(
    logits, slots, positions,
    temperature, top_k, top_p, min_p, seed, sample_index, repetition, presence, frequency,
    ban_until, ban_ids, bias_ids, bias_values, output_counts, prompt_mask,
    modified,  # float32 [R, V]: logits after steps 1 and 2, of rows where they do anything
    partial,  # float32 [R, 5, splits]: raw maximum and mass, modified maximum and mass, best score above it
    best_id,  # int32 [R, splits]
    group_max,  # float32 [R, splits, GROUPS], of rows with top-k
    vocab, num_splits,
    PENALTIES: tl.constexpr, BANS: tl.constexpr, BIASES: tl.constexpr,
    BAN_PAD: tl.constexpr, BIAS_PAD: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        return
    position = tl.load(positions + row)
    scale = tl.load(temperature + slot)
    inverse = _inverse(scale)
    start = split * TILE
    ids = start + tl.arange(0, TILE)
    live = ids < vocab
    x = tl.load(logits + row * vocab + ids, mask=live, other=float("-inf"))
    out = partial + row * 5 * num_splits + split
    top, mass, y = _max_and_mass(x, inverse)
    tl.store(out, top)
    tl.store(out + num_splits, mass)

    penalized, biased, banned = _is_modified(
        slot, position, repetition, presence, frequency, ban_until, ban_ids, bias_ids, vocab,
        PENALTIES, BANS, BIASES, BAN_PAD, BIAS_PAD,
    )  # fmt: skip
    if penalized + biased + banned > 0:
        if PENALTIES:  # noqa: SIM102 - known to the compiler, what follows is not
            if penalized > 0:
                count = tl.load(output_counts + slot * vocab + ids, mask=live, other=0)
                in_prompt = tl.load(prompt_mask + slot * vocab + ids, mask=live, other=0)
                factor = tl.load(repetition + slot)
                repeated = tl.where(x > 0, tl.div_rn(x, tl.zeros([TILE], tl.float32) + factor), x * factor)
                x = tl.where((count > 0) | (in_prompt != 0), repeated, x)
                reduced = x - tl.load(frequency + slot) * count.to(tl.float32) - tl.load(presence + slot)
                x = tl.where(count > 0, reduced, x)
        for i in range(BIASES):
            token = tl.load(bias_ids + slot * BIASES + i)
            if (token >= start) & (token < start + TILE):
                x = tl.where(ids == token, x + tl.load(bias_values + slot * BIASES + i), x)
        if banned > 0:
            for i in range(BANS):
                token = tl.load(ban_ids + slot * BANS + i)
                x = tl.where(ids == token, float("-inf"), x)
        x = tl.where(live, x, float("-inf"))
        tl.store(modified + row * vocab + ids, x, mask=live)
        top, mass, y = _max_and_mass(x, inverse)
    tl.store(out + 2 * num_splits, top)
    tl.store(out + 3 * num_splits, mass)

    k = tl.load(top_k + slot)
    by_count = (k > 0) & (k < vocab)
    filtered = by_count | (tl.load(top_p + slot) < 1.0) | (tl.load(min_p + slot) > 0.0)
    if scale > 0:
        if filtered:
            if by_count:
                clean = tl.where(x == x, x, float("-inf"))
                groups = tl.max(tl.reshape(clean, [GROUPS, TILE // GROUPS]), axis=1)
                at = (row * num_splits + split) * GROUPS + tl.arange(0, GROUPS)
                tl.store(group_max + at, groups)
        else:
            y += gumbel(words(start, tl.load(seed + slot), tl.load(sample_index + slot), position, TILE))
    tl.store(out + 4 * num_splits, tl.max(y, axis=0))
    tl.store(best_id + row * num_splits + split, start + tl.argmax(y, axis=0))


@triton.jit
def _key(value):
    """int64, rising with the float32 value; -0 lies just below 0."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _value(key):
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _count_from(source, size, value, BLOCK: tl.constexpr):
    """How many entries reach `value`."""
    total = 0
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(source + at, mask=at < size, other=float("-inf"))
        total += tl.sum((x >= value).to(tl.int32), axis=0)
    return total


@triton.jit
def _mass_above(source, size, value, least, top, inverse, BLOCK: tl.constexpr):
    """The mass of the entries above `value` that reach `least`."""
    total = 0.0
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(source + at, mask=at < size, other=float("-inf"))
        counted = (x > value) & (x >= least)
        total += tl.sum(tl.where(counted, tl.exp((x - top) * inverse), 0.0), axis=0)
    return total


@triton.jit
def _kth_largest(source, size, k, least, most, BLOCK: tl.constexpr):
    """The largest value, from `least` (which k entries reach) to `most`, that k entries reach."""
    low = _key(least)
    high = _key(most)
    while low < high:
        middle = (low + high + 1) >> 1
        if _count_from(source, size, _value(middle), BLOCK) >= k:
            low = middle
        else:
            high = middle - 1
    return _value(low)


@triton.jit
def _block_top(tile_maxima, start, num_splits, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The maximum of the ids start .. start + BLOCK."""
    at = start // TILE + tl.arange(0, BLOCK // TILE)
    return tl.max(tl.load(tile_maxima + at, mask=at < num_splits, other=float("-inf")), axis=0)


@triton.jit
def _finish_kernel(
    token_out, lse_out, logprob_out,
    logits, slots, positions,
    temperature, top_k, top_p, min_p, seed, sample_index, repetition, presence, frequency,
    ban_until, ban_ids, bias_ids,
    modified, partial, best_id, group_max,
    candidates,  # float32 [R, CAPACITY]
    vocab, num_splits,
    PENALTIES: tl.constexpr, BANS: tl.constexpr, BIASES: tl.constexpr,
    BAN_PAD: tl.constexpr, BIAS_PAD: tl.constexpr, SPLIT_PAD: tl.constexpr,
    TILE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    tl.store(token_out + row, -1)
    tl.store(lse_out + row, 0.0)
    tl.store(logprob_out + row, 0.0)
    if slot < 0:
        return
    position = tl.load(positions + row)
    scale = tl.load(temperature + slot)
    inverse = _inverse(scale)

    # The tiles' maxima and masses, folded.
    at = tl.arange(0, SPLIT_PAD)
    some = at < num_splits
    tops = partial + row * 5 * num_splits + at
    raw_tops = tl.load(tops, mask=some, other=float("-inf"))
    nan = tl.max((raw_tops != raw_tops).to(tl.int32), axis=0) > 0
    raw_tops = tl.where(raw_tops == raw_tops, raw_tops, float("-inf"))
    raw_top = tl.max(raw_tops, axis=0)
    raw_finite = (raw_top != float("-inf")) & (raw_top != float("inf")) & (nan == 0)
    masses = tl.load(tops + num_splits, mask=some, other=0.0)
    raw_safe = tl.where(raw_finite, raw_top, 0.0)
    raw_mass = tl.sum(
        tl.where(raw_tops > float("-inf"), masses * tl.exp((raw_tops - raw_safe) * inverse), 0.0)
    )
    raw_mass = tl.where(raw_finite, raw_mass, 1.0)
    shift = tl.where(scale > 0, scale, 1.0).to(tl.float64)
    lse = (raw_safe.to(tl.float64) / shift + log(raw_mass).to(tl.float64)).to(tl.float32)
    lse = tl.where(raw_finite, lse, tl.where(nan, float("nan"), raw_top))
    tl.store(lse_out + row, lse)

    tile_tops = tl.load(tops + 2 * num_splits, mask=some, other=float("-inf"))
    nan_after = tl.max((tile_tops != tile_tops).to(tl.int32), axis=0) > 0
    tile_tops = tl.where(tile_tops == tile_tops, tile_tops, float("-inf"))
    top = tl.max(tile_tops, axis=0)
    if (raw_finite == 0) | nan_after | (top == float("-inf")) | (top == float("inf")):
        return
    masses = tl.load(tops + 3 * num_splits, mask=some, other=0.0)
    mass = tl.sum(tl.where(tile_tops > float("-inf"), masses * tl.exp((tile_tops - top) * inverse), 0.0))

    penalized, biased, banned = _is_modified(
        slot, position, repetition, presence, frequency, ban_until, ban_ids, bias_ids, vocab,
        PENALTIES, BANS, BIASES, BAN_PAD, BIAS_PAD,
    )  # fmt: skip
    is_modified = penalized + biased + banned > 0
    k = tl.load(top_k + slot)
    p = tl.maximum(tl.load(top_p + slot), 0.0)
    ratio = tl.load(min_p + slot)
    by_count = (k > 0) & (k < vocab)
    by_mass = p < 1.0
    by_ratio = ratio > 0.0
    if ((by_count | by_mass | by_ratio) == 0) | ((scale > 0) == 0):
        # Drawn in the first launch: the best of the tiles' bests, the lowest id on ties.
        bests = tl.load(tops + 4 * num_splits, mask=some, other=float("-inf"))
        scores = tl.where(tile_tops > float("-inf"), (tile_tops - top) * inverse + bests, float("-inf"))
        ids = tl.load(best_id + row * num_splits + at, mask=some, other=0x7FFFFFFF)
        token = tl.min(tl.where(scores == tl.max(scores, axis=0), ids, 0x7FFFFFFF), axis=0)
        tl.store(token_out + row, token)
        if scale > 0:
            if is_modified:
                y = (tl.load(modified + row * vocab + token) - top) * inverse
                tl.store(logprob_out + row, y - log(mass))
            else:
                tl.store(logprob_out + row, tl.div_rn(tl.load(logits + row * vocab + token), scale) - lse)
        return

    bottom = tl.full([], LEAST, tl.float32)
    source = logits + row * vocab
    if is_modified:
        source = modified + row * vocab

    # A floor below which nothing matters: all mass below y = log((1 - p) mass / V) together is less than the
    # 1 - p that top-p leaves out; with top-k, the k-th largest maximum of the groups. 1e-3 is for rounding.
    least_y = tl.where(by_ratio, log(tl.where(by_ratio, tl.minimum(ratio, 1.0), 1.0)), float("-inf"))
    by_ratio_alone = by_ratio & ((by_count & by_mass) == 0)
    floor_y = tl.where(by_ratio_alone, least_y - 1e-3, float("-inf"))
    if by_mass & (by_count == 0):
        left_out = tl.maximum((1.0 - p) * mass / vocab.to(tl.float32), 1e-37)
        floor_y = tl.maximum(floor_y, log(left_out) - 1e-3)
    floor = tl.where(floor_y == float("-inf"), bottom, top + floor_y * scale - tl.abs(top) * 3e-7)
    floor = tl.minimum(tl.maximum(floor, bottom), top)
    if by_count & (num_splits * GROUPS >= k):
        groups = group_max + row * num_splits * GROUPS
        if _count_from(groups, num_splits * GROUPS, bottom, BLOCK) >= k:
            floor = tl.maximum(floor, _kth_largest(groups, num_splits * GROUPS, k, bottom, top, BLOCK))

    # Candidates are listed in order, as many as fit.
    tile_maxima = partial + (row * 5 + 2) * num_splits
    listed = candidates + row * CAPACITY
    size = 0
    for start in range(0, vocab, BLOCK):
        if _block_top(tile_maxima, start, num_splits, TILE, BLOCK) >= floor:
            ids = start + tl.arange(0, BLOCK)
            x = tl.load(source + ids, mask=ids < vocab, other=float("-inf"))
            taken = (x >= floor).to(tl.int32)
            to = size + tl.cumsum(taken, axis=0) - 1
            tl.store(listed + to, x, mask=(taken > 0) & (to < CAPACITY))
            size += tl.sum(taken, axis=0)
    tl.debug_barrier()  # what one thread stored, others load below
    domain = source
    domain_size = vocab
    if size <= CAPACITY:
        domain = listed
        domain_size = size

    least = floor
    if by_count & (size > k):
        least = _kth_largest(domain, domain_size, k, floor, top, BLOCK)
    if by_mass:
        total = mass
        if by_count:
            total = _mass_above(domain, domain_size, float("-inf"), least, top, inverse, BLOCK)
        # The smallest value with less than p of the mass above it.
        low = _key(tl.maximum(floor, least))
        high = _key(top)
        while low < high:
            middle = (low + high) >> 1
            if _mass_above(domain, domain_size, _value(middle), least, top, inverse, BLOCK) < p * total:
                high = middle
            else:
                low = middle + 1
        least = _value(low)

    # The draw, over the tiles that hold anything kept.
    mass = 0.0
    best = float("-inf")
    token = 0
    for start in range(0, vocab, BLOCK):
        if _block_top(tile_maxima, start, num_splits, TILE, BLOCK) >= least:
            ids = start + tl.arange(0, BLOCK)
            x = tl.load(source + ids, mask=ids < vocab, other=float("-inf"))
            y = (x - top) * inverse
            kept = (x >= least) & (y >= least_y) & (x > float("-inf"))
            mass += tl.sum(tl.where(kept, tl.exp(y), 0.0), axis=0)
            noise = gumbel(words(start, tl.load(seed + slot), tl.load(sample_index + slot), position, BLOCK))
            score = tl.where(kept, y + noise, float("-inf"))
            highest = tl.max(score, axis=0)
            token = tl.where(highest > best, start + tl.argmax(score, axis=0), token)
            best = tl.maximum(best, highest)
    tl.store(token_out + row, token)
    tl.store(logprob_out + row, (tl.load(source + token) - top) * inverse - log(mass))


def sample(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    table: SamplingTable,
    *,
    out: Sampled | None = None,
) -> Sampled:
    """See `kernels.sample.sample`; unchecked. Reads no tensor on the host."""
    if out is None:
        out = empty(logits)
    rows, vocab = logits.shape
    if rows == 0:
        return out
    shared = constants(table.output_counts is not None, table.ban_ids.shape[1], table.bias_ids.shape[1])
    splits = triton.cdiv(vocab, TILE)

    def space(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits.device)

    best_id = torch.empty((rows, splits), dtype=torch.int32, device=logits.device)
    changes = shared["PENALTIES"] or shared["BANS"] or shared["BIASES"]
    modified = space(rows, vocab) if changes else logits
    work = (modified, space(rows, 5, splits), best_id, space(rows, splits, GROUPS))
    options = [logits if part is None else part for part in table]
    common = (logits, slots, positions, *options)
    _scan_kernel[(splits, rows)](*common, *work, vocab, splits, **shared, **SCAN_OPTIONS)
    _finish_kernel[(rows,)](
        *out,
        *common[: 3 + TABLE.index("bias_values")],
        *work,
        space(rows, CAPACITY),
        vocab,
        splits,
        SPLIT_PAD=triton.next_power_of_2(splits),
        BLOCK=BLOCK,
        CAPACITY=CAPACITY,
        **shared,
        **FINISH_OPTIONS,
    )
    return out


def constants(penalties: bool, bans: int, biases: int) -> dict[str, Any]:
    """The constexprs that both kernels take."""
    padded = {
        "BAN_PAD": triton.next_power_of_2(max(1, bans)),
        "BIAS_PAD": triton.next_power_of_2(max(1, biases)),
    }
    return {"PENALTIES": penalties, "BANS": bans, "BIASES": biases, **padded, "TILE": TILE, "GROUPS": GROUPS}


def compile_cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """See benchmarks/compile_triton.py."""
    floats = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency", "bias_values")
    types = {name: "*fp32" if name in floats else "*i32" for name in TABLE}
    types |= {"seed": "*i64", "prompt_mask": "*u8"}
    types |= dict.fromkeys(("logits", "modified", "partial", "group_max"), "*fp32")
    types |= dict.fromkeys(("slots", "positions", "best_id"), "*i32") | {"num_splits": "i32"}
    results = {"token_out": "*i32", "lse_out": "*fp32", "logprob_out": "*fp32", "candidates": "*fp32"}
    unused = ("bias_values", "output_counts", "prompt_mask")
    for name, shared in (("plain", constants(False, 0, 0)), ("every option", constants(True, 8, 16))):
        for suffix, vocab in (("", "i32:16"), (" odd vocabulary", "i32")):
            signature = {**types, "vocab": vocab}
            yield f"scan {name}{suffix}", _scan_kernel, signature, shared, SCAN_OPTIONS
            signature = {key: kind for key, kind in signature.items() if key not in unused} | results
            constexprs = {**shared, "SPLIT_PAD": 128, "BLOCK": BLOCK, "CAPACITY": CAPACITY}
            yield f"finish {name}{suffix}", _finish_kernel, signature, constexprs, FINISH_OPTIONS
