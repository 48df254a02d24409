"""`sample` against its definition, on every backend that runs here."""

import contextlib
import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_decode.kernels import _C
from elastic_decode.kernels.sample import Sampled, SamplingTable, make_table, reference, sample
from elastic_decode.kernels.testing import device_of, runnable

ISAS = {"generic": _C.cpu.Isa.generic, "avx2": _C.cpu.Isa.avx2, "avx512": _C.cpu.Isa.avx512_bf16}
INF, NAN = math.inf, math.nan


@pytest.fixture(params=[*runnable("sample"), "cpu-generic", "cpu-avx2"])
def backend(request):
    """A backend's name; tensors are made where it wants them. For C++ also with fewer instructions."""
    name, _, cap = request.param.partition("-")
    if cap and _C.cpu.isa().value < ISAS[cap].value:
        pytest.skip(f"this processor has no {cap}")
    with capped(cap or "avx512"), torch.device(device_of(name)):
        yield name


@contextlib.contextmanager
def capped(isa: str):
    """C++ kernels use this instruction set, or the best there is below it."""
    _C.cpu.limit_isa(ISAS[isa])
    try:
        yield
    finally:
        _C.cpu.limit_isa(ISAS["avx512"])


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def table_of(slots: int, bans: int = 0, biases: int = 0, vocab: int | None = None, **fields) -> SamplingTable:
    """A table whose named fields are set; with `vocab`, penalties have their tensors (zeros)."""
    table = make_table(slots, bans, biases, torch.get_default_device())
    if vocab is not None:
        counts = torch.zeros(slots, vocab, dtype=torch.int32)
        table = table._replace(output_counts=counts, prompt_mask=torch.zeros(slots, vocab, dtype=torch.uint8))
    for name, value in fields.items():
        getattr(table, name)[:] = torch.as_tensor(value, dtype=getattr(table, name).dtype)
    return table


def poisoned(rows: int) -> Sampled:
    return Sampled(ints(*[-77] * rows), torch.full((rows,), NAN), torch.full((rows,), NAN))


def draw(backend: str, logits: torch.Tensor, table: SamplingTable, slots=None, positions=None) -> Sampled:
    rows = logits.shape[0]
    slots = torch.arange(rows, dtype=torch.int32) if slots is None else slots
    positions = torch.arange(rows, dtype=torch.int32) + 100 if positions is None else positions
    out = poisoned(rows)
    assert sample(logits, slots, positions, table, out=out, backend=backend) is out
    return out


def assert_drawn(
    drawn: Sampled, logits: torch.Tensor, table: SamplingTable, slots=None, positions=None
) -> None:
    """Every row is what the definition says, but for near-ties.

    Those are a score within 2e-5 of the best, and a value within 1e-5 of a threshold.
    """
    logits, drawn = logits.cpu(), Sampled(*(part.cpu() for part in drawn))
    table = SamplingTable(*(None if part is None else part.cpu() for part in table))
    with torch.device("cpu"):
        assert_drawn_on_host(drawn, logits, table, slots, positions)


def assert_drawn_on_host(drawn, logits, table, slots, positions) -> None:
    rows, vocab = logits.shape
    slots = list(range(rows)) if slots is None else slots.tolist()
    positions = [row + 100 for row in range(rows)] if positions is None else positions.tolist()
    exact = reference.sample(logits, ints(*slots), ints(*positions), table)
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        token, lse, logprob = (float(part[row]) for part in drawn)
        where = f"row {row}, slot {slot}: got {token:.0f}, reference {int(exact.token[row])}"
        assert lse == pytest.approx(float(exact.lse[row]), rel=2e-6, abs=4e-6, nan_ok=True), where
        if exact.token[row] < 0:
            assert (token, logprob) == (-1, 0), where
            continue
        assert 0 <= token < vocab, where
        token = int(token)
        x = reference.modified_logits(logits[row], slot, position, table).double()
        temperature = float(table.temperature[slot])
        if temperature == 0:
            assert x[token] >= x.max() - 1e-5, where
            assert logprob == 0
            continue
        y = x / temperature
        near = 1e-5 * (1 + y.abs())
        options = int(table.top_k[slot]), float(table.top_p[slot]), float(table.min_p[slot])
        certain, possible = bounds(y, *options, near)
        assert possible[token], where
        score = y + reference.gumbel(
            reference.words(int(table.seed[slot]), int(table.sample_index[slot]), position, vocab)
        )
        assert score[token] >= score[certain].max() - 2e-5, where
        # The mass that was kept lies between that of the certain and that of the possible.
        low, high = (y[token] - torch.logsumexp(y[keep], 0) for keep in (possible, certain))
        slack = 1e-5 + 4e-6 * abs(float(y[token]))
        assert float(low) - slack <= logprob <= float(high) + slack, where


def bounds(y, top_k, top_p, min_p, near):
    """What is kept for certain and what may be, where thresholds are known up to `near`."""
    certain = possible = y > -INF
    if 0 < top_k < len(y):
        kth = y.sort(descending=True).values[top_k - 1]
        certain, possible = certain & (y >= kth), possible & (y >= kth - near)
    if top_p < 1:
        mass = torch.softmax(y.masked_fill(~certain, -INF), 0)
        falling = y.sort(descending=True)
        from_top = torch.cat((torch.zeros(1), mass[falling.indices].cumsum(0)))
        above = from_top[torch.searchsorted(-falling.values, -y)]  # [n]: mass of the n strictly greater
        top = y == y.max()
        certain = certain & ((above < top_p - 1e-5) | top)
        possible = possible & ((above < top_p + 1e-5) | top)
    if min_p > 0:
        threshold = y.max() + math.log(min(min_p, 1))
        certain, possible = (
            certain & ((y >= threshold + near) | (y == y.max())),
            possible & (y >= threshold - near),
        )
    return certain, possible


# ---- the distribution ----


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0.5}])
def test_draws_have_the_distribution(options):
    """Chi-square over one long run of positions, against softmax."""
    rows, vocab = 20000, 23
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(3)) * 1.5
    table = table_of(1, seed=99, **options)
    drawn = sample(
        logits.expand(rows, vocab).contiguous(),
        torch.zeros(rows, dtype=torch.int32),
        torch.arange(rows, dtype=torch.int32),
        table,
        backend="cpu",
    )
    y = logits.double() / float(table.temperature)
    keep = reference.kept(y, int(table.top_k), float(table.top_p), float(table.min_p))
    probability = torch.softmax(y.masked_fill(~keep, -INF), 0)
    counts = torch.bincount(drawn.token.long(), minlength=vocab).double()
    assert counts[~keep].sum() == 0
    expected = probability[keep] * rows
    freedom = int(keep.sum()) - 1
    assert float(((counts[keep] - expected) ** 2 / expected).sum()) < freedom + 4 * math.sqrt(2 * freedom)
    torch.testing.assert_close(
        drawn.sampling_logprob.exp().double(), probability[drawn.token.long()], rtol=1e-5, atol=0
    )


# ---- greedy and idle ----


def test_greedy_ties_take_the_lowest_id(backend):
    logits = torch.zeros(3, 700)
    logits[0, [5, 17, 300, 699]] = 2.0
    logits[1, [698, 699]] = 1.0
    drawn = draw(backend, logits, table_of(3, temperature=0))
    assert drawn.token.tolist() == [5, 698, 0]
    assert drawn.sampling_logprob.tolist() == [0, 0, 0]
    torch.testing.assert_close(drawn.lse, torch.logsumexp(logits, 1))


def test_idle_rows_and_no_rows(backend):
    logits = torch.randn(3, 40)
    table = table_of(2, temperature=[0, 1])
    drawn = draw(backend, logits, table, ints(-1, 1, -1))
    assert (drawn.token[0], drawn.lse[0], drawn.sampling_logprob[0]) == (-1, 0, 0)
    assert (drawn.token[2], drawn.lse[2], drawn.sampling_logprob[2]) == (-1, 0, 0)
    assert_drawn(drawn, logits, table, ints(-1, 1, -1))
    empty = draw(backend, torch.empty(0, 40), table)
    assert empty.token.shape == (0,)
    assert empty.lse.shape == (0,)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("vocab", [5, 300])
def test_rows_with_nothing_to_draw(backend, temperature, vocab):
    logits = torch.randn(6, vocab)
    logits[0, 2] = NAN
    logits[1] = NAN
    logits[2] = -INF
    logits[3, 4] = INF
    logits[4, 1:] = -INF
    table = table_of(6, temperature=temperature)
    drawn = draw(backend, logits, table)
    assert drawn.token[:4].tolist() == [-1] * 4
    assert drawn.token[4] == 0
    assert drawn.sampling_logprob[:4].tolist() == [0] * 4
    assert drawn.lse[:2].isnan().all()
    assert drawn.lse[2:4].tolist() == [-INF, INF]
    assert_drawn(drawn, logits, table)


def test_a_nan_that_is_banned_still_spoils_the_row(backend):
    logits = torch.randn(1, 33)
    logits[0, 7] = NAN
    table = table_of(1, bans=1, temperature=0, ban_until=1000, ban_ids=[[7]])
    assert draw(backend, logits, table).token.tolist() == [-1]


# ---- sizes and options ----


@pytest.mark.parametrize("vocab", [1, 2, 3, 5, 15, 16, 17, 31, 33, 255, 256, 257, 511, 1027, 4095, 4097])
def test_odd_vocabularies(backend, vocab):
    torch.manual_seed(vocab)
    logits = torch.randn(6, vocab) * 4
    table = table_of(
        6,
        temperature=[0, 1, 0.6, 1.3, 0.6, 2],
        top_k=[0, 0, 0, 3, 0, vocab],
        top_p=[1, 1, 0.9, 1, 1, 1],
        min_p=[0, 0, 0, 0, 0.2, 0],
        seed=7,
    )
    assert_drawn(draw(backend, logits, table), logits, table)


def test_large_vocabularies_and_flat_or_peaked_logits():
    """C++ only: the passes that skip groups, and the shared scan of few rows."""
    torch.manual_seed(1)
    vocab = 40_003
    options = {
        "temperature": [0, 1, 0.6, 0.6, 1],
        "top_k": [0, 0, 0, 50, 30000],
        "top_p": [1, 1, 0.95, 0.9, 1],
        "seed": 3,
    }
    for spread in (0.0, 0.01, 1.0, 5.0):
        logits = torch.randn(5, vocab) * spread
        table = table_of(5, **options)
        together = draw("cpu", logits, table)
        for row in range(5):
            one = draw("cpu", logits[row : row + 1], table, ints(row), ints(100 + row))
            assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together, one, strict=True))
        exact = draw("reference", logits, table)
        assert torch.equal(together.token, exact.token)
        torch.testing.assert_close(together.lse, exact.lse)
        torch.testing.assert_close(together.sampling_logprob, exact.sampling_logprob, rtol=1e-5, atol=2e-5)


def test_filters_at_their_limits(backend):
    torch.manual_seed(2)
    logits = (torch.randn(7, 200) * 3).round()  # full of ties
    table = table_of(
        7,
        temperature=0.8,
        top_k=[200, 1, 10**6, 0, 0, 0, 0],
        top_p=[1, 1, 1, 1e-6, 0, 1, 1],
        min_p=[0, 0, 0, 0, 0, 1, 2],
    )
    drawn = draw(backend, logits, table)
    assert_drawn(drawn, logits, table)
    for row in (1, 3, 4, 5, 6):  # only ties with the maximum are left, all of them equally likely
        assert logits[row, drawn.token[row]] == logits[row].max()
        ties = int((logits[row] == logits[row].max()).sum())
        assert float(drawn.sampling_logprob[row]) == pytest.approx(-math.log(ties), abs=1e-5)


def test_ties_at_a_threshold_are_all_kept(backend):
    """Values 3, 2, 2, 2, 1 …: top-k 2 keeps the 3 and every 2; so does top-p just above the mass of the 3."""
    rows = 20
    logits = torch.full((rows, 41), 1.0)
    logits[:, 9] = 3.0
    logits[:, [2, 20, 40]] = 2.0
    above = float(torch.softmax(logits[0].double(), 0)[9])
    for options in ({"top_k": 2}, {"top_k": 4}, {"top_p": above + 1e-4}):
        table = table_of(1, seed=5, **options)
        slots = torch.zeros(rows, dtype=torch.int32)
        drawn = draw(backend, logits, table, slots)
        assert set(drawn.token.tolist()) == {2, 9, 20, 40}
        total = math.exp(3) + 3 * math.exp(2)
        want = torch.where(drawn.token == 9, 3.0, 2.0) - math.log(total)
        torch.testing.assert_close(drawn.sampling_logprob, want, rtol=0, atol=1e-5)
    only = draw(backend, logits, table_of(1, top_p=above - 1e-4), torch.zeros(rows, dtype=torch.int32))
    assert set(only.token.tolist()) == {9}


def test_without_options_both_logprobs_are_one(backend):
    logits = torch.randn(8, 999) * 5
    table = table_of(8, temperature=[0.6, 1, 1.7, 0.1, 1, 0.9, 3, 0.6], seed=11)
    drawn = draw(backend, logits, table)
    logprob = logits[torch.arange(8), drawn.token.long()] / table.temperature - drawn.lse
    assert torch.equal(logprob, drawn.sampling_logprob)


# ---- penalties, bias, bans ----


def penalty_table(vocab, **options):
    table = table_of(4, vocab=vocab, **options)
    generator = torch.Generator(torch.get_default_device()).manual_seed(8)
    table.output_counts[:] = torch.randint(0, 4, (4, vocab), generator=generator)
    table.prompt_mask[:] = torch.randint(0, 2, (4, vocab), generator=generator)
    return table


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition": 1.4},
        {"repetition": 0.7},
        {"presence": 1.5},
        {"frequency": 0.6},
        {"frequency": -0.6},
        {"repetition": 1.2, "presence": 0.3, "frequency": 0.2},
    ],
    ids=str,
)
def test_penalties(backend, temperature, options):
    torch.manual_seed(4)
    logits = torch.randn(4, 301) * 2
    table = penalty_table(301, temperature=temperature, seed=21, **options)
    assert_drawn(draw(backend, logits, table), logits, table)


def test_a_penalty_changes_what_is_drawn(backend):
    logits = torch.zeros(4, 8)
    logits[:, 3], logits[:, 5] = 2.0, 1.5
    table = table_of(
        4, vocab=8, temperature=0, repetition=[2, 1, 1, 2], presence=[0, 1, 0, 0], frequency=[0, 0, 0.3, 0]
    )
    table.prompt_mask[0, 3] = 1  # repetition looks at the prompt too
    table.output_counts[1, 3] = 1
    table.output_counts[2, 3] = 2
    assert draw(backend, logits, table).token.tolist() == [5, 5, 5, 3]


def test_bias_and_bans(backend):
    torch.manual_seed(5)
    logits = torch.randn(6, 77)
    logits[:, 10] = 9.0
    table = table_of(
        6, bans=2, biases=3, temperature=[0, 0, 0, 1, 0, 1], ban_until=[0, 101, 103, 200, 200, 0]
    )
    table.bias_ids[0], table.bias_values[0] = ints(10, -1, 30), torch.tensor([-INF, 5, 50])
    table.bias_ids[3], table.bias_values[3] = ints(10, 11, -1), torch.tensor([-100.0, 3, 0])
    table.bias_ids[5], table.bias_values[5] = ints(12, 12, 12), torch.tensor([20.0, 20, 20])  # they add up
    table.ban_ids[1], table.ban_ids[2] = ints(10, -1), ints(10, 76)
    table.ban_ids[3], table.ban_ids[4] = ints(0, 1), ints(-1, -1)
    drawn = draw(backend, logits, table)  # at positions 100 ... 105
    assert_drawn(drawn, logits, table)
    assert drawn.token[0] == 30
    assert drawn.token[1] == 10  # at 101 the ban is over
    assert drawn.token[2] not in (10, 76)
    assert drawn.token[4] == 10
    assert drawn.token[5] == 12
    assert float(drawn.sampling_logprob[5]) == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(drawn.lse, torch.logsumexp(logits, 1))  # of the raw logits


def test_everything_banned_or_biased_away(backend):
    logits = torch.randn(2, 3)
    table = table_of(2, bans=3, biases=3, temperature=[0, 1], ban_until=[1000, 0])
    table.ban_ids[0] = ints(0, 1, 2)
    table.bias_ids[1], table.bias_values[1] = ints(0, 1, 2), torch.tensor([-INF, -INF, -INF])
    drawn = draw(backend, logits, table)
    assert drawn.token.tolist() == [-1, -1]
    assert drawn.sampling_logprob.tolist() == [0, 0]
    torch.testing.assert_close(drawn.lse, torch.logsumexp(logits, 1))


# ---- seeds and independence ----


def test_seed_sample_index_and_position_each_change_the_noise(backend):
    vocab = 1000
    table = table_of(6, seed=[1, 1 + 2**32, -1, 2**62, 1, 1], sample_index=[0, 0, 0, 0, 1, 0])
    logits = torch.zeros(6, vocab)
    positions = ints(5, 5, 5, 5, 5, 6)
    drawn = draw(backend, logits, table, positions=positions)
    assert_drawn(drawn, logits, table, positions=positions)
    assert len(set(drawn.token.tolist())) == 6
    again = draw(backend, logits[:1], table, ints(0), ints(5))
    assert again.token[0] == drawn.token[0]


def test_rows_and_slots_may_be_permuted(backend):
    """Bit for bit: neither the batch nor the place of a row or a slot in it matters."""
    torch.manual_seed(6)
    rows, vocab = 9, 517
    logits = torch.randn(rows, vocab) * 3
    table = penalty_table(vocab)
    table = SamplingTable(*(part.repeat(3, *[1] * (part.dim() - 1))[:rows].clone() for part in table))
    table.temperature[:] = torch.linspace(0, 1.6, rows)
    table.top_p[3:6], table.top_k[5:8], table.min_p[7:] = 0.8, 12, 0.05
    table.repetition[2:5], table.seed[:] = 1.3, torch.arange(rows)
    positions = torch.arange(rows, dtype=torch.int32) * 3
    base = draw(backend, logits, table, positions=positions)
    order, place = torch.randperm(rows), torch.randperm(rows)
    moved = SamplingTable(*(torch.empty_like(part).index_copy_(0, place, part) for part in table))
    permuted = draw(
        backend, logits[order].contiguous(), moved, place[order].int(), positions[order].contiguous()
    )
    for a, b in zip(base, permuted, strict=True):
        assert torch.equal(a[order], b)
    for row in range(rows):
        one = draw(backend, logits[row : row + 1], table, ints(row), positions[row : row + 1])
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(base, one, strict=True))


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_threads_do_not_change_bits(rows):
    """One thread takes whole rows; several share few rows by ranges of the vocabulary."""
    torch.manual_seed(9)
    logits = torch.randn(rows, 70_001) * 2
    options = {"temperature": [0, 0.7, 1, 1, 0.7, 1, 1, 1], "top_p": [1, 1, 1, 0.9, 1, 1, 0.5, 1]}
    table = table_of(8, bans=1, seed=4, ban_until=[0, 0, 0, 0, 0, 200, 0, 200], ban_ids=17, **options)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(draw("cpu", logits, table))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- against the definition, at random ----

FLOATS = {
    "temperature": st.sampled_from([0.0, 0.05, 0.6, 1.0, 2.5]),
    "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    "min_p": st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]),
    "repetition": st.sampled_from([1.0, 1.3, 0.8]),
    "presence": st.sampled_from([0.0, 0.7, -0.7]),
    "frequency": st.sampled_from([0.0, 0.4]),
}


@st.composite
def situations(draw_from, most_vocab):
    vocab = draw_from(st.integers(1, most_vocab))
    rows = draw_from(st.integers(1, 4))
    torch.manual_seed(draw_from(st.integers(0, 2**31)))
    logits = torch.randn(rows, vocab) * draw_from(st.sampled_from([0.0, 0.1, 2.0, 10.0]))
    if draw_from(st.booleans()):
        logits = logits.round()
    logits[torch.rand(rows, vocab) < draw_from(st.sampled_from([0.0, 0.0, 0.3]))] = -INF
    table = table_of(rows, bans=2, biases=2, vocab=vocab if draw_from(st.booleans()) else None)
    for name, values in FLOATS.items():
        getattr(table, name)[:] = torch.tensor([draw_from(values) for _ in range(rows)])
    table.top_k[:] = torch.tensor([draw_from(st.sampled_from([0, 1, 3, 20, vocab])) for _ in range(rows)])
    table.seed[:] = torch.randint(-(2**62), 2**62, (rows,))
    table.sample_index[:] = torch.randint(0, 8, (rows,))
    if table.output_counts is not None:
        table.output_counts[:] = torch.randint(0, 3, (rows, vocab))
        table.prompt_mask[:] = torch.randint(0, 2, (rows, vocab))
    table.ban_until[:] = draw_from(st.sampled_from([0, 1000]))
    table.ban_ids[:] = torch.randint(-1, vocab + 1, (rows, 2))
    table.bias_ids[:] = torch.randint(-1, vocab + 1, (rows, 2))
    table.bias_values[:] = torch.randn(rows, 2) * 5
    slots = torch.where(torch.rand(rows) < 0.1, -1, torch.randperm(rows)).int()
    return logits, slots, torch.randint(0, 2000, (rows,), dtype=torch.int32), table


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=70, deadline=None)
@given(situations(most_vocab=700))
def test_random_situations(isa, situation):
    logits, slots, positions, table = situation
    with capped(isa):
        drawn = draw("cpu", logits, table, slots, positions)
    assert_drawn(drawn, logits, table, slots, positions)


def small_tiles(monkeypatch, capacity: int, tiles_a_program: int) -> None:
    """Small tiles, so that small vocabularies have many; `capacity` candidates fit their list."""
    scan, finish = (
        importlib.import_module(f"elastic_decode.kernels.sample.triton_{part}") for part in ("scan", "finish")
    )
    monkeypatch.setattr(scan, "TILE", 128)
    monkeypatch.setattr(scan, "GROUP", 8)
    monkeypatch.setattr(scan, "tiles_a_program", lambda *_: tiles_a_program)
    monkeypatch.setattr(finish, "HOT", 4)
    monkeypatch.setattr(finish, "BLOCK", 64)
    monkeypatch.setattr(finish, "CAPACITY", capacity)


@pytest.mark.parametrize("name", ["triton"])
@pytest.mark.parametrize("capacity", [16, 16384])
def test_many_tiles_in_triton(monkeypatch, name, capacity):
    small_tiles(monkeypatch, capacity, tiles_a_program=3)

    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(situations(most_vocab=500))
    def check(situation):
        logits, slots, positions, table = situation
        drawn = draw(name, logits, table, slots, positions)
        assert_drawn(drawn, logits, table, slots, positions)

    with torch.device(device_of(name)):
        check()


@pytest.mark.parametrize("name", ["triton"])
@pytest.mark.parametrize("spread", [0.1, 8.0])
def test_tiles_left_without_noise_in_triton_change_nothing(monkeypatch, name, spread):
    """Those are the more, the more tiles a program has: none where it has one."""
    rows, vocab = 5, 1000
    with torch.device(device_of(name)):
        torch.manual_seed(11)
        logits = torch.randn(rows, vocab) * spread
        logits[2, 200:] -= 60  # later tiles far below
        logits[3, :800] -= 60  # … and far above
        logits[4, 128:256] = -INF
        table = table_of(rows, temperature=[1, 0.05, 0.6, 1, 3], seed=3, bans=1, ban_ids=7, ban_until=999)
        slots = torch.arange(rows, dtype=torch.int32)
        results, left = [], []
        for tiles in (1, 3, 8):
            small_tiles(monkeypatch, 64, tiles_a_program=tiles)
            results.append(draw(name, logits, table))
            scan = importlib.import_module("elastic_decode.kernels.sample.triton").scan
            partial = scan(logits, slots, slots + 100, table)[0][3 + len(table)]
            assert partial.shape == (rows, 5, 8)
            left.append(int((partial[:, 4] == -INF).sum()))
    assert_drawn(results[0], logits, table)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert left[0] == 1  # the tile without candidates
    assert left[0] < left[1] < left[2]


# ---- the public op ----


def test_wrong_arguments_raise():
    logits, slots, table = torch.randn(2, 9), ints(0, 1), make_table(2)
    with pytest.raises(TypeError, match=r"logits has dtype torch.float64"):
        sample(logits.double(), slots, slots, table)
    with pytest.raises(ValueError, match=r"slots has shape \(3,\)"):
        sample(logits, ints(0, 1, 1), slots, table)
    with pytest.raises(TypeError, match=r"table.seed"):
        sample(logits, slots, slots, table._replace(seed=ints(0, 0)))
    with pytest.raises(ValueError, match=r"both"):
        sample(logits, slots, slots, table._replace(output_counts=torch.zeros(2, 9, dtype=torch.int32)))
    with pytest.raises(ValueError, match=r"table.bias_values"):
        sample(logits, slots, slots, table._replace(bias_ids=torch.zeros(2, 1, dtype=torch.int32)))
    with pytest.raises(ValueError, match=r"empty vocabulary"):
        sample(torch.empty(2, 0), slots, slots, table)
    with pytest.raises(ValueError, match=r"unknown backend"):
        sample(logits, slots, slots, table, backend="abacus")


def test_torch_library():
    logits, slots = torch.randn(2, 9), ints(0, 1)
    torch.library.opcheck(
        torch.ops.elastic_decode.sample, (logits, slots, slots, *table_of(2, 1, 1, 9), "cpu")
    )

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(logits, slots, positions, table):
        drawn = sample(logits * 2, slots, positions, table)
        return drawn.token + 1, drawn.lse, drawn.sampling_logprob

    table = make_table(2)
    token, lse, logprob = compiled(logits, slots, slots, table)
    eager = sample(logits * 2, slots, slots, table)
    assert torch.equal(token, eager.token + 1)
    assert torch.equal(lse, eager.lse)
    assert torch.equal(logprob, eager.sampling_logprob)
