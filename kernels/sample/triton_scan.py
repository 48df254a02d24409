"""The first launch of `sample` and `draw`: one pass over the logits, a program for a few tiles of a row.

It leaves, a tile of TILE ids: the raw maximum and mass (for lse); the same after penalties, bias and bans;
the best score and its id, for rows that need no filter; the maxima of GROUP ids each, for rows that do.

Bytes a row, V = 151,936: 608 kB of logits read (with penalties 5 bytes an id more: 760 kB), 1.5 kB of partial
results written, and with a filter 19 kB of maxima. Predicted, nothing being timed yet: at 3 TB/s 0.2 us a
row, so 52 us for 256 greedy or filtered rows, which do some 15 instructions an id; one row is 75 programs,
which is latency: 3 us. Noise is more: Philox is 15 instructions an id and the two logarithms 35, so that to
draw every id of 256 rows would take 130 us. Hence a tile whose ids cannot win is left without noise: with u
its uniform, an id's score y + G is at most y - log u, as E = -log(1 - u) >= u; it is compared with the best
of the tiles that the program has seen, first for the smallest u there is, then for each id's own. Of n tiles
a program, about 1 + 1/2 + … + 1/n are drawn: 85 us. The winner stays as it is: how many tiles a program has
changes no bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ..budget.layout import STATE_WORDS, State
from ..gpu import num_processors
from .triton_noise import gumbel, words

TILE = 2048
GROUP = 32  # ids: 128 bytes of logits, what a filtered row reads where it reads anything
MOST_TILES = 8  # a program
# No contraction that the code does not spell out.
OPTIONS: dict[str, Any] = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}

LEAST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def inverse_of(temperature):
    """1 / T, 1 for a greedy row; finite, so that 0 times it is 0."""
    return tl.minimum(tl.div_rn(1.0, tl.where(temperature > 0, temperature, 1.0)), -LEAST)


@triton.jit
def changes(
    slot, position, repetition, presence, frequency, ban_until, ban_ids, bias_ids, vocab,
    PENALTIES: tl.constexpr, BANS: tl.constexpr, BIASES: tl.constexpr,
    BAN_PAD: tl.constexpr, BIAS_PAD: tl.constexpr,
):  # fmt: skip
    """Whether a row has penalties, bias, bans to apply: three int32."""
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
def changed(
    x, ids, live, first, last, slot, penalized, banned,
    repetition, presence, frequency, ban_ids, bias_ids, bias_values, output_counts, prompt_mask, vocab,
    PENALTIES: tl.constexpr, BANS: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """The logits x of a block of ids (first <= ids < last) after steps 1 and 2; -inf where not `live`."""
    if PENALTIES:  # noqa: SIM102 - known to the compiler, what follows is not
        if penalized > 0:
            count = tl.load(output_counts + slot * vocab + ids, mask=live, other=0)
            in_prompt = tl.load(prompt_mask + slot * vocab + ids, mask=live, other=0)
            factor = tl.load(repetition + slot)
            repeated = tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + factor), x * factor)
            x = tl.where((count > 0) | (in_prompt != 0), repeated, x)
            reduced = x - tl.load(frequency + slot) * count.to(tl.float32) - tl.load(presence + slot)
            x = tl.where(count > 0, reduced, x)
    for i in range(BIASES):
        token = tl.load(bias_ids + slot * BIASES + i)
        if (token >= first) & (token < last):
            x = tl.where(ids == token, x + tl.load(bias_values + slot * BIASES + i), x)
    if banned > 0:
        for i in range(BANS):
            token = tl.load(ban_ids + slot * BANS + i)
            x = tl.where(ids == token, float("-inf"), x)
    return tl.where(live, x, float("-inf"))


@triton.jit
def _max_and_mass(x, inverse):
    """A tile's maximum, y = (x - maximum) / T, exp(y) and the sum of that, which is NaN where x holds one."""
    top = tl.max(x, axis=0)
    y = (x - tl.where(tl.abs(top) == float("inf"), 0.0, top)) * inverse
    weight = tl.exp(y)
    return top, y, weight, tl.sum(weight, axis=0)


@triton.jit(do_not_specialize=["tiles_a_program", "ring_length"])
def scan_kernel(
    logits, slots, positions,
    temperature, top_k, top_p, min_p, seed, sample_index, repetition, presence, frequency,
    ban_until, ban_ids, bias_ids, bias_values, output_counts, prompt_mask,
    state, ring_index, ring_length,  # with MACHINE: the budget machine's, and the ring's to advance
    partial,  # float32 [R, 5, tiles]: raw maximum and mass, changed maximum and mass, best score above it
    best_id,  # int32 [R, tiles]
    group_max,  # float32 [R, tiles * TILE / GROUP], of filtered rows
    vocab, num_tiles, tiles_a_program,
    PENALTIES: tl.constexpr, BANS: tl.constexpr, BIASES: tl.constexpr,
    BAN_PAD: tl.constexpr, BIAS_PAD: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
    MACHINE: tl.constexpr, FINISH: tl.constexpr, FORCED_LEFT: tl.constexpr, STATE_WORDS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        # In this order: what the second launch reads before it waits in turn was there before this one.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    span = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    wanted = 1
    if MACHINE:
        if (span == 0) & (row == 0):
            tl.store(ring_index, (tl.load(ring_index) + 1) % ring_length)
        words_of_state = state + tl.maximum(slot, 0) * STATE_WORDS
        if tl.load(words_of_state + FINISH) != 0:
            slot = tl.full([], -1, tl.int64)
        # Where a token is forced, only lse is wanted.
        wanted = (tl.load(words_of_state + FORCED_LEFT) == 0).to(tl.int32)
    if slot < 0:
        return
    position = tl.load(positions + row)
    scale = tl.load(temperature + slot)
    inverse = inverse_of(scale)
    k = tl.load(top_k + slot)
    filtered = ((k > 0) & (k < vocab)) | (tl.load(top_p + slot) < 1.0) | (tl.load(min_p + slot) > 0.0)
    penalized, biased, banned = changes(
        slot, position, repetition, presence, frequency, ban_until, ban_ids, bias_ids, vocab,
        PENALTIES, BANS, BIASES, BAN_PAD, BIAS_PAD,
    )  # fmt: skip
    key = tl.load(seed + slot)
    index = tl.load(sample_index + slot)

    bound = float("-inf")  # the best score seen by this program, on the scale of x / T
    first = span * tiles_a_program
    last = tl.minimum(first + tiles_a_program, num_tiles)
    source = logits + row * vocab
    begin = first * TILE + tl.arange(0, TILE)
    following = tl.load(source + begin, mask=begin < vocab, other=float("-inf"))
    for tile in range(first, last):
        start = tile * TILE
        ids = start + tl.arange(0, TILE)
        live = ids < vocab
        x = following
        if tile + 1 < last:  # on its way while this tile is worked on
            following = tl.load(source + TILE + ids, mask=TILE + ids < vocab, other=float("-inf"))
        out = partial + row * 5 * num_tiles + tile
        top, y, weight, mass = _max_and_mass(x, inverse)
        tl.store(out, top)
        tl.store(out + num_tiles, mass)
        if wanted > 0:
            if penalized + biased + banned > 0:
                x = changed(
                    x, ids, live, start, start + TILE, slot, penalized, banned,
                    repetition, presence, frequency, ban_ids, bias_ids, bias_values,
                    output_counts, prompt_mask, vocab, PENALTIES, BANS, BIASES,
                )  # fmt: skip
                top, y, weight, mass = _max_and_mass(x, inverse)
                tl.store(out + 2 * num_tiles, top)
                tl.store(out + 3 * num_tiles, mass)
            if (scale > 0) & filtered:
                groups = tl.max(tl.reshape(x, [TILE // GROUP, GROUP]), axis=1)
                to = (row * num_tiles + tile) * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
                tl.store(group_max + to, groups)
            else:
                best = float("-inf")
                if scale > 0:
                    drawn = 1
                    if bound > float("-inf"):
                        # Allowing for rounding. What overflows or is NaN is drawn.
                        least = tl.exp(1e-3 + 1e-6 * tl.abs(bound) - (bound - top * inverse))
                        drawn = 0
                        if (least < 1.1e-10) == 0:  # below, it would take a u of less than 2^-33
                            word = words(start, key, index, position, TILE)
                            lost = word.to(tl.float32) * 2.3283064365386963e-10 > weight * least
                            drawn = 1 - tl.min(lost.to(tl.int32), axis=0)
                    if drawn > 0:
                        y += gumbel(words(start, key, index, position, TILE))
                        best, at = tl.max(y, axis=0, return_indices=True)
                        tl.store(best_id + row * num_tiles + tile, start + at)
                    bound = tl.maximum(bound, top * inverse + best)
                else:
                    best, at = tl.max(y, axis=0, return_indices=True)
                    tl.store(best_id + row * num_tiles + tile, start + at)
                tl.store(out + 4 * num_tiles, best)


def tiles_a_program(rows: int, tiles: int, device: torch.device) -> int:
    """Enough programs to fill the processors some sixteen times over, else more tiles each."""
    return min(max(rows * tiles // (16 * num_processors(device)), 1), MOST_TILES)


def machine(on: bool) -> dict[str, Any]:
    """The scan's constexprs that say whether there is a budget machine, and where its words are."""
    words = {"FINISH": int(State.FINISH), "FORCED_LEFT": int(State.FORCED_LEFT), "STATE_WORDS": STATE_WORDS}
    return {"MACHINE": on, **words}
