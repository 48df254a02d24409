"""Paged attention: every backend against PyTorch, and the promise of bits that depend on the token alone."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from elastic_decode.kernels import _C, registry
from elastic_decode.kernels.paged_attention import SharedPrefixes, paged_attention, reference
from elastic_decode.kernels.testing import assert_close

BACKENDS = [b for b in ("reference", "cpu") if registry.available("paged_attention")[b] is None]
CPU_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
DTYPES = {**CPU_DTYPES, "f16": torch.float16}


@dataclass
class Case:
    """Rows of (seq_len, number of queries) and everything the op takes for them."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start: torch.Tensor
    keys: list[torch.Tensor]  # a row's [seq_len, Hkv, D]
    values: list[torch.Tensor]

    def inputs(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k_cache, self.v_cache, self.page_table, self.seq_lens, self.query_start

    def run(self, backend: str = "cpu", **options) -> torch.Tensor:
        out = torch.full_like(self.q, torch.nan)
        result = paged_attention(*self.inputs(), out=out, backend=backend, **options)
        assert result is out
        return out


def pack(
    keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], page_size: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows' keys and values in shuffled pages; what no token fills is NaN, spare entries are garbage."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-len(k) // page_size) for k in keys]
    num_pages, width = sum(counts) + 2, max([*counts, 0]) + 2
    order = torch.randperm(num_pages, generator=generator).tolist()
    shape = (num_pages, page_size, *keys[0].shape[1:])
    k_cache = torch.full(shape, torch.nan, dtype=keys[0].dtype)
    v_cache = torch.full(shape, torch.nan, dtype=keys[0].dtype)
    table = torch.full((len(keys), width), -(2**30), dtype=torch.int32)
    for row, (k, v) in enumerate(zip(keys, values, strict=True)):
        for page in range(counts[row]):
            table[row, page] = order.pop()
            part = slice(page * page_size, (page + 1) * page_size)
            k_cache[table[row, page], : len(k[part])] = k[part]
            v_cache[table[row, page], : len(v[part])] = v[part]
    return k_cache, v_cache, table


def make_case(
    rows: Sequence[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    seed: int = 0,
    idle_tokens: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    kv_dtype = kv_dtype or dtype
    lens = [max(0, seq_len) for seq_len, _ in rows]
    keys = [normal(n, kv_heads, head_dim).mul(2).to(kv_dtype) for n in lens]
    values = [normal(n, kv_heads, head_dim).to(kv_dtype) for n in lens]
    counts = [n for _, n in rows]
    start = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    q = normal(sum(counts) + idle_tokens, heads, head_dim).to(dtype)
    k_cache, v_cache, table = pack(keys, values, page_size, seed)
    seq_lens = torch.tensor([n for n, _ in rows], dtype=torch.int32)
    return Case(q, k_cache, v_cache, table, seq_lens, start, keys, values)


def pytorch_attention(case: Case, dtype: torch.dtype, window: int | None = None) -> torch.Tensor:
    """The same with scaled_dot_product_attention in `dtype`, a row at a time."""
    out = torch.zeros_like(case.q, dtype=dtype)
    starts = case.query_start.tolist()
    for row, seq_len in enumerate(case.seq_lens.tolist()):
        start, end = starts[row], starts[row + 1]
        if seq_len <= 0 or start == end:
            continue
        q, k, v = (
            x.to(dtype).transpose(0, 1)[None] for x in (case.q[start:end], case.keys[row], case.values[row])
        )
        positions = torch.arange(seq_len - (end - start), seq_len)[:, None]
        columns = torch.arange(seq_len)[None]
        mask = (columns <= positions) & (columns > positions - (window or seq_len + 1))
        out[start:end] = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1)
    return out


def check(case: Case, window: int | None = None) -> None:
    """The C++ kernel, on every instruction set that this processor has."""
    exact = pytorch_attention(case, torch.float64, window)
    baseline = pytorch_attention(case, case.q.dtype, window)
    for isa in each_isa():
        assert_close(case.run(window=window), exact, baseline, what=isa)


def each_isa() -> Iterator[str]:
    """Caps the C++ kernels at each instruction set in turn."""
    best = _C.cpu.isa()
    try:
        for name in ("generic", "avx2", "avx512", "avx512_bf16"):
            if int(getattr(_C.cpu.Isa, name)) <= int(best):
                _C.cpu.limit_isa(getattr(_C.cpu.Isa, name))
                yield name
    finally:
        _C.cpu.limit_isa(best)


MIXED = [
    (1, 1),
    (15, 1),
    (16, 1),
    (17, 17),
    (0, 1),
    (33, 5),
    (64, 64),
    (0, 0),
    (300, 1),
    (5, 0),
    (257, 3),
    (512, 2),
]


def test_reference_is_pytorch_attention() -> None:
    case = make_case(MIXED, heads=6, kv_heads=2, head_dim=24, dtype=torch.float64)
    for window in (None, 7):
        exact = pytorch_attention(case, torch.float64, window)
        torch.testing.assert_close(reference.paged_attention(*case.inputs(), window=window), exact)


@pytest.mark.parametrize("head_dim", [24, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "f32-bf16", "bf16-f32"])
def test_head_dims_and_dtypes(head_dim: int, dtypes: str) -> None:
    dtype, _, kv_dtype = dtypes.partition("-")
    check(
        make_case(
            MIXED,
            heads=4,
            kv_heads=2,
            head_dim=head_dim,
            dtype=DTYPES[dtype],
            kv_dtype=DTYPES[kv_dtype or dtype],
        )
    )


@pytest.mark.parametrize("head_dim", [1, 7, 17, 20, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check(make_case(MIXED, heads=3, kv_heads=3, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (5, 5), (6, 2), (14, 2), (8, 1), (9, 1), (71, 1)])
def test_head_ratios(heads: int, kv_heads: int) -> None:
    check(make_case(MIXED, heads=heads, kv_heads=kv_heads, head_dim=16, dtype=torch.bfloat16))


@pytest.mark.parametrize("window", [1, 2, 15, 16, 31, 64, 255, 256, 257, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows(window: int, dtype: torch.dtype) -> None:
    rows = [*MIXED, (700, 1), (1030, 40)]
    check(make_case(rows, heads=4, kv_heads=2, head_dim=32, dtype=dtype), window)


def test_page_table_may_be_part_of_a_wider_one() -> None:
    case = make_case(MIXED, heads=2, kv_heads=1, head_dim=32)
    expected = case.run()
    wide = torch.full((len(MIXED), case.page_table.shape[1] + 7), -9, dtype=torch.int32)
    wide[:, : case.page_table.shape[1]] = case.page_table
    case.page_table = wide[:, : case.page_table.shape[1] - 2]
    assert torch.equal(case.run(), expected)


def test_scale_given() -> None:
    case = make_case([(40, 3)], heads=2, kv_heads=1, head_dim=32)
    scaled = make_case([(40, 3)], heads=2, kv_heads=1, head_dim=32)
    scaled.q.mul_(0.5)
    assert torch.equal(case.run(scale=0.25 / 2), scaled.run(scale=0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_without_keys_are_zero(dtype: torch.dtype) -> None:
    """Idle rows, tokens past the last row, and more queries than the row has tokens."""
    rows = [(0, 3), (2, 5), (9, 1)]
    case = make_case(rows, heads=2, kv_heads=1, head_dim=32, dtype=dtype, idle_tokens=4)
    out = case.run()
    empty = [0, 1, 2, 3, 4, 5, 9, 10, 11, 12]
    assert torch.equal(out[empty], torch.zeros_like(out[empty]))
    rest = make_case([(2, 2), (9, 1)], heads=2, kv_heads=1, head_dim=32, dtype=dtype)
    rest.q, rest.k_cache, rest.v_cache = case.q[6:9].contiguous(), case.k_cache, case.v_cache
    rest.page_table = case.page_table[1:].contiguous()
    assert torch.equal(out[6:9], rest.run())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_no_tokens(backend: str) -> None:
    case = make_case([(4, 0)], heads=2, kv_heads=1, head_dim=8)
    assert case.run(backend).shape == (0, 2, 8)
    none = torch.zeros(0, 3, dtype=torch.int32)
    empty, start = torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    out = paged_attention(case.q, case.k_cache, case.v_cache, none, empty, start, backend=backend)
    assert out.shape == (0, 2, 8)
    q = torch.full((3, 2, 8), torch.nan)
    assert not paged_attention(q, case.k_cache, case.v_cache, none, empty, start, backend=backend).any()


def test_future_tokens_cannot_reach_the_past() -> None:
    """Not even as 0 * NaN: a chunk is computed together, yet a NaN in a later token stays there."""
    for dtype, (seq_len, count) in itertools.product(CPU_DTYPES.values(), [(37, 37), (290, 60)]):
        case = make_case([(seq_len, count)], heads=4, kv_heads=2, head_dim=32, dtype=dtype)
        for isa, window in itertools.product(each_isa(), (None, 9)):
            clean = case.run(window=window)
            for poisoned in (seq_len - count + 1, seq_len - 20, seq_len - 1):
                page, offset = case.page_table[0, poisoned // 16], poisoned % 16
                saved = case.v_cache[page, offset].clone(), case.k_cache[page, offset].clone()
                case.v_cache[page, offset], case.k_cache[page, offset] = torch.nan, torch.nan
                dirty = case.run(window=window)
                case.v_cache[page, offset], case.k_cache[page, offset] = saved
                before = poisoned - (seq_len - count)
                after = before + window if window else count
                assert torch.equal(dirty[:before], clean[:before]), (isa, window, poisoned)
                assert dirty[before:after].isnan().all(), (isa, window, poisoned)
                assert torch.equal(dirty[after:], clean[after:]), (isa, window, poisoned)


# ---- a token's bits depend on its query, its keys and values and its position, and on nothing else ----


def decode_one_by_one(case: Case, window: int | None) -> torch.Tensor:
    """Row 0 of `case`, a call a token."""
    seq_len, count = int(case.seq_lens[0]), int(case.query_start[1])
    out = []
    for i in range(count):
        lens = torch.tensor([seq_len - count + i + 1], dtype=torch.int32)
        start = torch.tensor([0, 1], dtype=torch.int32)
        caches = case.k_cache, case.v_cache, case.page_table[:1].contiguous()
        out.append(paged_attention(case.q[i : i + 1], *caches, lens, start, window=window, backend="cpu"))
    return torch.cat(out)


def in_chunks(
    case: Case, chunks: Sequence[int], page_size: int, window: int | None, backend: str = "cpu"
) -> torch.Tensor:
    """Row 0 of `case` over pages of another size, prefilled chunk by chunk, each beside unlike rows."""
    k_cache, v_cache, table = pack([*case.keys, *case.keys], [*case.values, *case.values], page_size, seed=3)
    count, done, out = int(case.query_start[1]), 0, []
    position = int(case.seq_lens[0]) - count
    for chunk in chunks:
        part = case.q[done : done + chunk]
        q = torch.cat([case.q[:3], part, case.q[:1]])
        lens = torch.tensor([11, position + done + chunk, 5], dtype=torch.int32)
        start = torch.tensor([0, 3, 3 + chunk, 4 + chunk], dtype=torch.int32)
        tables = table[[0, 1, 0]].contiguous()
        result = paged_attention(q, k_cache, v_cache, tables, lens, start, window=window, backend=backend)
        out.append(result[3 : 3 + chunk])
        done += chunk
    assert done == count
    return torch.cat(out)


@pytest.mark.parametrize("dtypes", ["f32", "bf16", "f32-bf16"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 32), (7, 1, 24), (2, 2, 40)])
@pytest.mark.parametrize("window", [None, 45])
def test_bits_do_not_depend_on_chunking_or_pages(
    dtypes: str, heads: int, kv_heads: int, head_dim: int, window: int | None
) -> None:
    dtype, _, kv_dtype = dtypes.partition("-")
    case = make_case(
        [(530, 300)],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=DTYPES[dtype],
        kv_dtype=DTYPES[kv_dtype or dtype],
    )
    for isa in each_isa():
        expected = decode_one_by_one(case, window)
        for page_size, chunks in [
            (1, [300]),
            (3, [1, 7, 33, 63, 65, 131]),
            (16, [299, 1]),
            (64, [17] * 17 + [11]),
        ]:
            got = in_chunks(case, chunks, page_size, window)
            assert torch.equal(got, expected), (isa, page_size, chunks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [[(3000, 1)], [(1500, 1), (2000, 1), (700, 1)], [(900, 300)]])
def test_bits_do_not_depend_on_threads(dtype: torch.dtype, rows: list[tuple[int, int]]) -> None:
    """One row (its splits spread over threads), several, and prefill."""
    case = make_case(rows, heads=8, kv_heads=2, head_dim=64, dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.run())
    finally:
        torch.set_num_threads(before)
    assert results[0].isfinite().all()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_extreme_scores() -> None:
    """Weights underflow to 0 in some splits; the maxima of splits differ by more than exp can hold."""
    case = make_case([(1030, 30)], heads=4, kv_heads=2, head_dim=32)
    case.q.mul_(60)
    for isa in each_isa():
        out = case.run()
        assert out.isfinite().all()
        assert torch.equal(decode_one_by_one(case, None), out), isa


# ---- the public op ----


def test_reads_the_cache_through_the_compiled_op() -> None:
    case = make_case([(5, 1), (33, 4)], heads=4, kv_heads=2, head_dim=32)
    arguments = (*case.inputs(), 32**-0.5, 0, "cpu", None, None)
    torch.library.opcheck(torch.ops.elastic_decode.paged_attention.default, arguments)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*tensors: torch.Tensor) -> torch.Tensor:
        return paged_attention(*tensors) + 1

    assert torch.equal(compiled(*case.inputs()), case.run() + 1)


WRONG = [
    ("q", lambda x: x.double(), TypeError, "dtype"),
    ("q", lambda x: x[0], ValueError, "shape"),
    ("q", lambda x: x.transpose(0, 1), ValueError, "contiguous|shape"),
    ("q", lambda x: x[:, :3].contiguous(), ValueError, "multiple"),
    ("q", lambda x: x.half(), TypeError, "dtype"),
    ("k_cache", lambda x: x[..., :4].contiguous(), ValueError, "k_cache"),
    ("v_cache", lambda x: x[1:], ValueError, "v_cache"),
    ("v_cache", lambda x: x.bfloat16(), TypeError, "v_cache"),
    ("page_table", lambda x: x.long(), TypeError, "page_table"),
    ("page_table", lambda x: x[:, :2].contiguous(), ValueError, "hold"),
    ("page_table", lambda x: x.t().contiguous().t(), ValueError, "contiguous"),
    ("page_table", lambda x: x * 0 - 1, ValueError, "page -1"),
    ("page_table", lambda x: x * 0 + 99, ValueError, "page 99"),
    ("seq_lens", lambda x: x[:1], ValueError, "seq_lens"),
    ("query_start", lambda x: x[:2], ValueError, "query_start"),
    ("query_start", lambda x: x + 1, ValueError, "rise from 0"),
    ("query_start", lambda x: x.flip(0), ValueError, "rise from 0"),
]


@pytest.mark.parametrize(("name", "change", "error", "match"), WRONG)
def test_wrong_arguments_raise(name: str, change, error: type[Exception], match: str) -> None:
    case = make_case([(5, 1), (60, 4)], heads=4, kv_heads=2, head_dim=32)
    setattr(case, name, change(getattr(case, name)))
    with pytest.raises(error, match=match):
        paged_attention(*case.inputs())


# ---- groups of rows that share a prefix ----


def make_groups(
    groups: Sequence[tuple[int, Sequence[int]]], *, heads: int, kv_heads: int, head_dim: int, **options
) -> tuple[Case, SharedPrefixes]:
    """Decode rows by group: (shared_len, seq_lens of its rows); the rows' first tokens are in the same pages,
    as far as pages are full. Idle rows' tables are garbage."""
    lens = [n for _, rows in groups for n in rows]
    case = make_case([(n, 1) for n in lens], heads=heads, kv_heads=kv_heads, head_dim=head_dim, **options)
    page_size, num_rows = case.k_cache.shape[1], len(lens)
    starts = list(itertools.accumulate((len(rows) for _, rows in groups), initial=0))
    shared_len = torch.zeros(num_rows, dtype=torch.int32)
    for group, (length, _) in enumerate(groups):
        live = [row for row in range(starts[group], starts[group + 1]) if lens[row] > 0]
        full = length // page_size * page_size
        shared_len[group] = full if live else length
        for row in live[1:]:
            case.page_table[row, : full // page_size] = case.page_table[live[0], : full // page_size]
            case.keys[row][:full], case.values[row][:full] = (
                x[live[0]][:full] for x in (case.keys, case.values)
            )
    starts += [num_rows] * (num_rows + 1 - len(starts))
    return case, SharedPrefixes(torch.tensor(starts, dtype=torch.int32), shared_len)


GROUPS = [(64, [65, 70, 100]), (0, [9]), (33, [0, 40, 34]), (5, [0]), (16, [17, 80])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 20])
def test_shared_prefixes_change_nothing(backend: str, window: int | None) -> None:
    case, shared = make_groups(GROUPS, heads=4, kv_heads=2, head_dim=16)
    plain = case.run(backend, window=window)
    assert torch.equal(case.run(backend, window=window, shared=shared), plain)
    exact, baseline = (pytorch_attention(case, dtype, window) for dtype in (torch.float64, torch.float32))
    assert_close(plain, exact, baseline)


def test_shared_prefixes_through_the_compiled_op() -> None:
    case, shared = make_groups(GROUPS, heads=4, kv_heads=2, head_dim=16)
    arguments = (*case.inputs(), 0.25, 0, "cpu", *shared)
    torch.library.opcheck(torch.ops.elastic_decode.paged_attention.default, arguments)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(group_start: torch.Tensor, shared_len: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return paged_attention(*tensors, shared=SharedPrefixes(group_start, shared_len))

    assert torch.equal(compiled(*shared, *case.inputs()), case.run())


WRONG_GROUPS = [
    ("group_start", lambda x: x[:-1], ValueError, "group_start"),
    ("group_start", lambda x: x.long(), TypeError, "group_start"),
    ("group_start", lambda x: x + 1, ValueError, "rise from 0"),
    ("group_start", lambda x: x.flip(0), ValueError, "rise from 0"),
    ("group_start", lambda x: x.clamp(max=9), ValueError, "rise from 0"),
    ("group_start", lambda x: x // 4 * 4 + x % 2 * (x > 9), ValueError, "same pages|shared_len|rise"),
    ("shared_len", lambda x: x[:2], ValueError, "shared_len"),
    ("shared_len", lambda x: x.float(), TypeError, "shared_len"),
    ("shared_len", lambda x: x + 1, ValueError, "less than the seq_lens"),
    ("shared_len", lambda x: -x, ValueError, "at least 0"),
]


@pytest.mark.parametrize(("name", "change", "error", "match"), WRONG_GROUPS)
def test_wrong_groups_raise(name: str, change, error: type[Exception], match: str) -> None:
    case, shared = make_groups(GROUPS, heads=4, kv_heads=2, head_dim=16)
    wrong = shared._replace(**{name: change(getattr(shared, name))})
    with pytest.raises(error, match=match):
        case.run(shared=wrong)


def test_groups_are_for_decode_in_the_same_pages() -> None:
    case, shared = make_groups([(16, [30, 17])], heads=2, kv_heads=1, head_dim=16)
    case.page_table[1, 0] = case.page_table[1, 1]
    with pytest.raises(ValueError, match="same pages"):
        case.run(shared=shared)
    prefill = make_case([(30, 2), (17, 1)], heads=2, kv_heads=1, head_dim=16)
    with pytest.raises(ValueError, match="one query a row"):
        prefill.run(shared=shared)
    two_and_none = make_case([(30, 2), (17, 0)], heads=2, kv_heads=1, head_dim=16)
    with pytest.raises(ValueError, match="one query a row"):
        two_and_none.run(shared=shared)


def test_wrong_options_raise() -> None:
    case = make_case([(5, 1)], heads=4, kv_heads=2, head_dim=32)
    for window in (0, -3):
        with pytest.raises(ValueError, match="window"):
            paged_attention(*case.inputs(), window=window)
    with pytest.raises(TypeError, match="out"):
        paged_attention(*case.inputs(), out=case.q.bfloat16())
    with pytest.raises(ValueError, match="backend"):
        paged_attention(*case.inputs(), backend="nonsense")


# ---- Triton, under its interpreter ----


@pytest.mark.interpret
@pytest.mark.parametrize("dtypes", ["f32", "f16", "bf16", "f32-f16", "bf16-f32"])
def test_triton_dtypes(dtypes: str) -> None:
    dtype, _, kv_dtype = dtypes.partition("-")
    rows = [(1, 1), (17, 5), (0, 1), (33, 1), (0, 0), (300, 3)]
    case = make_case(
        rows, heads=4, kv_heads=2, head_dim=16, dtype=DTYPES[dtype], kv_dtype=DTYPES[kv_dtype or dtype]
    )
    exact, baseline = pytorch_attention(case, torch.float64), pytorch_attention(case, DTYPES[dtype])
    assert_close(case.run("triton"), exact, baseline)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size", "window"),
    [(3, 3, 24, 3, None), (7, 1, 40, 16, 5), (2, 1, 80, 1, 70), (40, 1, 8, 64, None), (4, 2, 130, 16, 256)],
)
def test_triton_shapes(heads: int, kv_heads: int, head_dim: int, page_size: int, window: int | None) -> None:
    rows = [(40, 7), (259, 1), (64, 2)]
    case = make_case(
        rows, heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, idle_tokens=2
    )
    exact, baseline = (pytorch_attention(case, dtype, window) for dtype in (torch.float64, torch.float32))
    out = case.run("triton", window=window)
    assert_close(out, exact, baseline)
    assert not out[-2:].any()


@pytest.mark.interpret
@pytest.mark.parametrize("window", [None, 300])
def test_triton_bits_do_not_depend_on_how_splits_are_walked(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """One program for all splits, one each, several each; the interpreter multiplies with NumPy,
    whose bits depend on a tile's other rows, so the chunks are alike."""
    from elastic_decode.kernels.paged_attention import triton as backend

    case = make_case([(600, 9)], heads=4, kv_heads=2, head_dim=16, dtype=torch.float16)
    results = []
    for programs, page_size in [(1, 16), (3, 1), (2, 64)]:
        monkeypatch.setattr(backend, "programs_for_splits", lambda *_, n=programs: n)
        results.append(in_chunks(case, [4, 5], page_size, window, "triton"))
    assert results[0].isfinite().all()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.interpret
def test_triton_refuses_what_it_has_no_tiling_for() -> None:
    case = make_case([(4, 1)], heads=1, kv_heads=1, head_dim=300)
    with pytest.raises(ValueError, match="head_dim up to 256"):
        case.run("triton")
