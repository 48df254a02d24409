"""Paged attention in CUDA C++: right, also under every schedule of its threads, and the same bits in every
company. On an emulated device, which shows nothing about a GPU, and on a GPU where there is one."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from elastic_decode.kernels.paged_attention import cuda
from elastic_decode.kernels.paged_attention.testing import Case, make_case, pack, pytorch_attention
from elastic_decode.kernels.testing import assert_close

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
# Decode: around a tile's, a split's and two splits' ends, and an idle row.
DECODE = [(n, 1) for n in (1, 15, 16, 17, 0, 64, 65, 255, 256, 257, 513, 700)]
RAGGED = [(1, 1), (33, 5), (0, 3), (17, 17), (5, 0), (300, 2), (0, 0), (512, 3)]
SEEDS = range(1, 7)

Run = Callable[..., torch.Tensor]


@pytest.fixture(params=["emulated", "cuda"])
def run(request: pytest.FixtureRequest) -> Run:
    """run(case, **options): the op into an output of NaN; the result is on the CPU."""
    device = torch.device("cuda" if request.param == "cuda" else "cpu")
    if request.param == "emulated":
        request.getfixturevalue("cuda_on_cpu")
    elif reason := cuda.why_unavailable():
        pytest.skip(reason)

    def run(case: Case, **options) -> torch.Tensor:
        out = torch.full_like(case.q, torch.nan, device=device)
        assert cuda.paged_attention(*case.to(device).inputs(), out=out, **options) is out
        return out.cpu()

    return run


def make(rows: Sequence[tuple[int, int]], **options) -> Case:
    """Rows of (seq_len, queries)."""
    defaults = {"heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": torch.bfloat16}
    return make_case(rows, **defaults | options)


def check(run: Run, case: Case, window: int | None = None) -> None:
    exact, baseline = (pytorch_attention(case, dtype, window) for dtype in (torch.float64, case.q.dtype))
    assert_close(run(case, window=window), exact, baseline)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
def test_decode(run: Run, dtype: str, head_dim: int) -> None:
    check(run, make(DECODE, head_dim=head_dim, dtype=DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", cuda.FLOAT8_HEAD_DIMS)
def test_float8_keys_and_values(run: Run, dtype: str, head_dim: int) -> None:
    case = make(
        DECODE, heads=6, head_dim=head_dim, page_size=5, dtype=DTYPES[dtype], kv_dtype=torch.float8_e4m3fn
    )
    check(run, case)
    check(run, case, window=70)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_float8_is_read_as_what_it_is(run: Run, dtype: str) -> None:
    """A token that sees itself alone gives its value: each of the 256, NaN among them."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    case = make([(1, 1)] * 8, heads=1, kv_heads=1, head_dim=32, page_size=1, dtype=DTYPES[dtype])
    case.v_cache = torch.zeros(case.v_cache.shape, dtype=torch.uint8)
    case.v_cache[case.page_table[:, 0].long(), 0, 0] = values.view(torch.uint8).view(8, 32)
    case.v_cache = case.v_cache.view(torch.float8_e4m3fn)
    case.k_cache = torch.zeros_like(case.v_cache)
    out = run(case).view(-1)
    torch.testing.assert_close(out, values.to(DTYPES[dtype]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (14, 2), (16, 1), (17, 1), (71, 1), (40, 2)]
)
def test_head_ratios(run: Run, heads: int, kv_heads: int) -> None:
    check(run, make(DECODE, heads=heads, kv_heads=kv_heads, page_size=5))


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 255, 256, 257, 300, 1000])
def test_windows(run: Run, window: int) -> None:
    check(run, make([*RAGGED, *DECODE], head_dim=32), window)


@pytest.mark.parametrize("page_size", [1, 3, 16, 48, 256, 1024])
def test_page_sizes(run: Run, page_size: int) -> None:
    check(run, make(DECODE, page_size=page_size, heads=6))


def test_ragged_queries(run: Run) -> None:
    """Any number of queries a row, and tokens that no row has."""
    case = make(RAGGED, idle_tokens=3)
    check(run, case)
    assert not run(case)[-3:].any()


def test_more_queries_than_tokens(run: Run) -> None:
    """Those before the first token are 0."""
    case = make([(9, 1), (2, 5)])
    out = run(case)
    assert not out[1:4].any()
    lens, start = torch.tensor([9, 2], dtype=torch.int32), torch.tensor([0, 1, 3], dtype=torch.int32)
    rest = replace(case, q=case.q[[0, 4, 5]], seq_lens=lens, query_start=start)
    assert torch.equal(run(rest), out[[0, 4, 5]])


@pytest.mark.parametrize("counts", [(0, 2, 1), (2, 0, 1), (1, 0, 1), (3, 0, 0), (0, 0, 0), (1, 1, 1)])
def test_as_many_queries_as_rows_need_not_be_decode(run: Run, counts: tuple[int, ...]) -> None:
    rows = [(300 + n, n) for n in counts]
    check(run, make(rows, idle_tokens=3 - sum(counts)))


def test_no_tokens_and_no_rows(run: Run) -> None:
    case = make([(4, 0)])
    assert run(case).shape == (0, 4, 64)
    empty = torch.zeros(0, dtype=torch.int32)
    none = replace(make([(4, 3)]), page_table=torch.zeros(0, 3, dtype=torch.int32), seq_lens=empty)
    assert not run(replace(none, query_start=torch.zeros(1, dtype=torch.int32))).any()


def test_scale_and_a_wider_table(run: Run) -> None:
    case = make(DECODE)
    expected = run(case)
    assert torch.equal(run(case, scale=0.125), expected)
    assert torch.equal(run(replace(case, q=case.q / 2), scale=0.25), expected)
    wide = torch.full((len(DECODE), case.page_table.shape[1] + 300), -7, dtype=torch.int32)
    wide[:, : case.page_table.shape[1]] = case.page_table
    assert torch.equal(run(replace(case, page_table=wide)), expected)
    assert torch.equal(run(replace(case, page_table=wide[:, : case.page_table.shape[1]])), expected)


@pytest.mark.parametrize("window", [None, 8500])
def test_more_splits_than_the_fold_takes_at_once(run: Run, window: int | None) -> None:
    check(run, make([(n, 1) for n in (8192, 8193, 9000)], heads=1, kv_heads=1, head_dim=16), window)


@pytest.mark.parametrize("run", ["emulated"], indirect=True)
def test_the_fold_under_every_schedule(run: Run, cuda_on_cpu) -> None:
    case = make([(8600, 1)], heads=1, kv_heads=1, head_dim=128)
    results = []
    for seed in (0, 1, 2):
        cuda_on_cpu.set_schedule(seed)
        results.append(run(case))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_extreme_scores(run: Run) -> None:
    """Weights of whole splits are 0, and the maxima of splits are further apart than exp can hold."""
    case = make([(1030, 1), (600, 1)], head_dim=32)
    check(run, replace(case, q=case.q * 60))


def test_nan_stays_where_it_is(run: Run) -> None:
    """In a value or key that the token sees it is NaN; no other token is."""
    case = make([(300, 3), (280, 1)])
    clean = run(case, window=200)
    for position in (99, 100, 250, 298):
        dirty = replace(case, k_cache=case.k_cache.clone(), v_cache=case.v_cache.clone())
        page = case.page_table[0, position // 16]
        dirty.v_cache[page, position % 16] = dirty.k_cache[page, position % 16] = torch.nan
        out = run(dirty, window=200)
        for token in range(4):
            sees = token < 3 and 297 + token - 200 < position <= 297 + token
            assert out[token].isnan().all() if sees else torch.equal(out[token], clean[token])


# ---- the same bits ----


@pytest.mark.parametrize("run", ["emulated"], indirect=True)
def test_every_schedule_gives_the_same_bits(run: Run, cuda_on_cpu) -> None:
    """Threads, blocks and copies in an order drawn from a seed: a missing barrier or wait would show."""
    bf16, f16, f8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
    for head_dim, dtype, kv_dtype in ((64, bf16, bf16), (128, f16, f16), (256, bf16, bf16), (64, bf16, f8)):
        case = make(
            [(700, 1), (20, 1), (0, 1), (260, 2)],
            heads=6,
            head_dim=head_dim,
            dtype=dtype,
            kv_dtype=kv_dtype,
        )
        cuda_on_cpu.set_schedule(0)
        expected = run(case, window=300)
        assert expected.isfinite().all()
        for seed in SEEDS:
            cuda_on_cpu.set_schedule(seed)
            assert torch.equal(run(case, window=300), expected), (head_dim, seed)


@pytest.mark.parametrize(("heads", "head_dim", "window"), [(6, 64, None), (6, 64, 70), (4, 128, None)])
def test_bits_depend_on_the_token_alone(
    run: Run, monkeypatch: pytest.MonkeyPatch, heads: int, head_dim: int, window: int | None
) -> None:
    """One query at a time; in chunks, on pages of other sizes, beside other rows, with other blocks, in one
    pass or several."""
    count = 10
    case = make([(515, count), (90, 2)], heads=heads, head_dim=head_dim)
    alone = []
    for i in range(count):
        lens = torch.tensor([515 - count + i + 1], dtype=torch.int32)
        start = torch.tensor([0, 1], dtype=torch.int32)
        one = replace(case, q=case.q[i : i + 1], page_table=case.page_table[:1], seq_lens=lens)
        alone.append(run(replace(one, query_start=start), window=window))
    expected = torch.cat(alone)
    assert expected.isfinite().all()
    for page_size, chunks, processors, workspace in [
        (1, [count], 1, 128 << 20),
        (7, [3, 1, 6], 3, 1),
        (64, [9, 1], 100, 50_000),
    ]:
        monkeypatch.setattr(cuda, "num_processors", lambda _, n=processors: n)
        monkeypatch.setattr(cuda, "WORKSPACE_BYTES", workspace)
        k_cache, v_cache, table = pack(case.keys, case.values, page_size, seed=page_size)
        done = 0
        for chunk in chunks:
            part = slice(done, done + chunk)
            done += chunk
            mixed = Case(
                torch.cat([case.q[:2], case.q[part], case.q[:1]]),
                k_cache,
                v_cache,
                table[[1, 0, 1]].contiguous(),
                torch.tensor([90, 515 - count + done, 33], dtype=torch.int32),
                torch.tensor([0, 2, 2 + chunk, 3 + chunk], dtype=torch.int32),
                [],
                [],
            )
            assert torch.equal(run(mixed, window=window)[2:-1], expected[part]), (page_size, chunk)


def test_a_batch_is_its_rows(run: Run) -> None:
    """More rows than a block has threads, so that a thread answers for several."""
    rows = [((37 * i) % 600, 1) for i in range(150)]
    case = make(rows, heads=2, kv_heads=1, head_dim=16)
    check(run, case)
    out = run(case)
    for row in (0, 7, 64, 149):
        part = slice(row, row + 1)
        alone = replace(case, q=case.q[part], page_table=case.page_table[part], seq_lens=case.seq_lens[part])
        assert torch.equal(run(replace(alone, query_start=case.query_start[:2]))[0], out[row])


# ---- the wrapper ----


@pytest.mark.parametrize("run", ["emulated"], indirect=True)
def test_two_launches_and_one_where_a_split_is_enough(run: Run, cuda_on_cpu) -> None:
    for seq_len, expected in ((200, 1), (300, 2)):
        before = cuda_on_cpu.launches()
        run(make([(seq_len, 1)]))
        assert cuda_on_cpu.launches() - before == expected


def test_what_it_has_no_kernel_for(run: Run) -> None:
    with pytest.raises(ValueError, match=r"head_dim 16, 32, 64, 80, 96, 128, 256 .* got 48"):
        run(make([(4, 1)], head_dim=48))
    with pytest.raises(ValueError, match=r"head_dim 32, 64, 96, 128, 256 with .*float8_e4m3fn, got 80"):
        run(make([(4, 1)], head_dim=80, kv_dtype=torch.float8_e4m3fn))
    with pytest.raises(TypeError, match=r"bfloat16 or float16.*float32"):
        run(make([(4, 1)], dtype=torch.float32))
    with pytest.raises(TypeError, match=r"got torch\.bfloat16 and torch.float16"):
        run(make([(4, 1)], kv_dtype=torch.float16))
