"""Paged attention in CUDA C++ on an emulated device: right under every schedule, and the same bits in every
company. No GPU is needed, and none is shown to work."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from elastic_decode.kernels.paged_attention import cuda, reference
from elastic_decode.kernels.testing import assert_close

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
# Decode: around a tile's, a split's and two splits' ends, and an idle row.
DECODE = [(n, 1) for n in (1, 15, 16, 17, 0, 64, 65, 255, 256, 257, 513, 700)]
RAGGED = [(1, 1), (33, 5), (0, 3), (17, 17), (5, 0), (300, 2), (2, 5), (0, 0), (512, 3)]
SEEDS = range(1, 7)


@dataclass
class Case:
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def inputs(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k_cache, self.v_cache, self.page_table, self.seq_lens, self.query_start

    def run(self, **options) -> torch.Tensor:
        out = torch.full_like(self.q, torch.nan)
        assert cuda.paged_attention(*self.inputs(), out=out, **options) is out
        return out

    def exact(self, window: int | None = None) -> torch.Tensor:
        q, k_cache, v_cache, *rest = self.inputs()
        return reference.paged_attention(q.double(), k_cache, v_cache, *rest, window=window)

    def baseline(self, window: int | None = None) -> torch.Tensor:
        """PyTorch's in q's dtype, a row at a time."""
        out = torch.zeros_like(self.q)
        for row, (start, end) in enumerate(itertools.pairwise(self.query_start.tolist())):
            seq_len = int(self.seq_lens[row])
            positions = torch.arange(seq_len - (end - start), seq_len)[:, None]
            age = positions - torch.arange(seq_len)
            mask = (age >= 0) & (age < (window or seq_len + 1))
            if not mask.any():
                continue
            tensors = self.q[start:end], self.keys[row], self.values[row]
            q, k, v = (x.to(self.q.dtype).transpose(0, 1) for x in tensors)
            # A query without keys is 0 here, NaN or not there.
            attended = F.scaled_dot_product_attention(q[None], k[None], v[None], mask, enable_gqa=True)[0]
            out[start:end] = torch.where(mask.any(1)[:, None, None], attended.transpose(0, 1), 0)
        return out


def pack(
    keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], page_size: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pages in no order; what holds no token is NaN, and table entries past the last page are garbage."""
    counts = [-(-len(k) // page_size) for k in keys]
    order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(seed)).tolist()
    shape = (len(order), page_size, *keys[0].shape[1:])
    caches = [torch.full(shape, torch.nan) for _ in range(2)]
    table = torch.full((len(keys), max(counts) + 1), -(2**30), dtype=torch.int32)
    for row, count in enumerate(counts):
        for i in range(count):
            page = table[row, i] = order.pop()
            for cache, tokens in zip(caches, (keys[row], values[row]), strict=True):
                part = tokens[i * page_size : (i + 1) * page_size]
                cache[page, : len(part)] = part.float()
    return caches[0].to(keys[0].dtype), caches[1].to(keys[0].dtype), table


def make(
    rows: Sequence[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    extra_tokens: int = 0,
) -> Case:
    """Rows of (seq_len, queries)."""
    generator = torch.Generator().manual_seed(0)

    def normal(count: int, heads: int, factor: float, dtype: torch.dtype) -> torch.Tensor:
        return (torch.randn(count, heads, head_dim, generator=generator) * factor).to(dtype)

    keys = [normal(n, kv_heads, 2, kv_dtype or dtype) for n, _ in rows]
    values = [normal(n, kv_heads, 1, kv_dtype or dtype) for n, _ in rows]
    start = torch.tensor(list(itertools.accumulate((n for _, n in rows), initial=0)), dtype=torch.int32)
    q = normal(int(start[-1]) + extra_tokens, heads, 1, dtype)
    lens = torch.tensor([n for n, _ in rows], dtype=torch.int32)
    return Case(q, *pack(keys, values, page_size, 0), lens, start, keys, values)


def check(case: Case, window: int | None = None) -> None:
    assert_close(case.run(window=window), case.exact(window), case.baseline(window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
def test_decode(cuda_on_cpu, dtype: str, head_dim: int) -> None:
    check(make(DECODE, head_dim=head_dim, dtype=DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", cuda.FLOAT8_HEAD_DIMS)
def test_float8_keys_and_values(cuda_on_cpu, dtype: str, head_dim: int) -> None:
    case = make(
        DECODE, heads=6, head_dim=head_dim, page_size=5, dtype=DTYPES[dtype], kv_dtype=torch.float8_e4m3fn
    )
    check(case)
    check(case, window=70)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_float8_is_read_as_what_it_is(cuda_on_cpu, dtype: str) -> None:
    """A token that sees itself alone gives its value: each of the 256, NaN among them."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    case = make([(1, 1)] * 8, heads=1, kv_heads=1, head_dim=32, page_size=1, dtype=DTYPES[dtype])
    case.v_cache = torch.zeros(9, 1, 1, 32, dtype=torch.uint8)
    case.v_cache[case.page_table[:, 0].long(), 0, 0] = values.view(torch.uint8).view(8, 32)
    case.v_cache = case.v_cache.view(torch.float8_e4m3fn)
    case.k_cache = torch.zeros_like(case.v_cache)
    out = case.run().view(-1)
    torch.testing.assert_close(out, values.to(DTYPES[dtype]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (14, 2), (16, 1), (17, 1), (71, 1), (40, 2)]
)
def test_head_ratios(cuda_on_cpu, heads: int, kv_heads: int) -> None:
    check(make(DECODE, heads=heads, kv_heads=kv_heads, page_size=5))


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 255, 256, 257, 300, 1000])
def test_windows(cuda_on_cpu, window: int) -> None:
    check(make([*RAGGED, *DECODE], head_dim=32), window)


@pytest.mark.parametrize("page_size", [1, 3, 16, 48, 256, 1024])
def test_page_sizes(cuda_on_cpu, page_size: int) -> None:
    check(make(DECODE, page_size=page_size, heads=6))


def test_ragged_queries(cuda_on_cpu) -> None:
    """Any number of queries a row, more than it has tokens, tokens that no row has."""
    case = make(RAGGED, extra_tokens=3)
    check(case)
    assert not case.run()[-3:].any()


@pytest.mark.parametrize("counts", [(0, 2, 1), (2, 0, 1), (1, 0, 1), (3, 0, 0), (0, 0, 0), (1, 1, 1)])
def test_as_many_queries_as_rows_need_not_be_decode(cuda_on_cpu, counts: tuple[int, ...]) -> None:
    rows = [(300 + n, n) for n in counts]
    check(make(rows, extra_tokens=3 - sum(counts)))


def test_no_tokens_and_no_rows(cuda_on_cpu) -> None:
    case = make([(4, 0)])
    assert case.run().shape == (0, 4, 64)
    empty = torch.zeros(0, dtype=torch.int32)
    none = replace(make([(4, 3)]), page_table=torch.zeros(0, 3, dtype=torch.int32), seq_lens=empty)
    assert not replace(none, query_start=torch.zeros(1, dtype=torch.int32)).run().any()


def test_scale_and_a_wider_table(cuda_on_cpu) -> None:
    case = make(DECODE)
    expected = case.run()
    assert torch.equal(case.run(scale=0.125), expected)
    assert torch.equal(replace(case, q=case.q / 2).run(scale=0.25), expected)
    wide = torch.full((len(DECODE), case.page_table.shape[1] + 300), -7, dtype=torch.int32)
    wide[:, : case.page_table.shape[1]] = case.page_table
    assert torch.equal(replace(case, page_table=wide).run(), expected)
    assert torch.equal(replace(case, page_table=wide[:, : case.page_table.shape[1]]).run(), expected)


def test_extreme_scores(cuda_on_cpu) -> None:
    """Weights of whole splits are 0, and the maxima of splits are further apart than exp can hold."""
    case = make([(1030, 1), (600, 1)], head_dim=32)
    check(replace(case, q=case.q * 60))


def test_nan_stays_where_it_is(cuda_on_cpu) -> None:
    """In a value or key that the token sees it is NaN; no other token is."""
    case = make([(300, 3), (280, 1)])
    clean = case.run(window=200)
    for position in (99, 100, 250, 298):
        dirty = replace(case, k_cache=case.k_cache.clone(), v_cache=case.v_cache.clone())
        page = case.page_table[0, position // 16]
        dirty.v_cache[page, position % 16] = dirty.k_cache[page, position % 16] = torch.nan
        out = dirty.run(window=200)
        for token in range(4):
            sees = token < 3 and 297 + token - 200 < position <= 297 + token
            assert out[token].isnan().all() if sees else torch.equal(out[token], clean[token])


# ---- the same bits ----


def test_every_schedule_gives_the_same_bits(cuda_on_cpu) -> None:
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
        expected = case.run(window=300)
        assert expected.isfinite().all()
        for seed in SEEDS:
            cuda_on_cpu.set_schedule(seed)
            assert torch.equal(case.run(window=300), expected), (head_dim, seed)


@pytest.mark.parametrize(("heads", "head_dim", "window"), [(6, 64, None), (6, 64, 70), (4, 128, None)])
def test_bits_depend_on_the_token_alone(
    cuda_on_cpu, monkeypatch: pytest.MonkeyPatch, heads: int, head_dim: int, window: int | None
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
        alone.append(replace(one, query_start=start).run(window=window))
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
            assert torch.equal(mixed.run(window=window)[2:-1], expected[part]), (page_size, chunk)


def test_a_batch_is_its_rows(cuda_on_cpu) -> None:
    """More rows than a block has threads, so that a thread answers for several."""
    rows = [((37 * i) % 600, 1) for i in range(150)]
    case = make(rows, heads=2, kv_heads=1, head_dim=16)
    check(case)
    out = case.run()
    for row in (0, 7, 64, 149):
        part = slice(row, row + 1)
        alone = replace(case, q=case.q[part], page_table=case.page_table[part], seq_lens=case.seq_lens[part])
        assert torch.equal(replace(alone, query_start=case.query_start[:2]).run()[0], out[row])


# ---- the wrapper ----


def test_two_launches_and_one_where_a_split_is_enough(cuda_on_cpu) -> None:
    for seq_len, expected in ((200, 1), (300, 2)):
        before = cuda_on_cpu.launches()
        make([(seq_len, 1)]).run()
        assert cuda_on_cpu.launches() - before == expected


def test_what_it_has_no_kernel_for(cuda_on_cpu) -> None:
    with pytest.raises(ValueError, match=r"head_dim 16, 32, 64, 80, 96, 128, 256 .* got 48"):
        make([(4, 1)], head_dim=48).run()
    with pytest.raises(ValueError, match=r"head_dim 32, 64, 96, 128, 256 with .*float8_e4m3fn, got 80"):
        make([(4, 1)], head_dim=80, kv_dtype=torch.float8_e4m3fn).run()
    with pytest.raises(TypeError, match=r"bfloat16 or float16.*float32"):
        make([(4, 1)], dtype=torch.float32).run()
    with pytest.raises(TypeError, match=r"got torch\.bfloat16 and torch.float16"):
        make([(4, 1)], kv_dtype=torch.float16).run()
