"""Philox and the Gumbel noise of its words in Triton, as in csrc/philox.h and csrc/cpu/sample_lanes.h."""

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """See csrc/philox.h; all uint32."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def log(x):
    """log x for normal x > 0, as in csrc/cpu/sample_lanes.h, to the last bit.

    Triton's own is approximate: its absolute error is bounded, which is too much near log 1.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    p = tl.fma(f, -0.0763434768, 0.127615169)
    p = tl.fma(p, f, -0.131602108)
    p = tl.fma(p, f, 0.142017677)
    p = tl.fma(p, f, -0.166233554)
    p = tl.fma(p, f, 0.200012267)
    p = tl.fma(p, f, -0.250008225)
    p = tl.fma(p, f, 0.333333313)
    square = f * f
    low = tl.fma(square * f, p, e * -2.12194440e-4)
    low = tl.fma(square, -0.5, low)
    return tl.fma(e, 0.693359375, f + low)


@triton.jit
def gumbel(word):
    """See gumbel() in csrc/philox.h."""
    small = word < 4194304
    u = (tl.where(small, word, word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = u * tl.fma(u, tl.fma(u, 0.3333333432674408, 0.5), 1.0)
    return -log(tl.where(small, series, -log(u)))


@triton.jit
def words(start, seed, sample_index, position, TILE: tl.constexpr):
    """The random words of ids start .. start + TILE; start is a multiple of 4."""
    group = (start // 4 + tl.arange(0, TILE // 4)).to(tl.uint32)
    w0, w1, w2, w3 = _words_of_groups(group, seed, sample_index, position)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def words_of(ids, seed, sample_index, position):
    """The random words of any ids, a block of them: four times the work of `words`."""
    w0, w1, w2, w3 = _words_of_groups((ids // 4).to(tl.uint32), seed, sample_index, position)
    place = ids % 4
    return tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3))


@triton.jit
def _words_of_groups(group, seed, sample_index, position):
    zero = group ^ group
    c1 = zero + position.to(tl.uint32)
    c2 = zero + (seed >> 32).to(tl.uint32)
    k0 = zero + seed.to(tl.uint32)
    k1 = zero + sample_index.to(tl.uint32)
    return philox(group, c1, c2, zero, k0, k1)
