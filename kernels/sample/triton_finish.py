"""The second launch of `sample` and `draw`: a program a row folds what the scan found, and draws.

Rows without a filter have been drawn by the scan: their best tile wins. A filtered row looks for its
thresholds among few entries, without sorting: a bound from below says which groups of GROUP ids can matter;
the entries of those that reach it are listed; thresholds are bisected over the list, in the order of float
bits, until they separate the same entries as the exact ones would; noise is drawn for what is kept.

Latency of one row, predicted (nothing here has been timed): slot, parameters, maxima and masses are three
dependent loads, 1 us; a plain row is then done. A filter adds the groups' maxima and the choice of a bound,
2 us, the list, 2 us, and four or five passes of 0.2 us a threshold: 6 to 7 us for top-k with top-p. The bytes
are few: 19 kB of maxima, 128 a hot group. Rows so flat that their top-p takes more than CAPACITY entries go
over the whole row in every pass: at V = 152k some 0.4 ms.
"""

from typing import Any

import triton
import triton.language as tl

from .triton_noise import gumbel, log, words, words_of
from .triton_scan import LEAST, changed, changes, inverse_of

HOT = 256  # groups that a bound is first tried to leave
BLOCK = 1024  # entries at a time
CAPACITY = 16384  # entries of a row's list; the last is not used
OPTIONS: dict[str, Any] = {"num_warps": 8, "maxnreg": 224, "num_stages": 1, "enable_fp_fusion": False}


@triton.jit
def _key(value):
    """int32, rising with the float32 value; -0 lies just below 0."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _middle(low, high):
    """(low + high) / 2, rounded down, of int32 whose sum may not fit."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _pivots(low, high):
    """Eight keys that part the range (low, high] evenly; the last is `high`."""
    width = high.to(tl.int64) - low
    return (low + ((width * (tl.arange(0, 8) + 1)) >> 3)).to(tl.int32)


@triton.jit
def _logits_of(
    ids, live, row, slot, penalized, biased, banned,
    logits, repetition, presence, frequency, ban_ids, bias_ids, bias_values, output_counts, prompt_mask,
    vocab, PENALTIES: tl.constexpr, BANS: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """The logits of a block of ids after steps 1 and 2, as the scan had them."""
    x = tl.load(logits + row * vocab + ids, mask=live, other=float("-inf"))
    if penalized + biased + banned > 0:
        x = changed(
            x, ids, live, 0, vocab, slot, penalized, banned,
            repetition, presence, frequency, ban_ids, bias_ids, bias_values, output_counts, prompt_mask,
            vocab, PENALTIES, BANS, BIASES,
        )  # fmt: skip
    return x


@triton.jit
def _few_groups(groups, least, top, need, most):
    """A bound, at least `least`, that leaves from `need` to `most` groups; where none does, one that leaves
    more."""
    low = _key(least)
    high = _key(top) + 1
    seeking = tl.sum((groups >= least).to(tl.int32), axis=0) > most
    while seeking & (low + 1 < high):
        middle = _middle(low, high)
        count = tl.sum((groups >= _value(middle)).to(tl.int32), axis=0)
        if count >= need:
            low = middle
            seeking = count > most
        else:
            high = middle
    return _value(low)


@triton.jit
def _entries(
    start, size, is_listed, listed, listed_ids, row, slot, penalized, biased, banned,
    logits, repetition, presence, frequency, ban_ids, bias_ids, bias_values, output_counts, prompt_mask,
    vocab, PENALTIES: tl.constexpr, BANS: tl.constexpr, BIASES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK entries of the list or, where they did not fit, of the row: their logits and ids."""
    at = start + tl.arange(0, BLOCK)
    live = at < size
    if is_listed:
        x = tl.load(listed + at, mask=live, other=float("-inf"))
        ids = tl.load(listed_ids + at, mask=live, other=0)
    else:
        x = _logits_of(
            at, live, row, slot, penalized, biased, banned,
            logits, repetition, presence, frequency, ban_ids, bias_ids, bias_values, output_counts,
            prompt_mask, vocab, PENALTIES, BANS, BIASES,
        )  # fmt: skip
        ids = at
    return x, ids


@triton.jit
def _filtered(
    row, slot, position, scale, inverse, top, mass, k, p, ratio, penalized, biased, banned, key, index,
    logits, repetition, presence, frequency, ban_ids, bias_ids, bias_values, output_counts, prompt_mask,
    group_max, hot_groups, listed, listed_ids, vocab, num_groups,
    PENALTIES: tl.constexpr, BANS: tl.constexpr, BIASES: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HOT: tl.constexpr, BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """A row with a filter: its token and the logarithm of its probability."""
    by_count = (k > 0) & (k < vocab)
    by_mass = p < 1.0
    by_ratio = ratio > 0.0
    bottom = tl.full([], LEAST, tl.float32)

    # A floor below which nothing matters: all mass below y = log((1 - p) mass / V) together is less than the
    # 1 - p that top-p leaves out. 1e-3 is for rounding.
    least_y = tl.where(by_ratio, log(tl.where(by_ratio, tl.minimum(ratio, 1.0), 1.0)), float("-inf"))
    by_ratio_alone = by_ratio & ((by_count & by_mass) == 0)
    floor_y = tl.where(by_ratio_alone, least_y - 1e-3, float("-inf"))
    if by_mass & (by_count == 0):
        left_out = tl.maximum((1.0 - p) * mass / vocab.to(tl.float32), 1e-37)
        floor_y = tl.maximum(floor_y, log(left_out) - 1e-3)
    floor = tl.where(floor_y == float("-inf"), bottom, top + floor_y * scale - tl.abs(top) * 3e-7)
    floor = tl.minimum(tl.maximum(floor, bottom), top)

    # A higher bound with fewer groups: k groups that reach it hold k entries that do. For top-p it is tried.
    group_max += row * num_groups
    every = tl.arange(0, GROUP_PAD)
    maxima = tl.load(group_max + every, mask=every < num_groups, other=float("-inf"))
    need = tl.where(by_count, k, HOT // 2)
    some = tl.sum((maxima >= floor).to(tl.int32), axis=0)
    bound = floor
    if (by_count | by_mass) & (some >= need):
        lowest = tl.min(tl.where(maxima > float("-inf"), maxima, top), axis=0)
        most = tl.maximum(HOT, need + need // 4)
        bound = _few_groups(maxima, tl.maximum(floor, lowest), top, need, most)

    hot_groups += row * (num_groups + 1)
    listed += row * CAPACITY
    listed_ids += row * CAPACITY
    size = 0
    trying = 1
    while trying > 0:
        # The groups that reach the bound, then their entries that do, in order, as many as fit. What does not
        # belong goes to each list's last place, which is not read: cheaper than masks.
        num_hot = 0
        for start in range(0, num_groups, 2 * BLOCK):
            group = start + tl.arange(0, 2 * BLOCK)
            here = tl.load(group_max + group, mask=group < num_groups, other=float("-inf"))
            hot = (here >= bound).to(tl.int32)
            to = tl.where(hot > 0, num_hot + tl.cumsum(hot, axis=0) - 1, num_groups)
            tl.store(hot_groups + to, group)
            num_hot += tl.sum(hot, axis=0)
        tl.debug_barrier()  # what one thread stored, others load below
        size = 0
        reached = 0.0
        for start in range(0, num_hot, BLOCK // GROUP):
            at = start + tl.arange(0, BLOCK // GROUP)
            hot_group = tl.load(hot_groups + at, mask=at < num_hot, other=num_groups)
            ids = tl.reshape(hot_group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], [BLOCK])
            x = _logits_of(
                ids, ids < vocab, row, slot, penalized, biased, banned,
                logits, repetition, presence, frequency, ban_ids, bias_ids, bias_values, output_counts,
                prompt_mask, vocab, PENALTIES, BANS, BIASES,
            )  # fmt: skip
            taken = ((x >= bound) & (ids < vocab)).to(tl.int32)
            to = tl.where(
                taken > 0, tl.minimum(size + tl.cumsum(taken, axis=0) - 1, CAPACITY - 1), CAPACITY - 1
            )
            tl.store(listed + to, x)
            tl.store(listed_ids + to, ids)
            size += tl.sum(taken, axis=0)
            reached += tl.sum(tl.where(taken > 0, tl.exp((x - top) * inverse), 0.0), axis=0)
        tl.debug_barrier()
        trying = 0
        if by_mass & (by_count == 0) & (bound > floor) & (reached < p * mass):
            bound = floor
            trying = 1
    is_listed = size < CAPACITY
    size = tl.where(is_listed, size, vocab)

    # Thresholds, as keys: each pass over the entries tries eight values between `low` and `high`. Counts are
    # float32, exact below 2^24: integers become population counts of masks that go through local memory.
    # Top-k: any value that exactly k entries reach separates them, else the k-th largest does.
    least = bound
    if by_count:
        low = _key(bound)
        high = _key(top) + 1
        excess = float("inf")
        while (excess > 0.0) & (low + 1 < high):
            pivots = _pivots(low, high)
            counts = tl.zeros([8], tl.float32)
            for start in range(0, size, BLOCK):
                x, _ = _entries(
                    start, size, is_listed, listed, listed_ids, row, slot, penalized, biased, banned,
                    logits, repetition, presence, frequency, ban_ids, bias_ids, bias_values, output_counts,
                    prompt_mask, vocab, PENALTIES, BANS, BIASES, BLOCK,
                )  # fmt: skip
                counts += tl.sum(tl.where(_key(x)[None, :] >= pivots[:, None], 1.0, 0.0), axis=1)
            enough = counts >= k.to(tl.float32)
            low = tl.maximum(low, tl.max(tl.where(enough, pivots, low), axis=0))
            high = tl.minimum(high, tl.min(tl.where(enough, high, pivots), axis=0))
            excess = tl.minimum(
                excess, tl.min(tl.where(enough, counts, float("inf")), axis=0) - k.to(tl.float32)
            )
        least = _value(low)

    # Top-p: mass above `low` is p or more, above `high` it is less, until one entry at most lies between.
    if by_mass:
        total = mass
        if by_count:
            total = 0.0
            for start in range(0, size, BLOCK):
                x, _ = _entries(
                    start, size, is_listed, listed, listed_ids, row, slot, penalized, biased, banned,
                    logits, repetition, presence, frequency, ban_ids, bias_ids, bias_values, output_counts,
                    prompt_mask, vocab, PENALTIES, BANS, BIASES, BLOCK,
                )  # fmt: skip
                total += tl.sum(tl.where(x >= least, tl.exp((x - top) * inverse), 0.0), axis=0)
        low = _key(least) - 1
        high = _key(top)
        above_low = float("inf")
        above_high = 0.0
        while (above_low - above_high > 1.0) & (low + 1 < high):
            pivots = _pivots(low, high)
            counts = tl.zeros([8], tl.float32)
            masses = tl.zeros([8], tl.float32)
            for start in range(0, size, BLOCK):
                x, _ = _entries(
                    start, size, is_listed, listed, listed_ids, row, slot, penalized, biased, banned,
                    logits, repetition, presence, frequency, ban_ids, bias_ids, bias_values, output_counts,
                    prompt_mask, vocab, PENALTIES, BANS, BIASES, BLOCK,
                )  # fmt: skip
                above = _key(x)[None, :] > pivots[:, None]
                counts += tl.sum(tl.where(above, 1.0, 0.0), axis=1)
                masses += tl.sum(tl.where(above, tl.exp((x - top) * inverse)[None, :], 0.0), axis=1)
            kept = (masses < p * total) | (pivots == high)  # with p = 0, the maximum alone
            high = tl.minimum(high, tl.min(tl.where(kept, pivots, high), axis=0))
            above_high = tl.maximum(above_high, tl.max(tl.where(kept, counts, 0.0), axis=0))
            low = tl.maximum(low, tl.max(tl.where(kept, low, pivots), axis=0))
            above_low = tl.minimum(above_low, tl.min(tl.where(kept, above_low, counts), axis=0))
        least = _value(low + 1)

    # The draw.
    mass = 0.0
    best = float("-inf")
    best_y = 0.0
    token = 0
    for start in range(0, size, BLOCK):
        x, ids = _entries(
            start, size, is_listed, listed, listed_ids, row, slot, penalized, biased, banned,
            logits, repetition, presence, frequency, ban_ids, bias_ids, bias_values, output_counts,
            prompt_mask, vocab, PENALTIES, BANS, BIASES, BLOCK,
        )  # fmt: skip
        y = (x - top) * inverse
        kept = (x >= least) & (y >= least_y) & (x > float("-inf"))
        mass += tl.sum(tl.where(kept, tl.exp(y), 0.0), axis=0)
        if is_listed:
            word = words_of(ids, key, index, position)
        else:
            word = words(start, key, index, position, BLOCK)
        score = tl.where(kept, y + gumbel(word), float("-inf"))
        highest = tl.max(score, axis=0)
        if highest > best:
            best = highest
            token = tl.min(tl.where(score == highest, ids, 0x7FFFFFFF), axis=0)
            best_y = tl.max(tl.where(ids == token, y, float("-inf")), axis=0)
    return token, best_y - log(mass)


@triton.jit
def finish_row(
    row, slot, position, wanted,
    logits, temperature, top_k, top_p, min_p, seed, sample_index, repetition, presence, frequency,
    ban_until, ban_ids, bias_ids, bias_values, output_counts, prompt_mask,
    partial, best_id, group_max, hot_groups, listed, listed_ids, vocab, num_tiles,
    PENALTIES: tl.constexpr, BANS: tl.constexpr, BIASES: tl.constexpr,
    BAN_PAD: tl.constexpr, BIAS_PAD: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
    TILE_PAD: tl.constexpr, GROUP_PAD: tl.constexpr, HOT: tl.constexpr, BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """What `sample` gives for one row that is not idle; token -1 where no draw is `wanted`."""
    scale = tl.load(temperature + slot)
    inverse = inverse_of(scale)
    k = tl.load(top_k + slot)
    p = tl.maximum(tl.load(top_p + slot), 0.0)
    ratio = tl.load(min_p + slot)
    key = tl.load(seed + slot)
    index = tl.load(sample_index + slot)

    # The tiles' maxima and masses, folded.
    at = tl.arange(0, TILE_PAD)
    some = at < num_tiles
    tops = partial + row * 5 * num_tiles + at
    raw_tops = tl.load(tops, mask=some, other=float("-inf"))
    masses = tl.load(tops + num_tiles, mask=some, other=0.0)
    bests = tl.load(tops + 4 * num_tiles, mask=some, other=float("-inf"))
    best_ids = tl.load(best_id + row * num_tiles + at, mask=some, other=0x7FFFFFFF)
    nan = tl.max(((raw_tops != raw_tops) | (masses != masses)).to(tl.int32), axis=0) > 0
    top = tl.max(raw_tops, axis=0)
    finite = (top != float("-inf")) & (top != float("inf")) & (nan == 0)
    safe = tl.where(finite, top, 0.0)
    mass = tl.sum(tl.where(raw_tops > float("-inf"), masses * tl.exp((raw_tops - safe) * inverse), 0.0))
    mass = tl.where(finite, mass, 1.0)
    shift = tl.where(scale > 0, scale, 1.0).to(tl.float64)
    lse = (safe.to(tl.float64) / shift + log(mass).to(tl.float64)).to(tl.float32)
    lse = tl.where(finite, lse, tl.where(nan, float("nan"), top))

    token = -1
    logprob = 0.0
    if finite & (wanted > 0):
        penalized, biased, banned = changes(
            slot, position, repetition, presence, frequency, ban_until, ban_ids, bias_ids, vocab,
            PENALTIES, BANS, BIASES, BAN_PAD, BIAS_PAD,
        )  # fmt: skip
        is_changed = penalized + biased + banned > 0
        tile_tops = raw_tops
        if is_changed:
            tile_tops = tl.load(tops + 2 * num_tiles, mask=some, other=float("-inf"))
            masses = tl.load(tops + 3 * num_tiles, mask=some, other=0.0)
            nan = tl.max(((tile_tops != tile_tops) | (masses != masses)).to(tl.int32), axis=0) > 0
            top = tl.max(tile_tops, axis=0)
            finite = (top != float("-inf")) & (top != float("inf")) & (nan == 0)
            safe = tl.where(finite, top, 0.0)
            mass = tl.sum(
                tl.where(tile_tops > float("-inf"), masses * tl.exp((tile_tops - safe) * inverse), 0.0)
            )
        filtered = ((k > 0) & (k < vocab)) | (p < 1.0) | (ratio > 0.0)
        if finite:
            if (scale > 0) & filtered:
                token, logprob = _filtered(
                    row, slot, position, scale, inverse, top, mass, k, p, ratio, penalized, biased, banned,
                    key, index, logits, repetition, presence, frequency, ban_ids, bias_ids, bias_values,
                    output_counts, prompt_mask, group_max, hot_groups, listed, listed_ids, vocab,
                    num_tiles * (TILE // GROUP),
                    PENALTIES, BANS, BIASES, GROUP, GROUP_PAD, HOT, BLOCK, CAPACITY,
                )  # fmt: skip
            else:
                # The best of the tiles' bests, the lowest id on ties.
                scores = (tile_tops - top) * inverse + bests
                scores = tl.where(tile_tops > float("-inf"), scores, float("-inf"))
                token = tl.min(tl.where(scores == tl.max(scores, axis=0), best_ids, 0x7FFFFFFF), axis=0)
                if scale > 0:
                    if is_changed:
                        one = token + tl.arange(0, 1)
                        x = _logits_of(
                            one, one >= 0, row, slot, penalized, biased, banned,
                            logits, repetition, presence, frequency, ban_ids, bias_ids, bias_values,
                            output_counts, prompt_mask, vocab, PENALTIES, BANS, BIASES,
                        )  # fmt: skip
                        logprob = (tl.max(x, axis=0) - top) * inverse - log(mass)
                    else:
                        logprob = tl.div_rn(tl.load(logits + row * vocab + token), scale) - lse
    return token, lse, logprob
