"""The random words of `sample` and the Gumbel noise made of them."""

import importlib
import math

import pytest
import torch

from elastic_decode.kernels import _C
from elastic_decode.kernels.sample import reference
from elastic_decode.kernels.testing import device_of

ISAS = {"generic": _C.cpu.Isa.generic, "avx2": _C.cpu.Isa.avx2, "avx512": _C.cpu.Isa.avx512_bf16}
# Seed, sample index, position.
KEYS = [(0, 0, 0), (-1, 2**31 - 1, 2**31 - 1), (2**40 + 17, 3, 5), (-(2**63), -1, 77)]


@pytest.fixture(params=ISAS)
def isa(request):
    """C++ kernels use this instruction set, or the best there is below it."""
    _C.cpu.limit_isa(ISAS[request.param])
    yield request.param
    _C.cpu.limit_isa(ISAS["avx512"])


def test_philox_known_answers():
    """The kat_vectors of Random123 for philox4x32, 10 rounds."""
    ones = 0xFFFFFFFF
    cases = [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([ones] * 4, [ones] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for counter, key, words in cases:
        got = reference.philox(torch.tensor(counter), torch.tensor(key))
        assert " ".join(f"{word:08x}" for word in got.tolist()) == words


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("seed", "index", "position"),
    [(0, 0, 0), (-1, 2**31 - 1, 2**31 - 1), (2**40 + 17, 3, 5), (-(2**63), -1, 77)],
)
def test_words_agree_bit_for_bit(isa, seed, index, position):
    count = 4096 + 32
    words = torch.zeros(count, dtype=torch.int32)
    _C.cpu.sample_words(words.data_ptr(), count, seed, index, position)
    assert torch.equal(words.long() & 0xFFFFFFFF, reference.words(seed, index, position, count))


def edge_words() -> torch.Tensor:
    """Every power of two with its neighbours, from either end, and random words: a multiple of 32."""
    powers = torch.tensor([2**e + d for e in range(32) for d in (-1, 0, 1)])
    words = torch.cat((powers, 2**32 - 1 - powers, torch.randint(0, 2**32, (4096,))))
    return words[: len(words) // 32 * 32]


def test_noise_is_accurate_at_every_word():
    words = edge_words()
    exact = -torch.log(-torch.log1p(-(words.double() + 0.5) * 2.0**-32))
    # Rounding 1 - u to float32 moves u by 2^-25 at most, which just above u = 2^-10 is 2^-15 of E.
    assert (reference.gumbel(words).double() - exact).abs().max() < 2.0**-14.9
    assert reference.gumbel(torch.tensor([0])).item() == pytest.approx(33 * math.log(2), rel=1e-6)
    assert reference.gumbel(torch.tensor([2**32 - 1])).item() == pytest.approx(
        -math.log(33 * math.log(2)), rel=1e-6
    )
    e = reference.exponential(words)
    assert e.min() == 2.0**-33
    assert e.max() < 23


def as_int32(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


def test_compiled_noise_agrees_with_the_reference(isa):
    words = edge_words()
    given, out = as_int32(words), torch.full((len(words),), math.nan)
    _C.cpu.sample_gumbel(out.data_ptr(), given.data_ptr(), len(words))
    want = reference.gumbel(words)
    assert (out - want).abs().max() <= 5e-7 * want.abs().clamp(min=1).max()


@pytest.mark.parametrize("backend", ["triton"])
def test_triton_words_and_noise(monkeypatch, backend):
    triton = importlib.import_module("triton")
    noise = importlib.import_module("elastic_decode.kernels.sample.triton_noise")
    tl = triton.language

    @triton.jit
    def kernel(words_out, again_out, gumbel_out, words_in, seed, index, position, COUNT: tl.constexpr):
        at = tl.arange(0, COUNT)
        key = tl.load(seed)
        word = noise.words(1 << 15, key, tl.load(index), tl.load(position), COUNT)
        tl.store(words_out + at, word.to(tl.int32, bitcast=True))
        again = noise.words_of((1 << 15) + at, key, tl.load(index), tl.load(position))
        tl.store(again_out + at, again.to(tl.int32, bitcast=True))
        tl.store(gumbel_out + at, noise.gumbel(tl.load(words_in + at).to(tl.uint32, bitcast=True)))

    monkeypatch.setitem(kernel.fn.__globals__, "noise", noise)
    monkeypatch.setitem(kernel.fn.__globals__, "tl", tl)
    count, given = 1024, edge_words()[:1024]
    device = device_of(backend)
    words, again = torch.zeros(2, count, dtype=torch.int32, device=device)
    gumbel = torch.zeros(count, device=device)
    for seed, index, position in KEYS:
        scalars = [torch.tensor([value], dtype=dtype, device=device) for value, dtype in
                   ((seed, torch.int64), (index, torch.int32), (position, torch.int32))]  # fmt: skip
        kernel[(1,)](words, again, gumbel, as_int32(given).to(device), *scalars, COUNT=count)
        expected = reference.words(seed, index, position, (1 << 15) + count)[1 << 15 :]
        assert torch.equal(words.cpu().long() & 0xFFFFFFFF, expected)
        assert torch.equal(again, words)
    want = reference.gumbel(given)
    assert (gumbel.cpu() - want).abs().max() <= 5e-7 * want.abs().clamp(min=1).max()


def test_noise_has_the_gumbel_distribution():
    words = reference.words(1234, 0, 7, 1 << 18)
    noise = reference.gumbel(words).double()
    error = 4 / math.sqrt(len(noise))
    assert abs(noise.mean() - 0.5772156649) < error * math.pi / math.sqrt(6)
    assert abs(noise.var() - math.pi**2 / 6) < error * 5  # the variance's standard deviation is 3.4 / sqrt(n)
    uniform = torch.exp(-torch.exp(-noise))
    counts = torch.histc(uniform, 64, 0, 1)
    expected = len(noise) / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 63 + 4 * math.sqrt(2 * 63)
    by_word = uniform.view(-1, 4)  # the four words of a counter are not correlated
    assert (torch.corrcoef(by_word.T) - torch.eye(4)).abs().max() < 5 / math.sqrt(len(by_word))
