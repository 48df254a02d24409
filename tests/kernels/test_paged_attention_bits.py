"""Paged attention: a token's bits depend on its query, its keys and values and its position alone."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from elastic_decode.kernels.paged_attention.testing import Case, make_case, make_groups, pack
from elastic_decode.kernels.testing import device_of, runnable

BACKENDS = [b for b in runnable("paged_attention") if b in ("cpu", "triton")]
TRITON = [b for b in BACKENDS if b == "triton"]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f8": torch.float8_e4m3fn}


@pytest.fixture(autouse=True)
def rows_multiply_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy multiplies for the interpreter, and a product's bits there depend on how many rows it has. On
    tensor cores, whose unit is 16 rows, they do not; so here row by row."""
    multiply: Callable[..., Any] = np.matmul

    def row_by_row(a: Any, b: Any, **options: Any) -> Any:
        return np.concatenate([multiply(a[i : i + 1], b, **options) for i in range(len(a))])

    if INTERPRETING:
        monkeypatch.setattr(np, "matmul", row_by_row)


def one_by_one(case: Case, backend: str, window: int | None) -> torch.Tensor:
    """Row 0 of `case`, a call a token."""
    seq_len, count = int(case.seq_lens[0]), int(case.query_start[1])
    out = []
    for i in range(count):
        lens = torch.tensor([seq_len - count + i + 1], dtype=torch.int32)
        start = torch.tensor([0, 1], dtype=torch.int32)
        caches = case.k_cache, case.v_cache, case.page_table[:1].contiguous()
        out.append(Case(case.q[i : i + 1], *caches, lens, start, [], []).run(backend, window=window))
    return torch.cat(out)


def in_chunks(
    case: Case, chunks: Sequence[int], page_size: int, window: int | None, backend: str
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
        call = Case(q, k_cache, v_cache, tables, lens, start, [], [])
        out.append(call.run(backend, window=window)[3 : 3 + chunk])
        done += chunk
    assert done == count
    return torch.cat(out)


# The C++ kernel has float32 and bfloat16.
CHUNKED = [("triton", "f32"), ("triton", "f16")]
if not INTERPRETING:
    CHUNKED += [(b, d) for b in ("cpu", "triton") for d in ("bf16", "f32-bf16")]
    CHUNKED += [("cpu", "f32"), ("triton", "bf16-f8")]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(7, 1, 24)] if INTERPRETING else [(4, 2, 32), (7, 1, 24), (2, 2, 40)]
)
@pytest.mark.parametrize("window", [None, 45])
@pytest.mark.parametrize(("backend", "dtypes"), [pair for pair in CHUNKED if pair[0] in BACKENDS])
def test_chunks_and_pages(
    backend: str, dtypes: str, heads: int, kv_heads: int, head_dim: int, window: int | None
) -> None:
    dtype, _, kv_dtype = dtypes.partition("-")
    seq_len, count = (136, 10) if INTERPRETING else (530, 300)
    case = make_case(
        [(seq_len, count)],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=DTYPES[dtype],
        kv_dtype=DTYPES[kv_dtype or dtype],
    )
    expected = one_by_one(case, backend, window)
    assert expected.isfinite().all()
    plans = [(1, [300]), (3, [1, 7, 33, 63, 65, 131]), (16, [299, 1]), (64, [17] * 17 + [11])]
    for page_size, chunks in [(3, [10]), (16, [1, 3, 6])] if INTERPRETING else plans:
        got = in_chunks(case, chunks, page_size, window, backend)
        assert torch.equal(got, expected), (page_size, chunks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [[(3000, 1)], [(1500, 1), (2000, 1), (700, 1)], [(900, 300)]])
def test_threads(dtype: torch.dtype, rows: list[tuple[int, int]]) -> None:
    """One row (its splits spread over threads), several, and prefill."""
    case = make_case(rows, heads=8, kv_heads=2, head_dim=64, dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.run("cpu"))
    finally:
        torch.set_num_threads(before)
    assert results[0].isfinite().all()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_scores(backend: str) -> None:
    """Weights underflow to 0 in some splits; the maxima of splits differ by more than exp can hold."""
    count = 3 if INTERPRETING else 30
    case = make_case([(530, count)], heads=2, kv_heads=1, head_dim=32)
    case.q.mul_(60)
    out = case.run(backend)
    assert out.isfinite().all()
    assert torch.equal(one_by_one(case, backend, None), out)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of infinities
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("backend", TRITON)
def test_values_that_are_no_numbers(backend: str, window: int | None) -> None:
    """In a chunk they reach the tokens, and there the elements, that they reach one token at a time."""
    case = make_case([(140, 12)], heads=4, kv_heads=1, head_dim=16)
    for position, element, value in [(3, 0, torch.inf), (131, 1, torch.nan), (134, 2, -torch.inf)]:
        case.v_cache[case.page_table[0, position // 16], position % 16, 0, element] = value
    out = case.run(backend, window=window)
    assert torch.equal(out.isfinite()[:, 0, :3].sum(0) > 0, torch.tensor([window is not None, True, True]))
    assert out[:, :, 3:].isfinite().all()
    one = one_by_one(case, backend, window)
    assert torch.equal(out.nan_to_num(nan=1e9), one.nan_to_num(nan=1e9))


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("backend", TRITON)
def test_how_splits_are_walked(backend: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for all splits, one each, several each."""
    from elastic_decode.kernels.paged_attention import triton

    case = make_case([(600, 5)], heads=4, kv_heads=1, head_dim=16, dtype=torch.float16)
    results = []
    for programs, page_size in [(1, 16), (3, 1), (2, 64), (5, 7)]:
        monkeypatch.setattr(triton, "programs_for_splits", lambda *_, n=programs: n)
        results.append(in_chunks(case, [2, 3], page_size, window, backend))
    assert results[0].isfinite().all()
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_without_keys_are_zero(backend: str, dtype: torch.dtype) -> None:
    """Idle rows, tokens past the last row, and more queries than the row has tokens."""
    rows = [(0, 3), (2, 5), (9, 1)]
    case = make_case(rows, heads=2, kv_heads=1, head_dim=32, dtype=dtype, idle_tokens=4)
    out = case.run(backend)
    empty = [0, 1, 2, 3, 4, 5, 9, 10, 11, 12]
    assert torch.equal(out[empty], torch.zeros_like(out[empty]))
    rest = make_case([(2, 2), (9, 1)], heads=2, kv_heads=1, head_dim=32, dtype=dtype)
    rest.q, rest.k_cache, rest.v_cache = case.q[6:9].contiguous(), case.k_cache, case.v_cache
    rest.page_table = case.page_table[1:].contiguous()
    assert torch.equal(out[6:9], rest.run(backend))


# ---- prefixes that rows share ----

# (length of the prefix, seq_lens of the rows): lone rows, idle ones among others and for a whole group;
# prefixes of no, one and two splits, ending in a split and between two.
GROUPS: list[tuple[int, list[int]]] = [
    (256, [257, 300]),
    (0, [9]),
    (140, [0, 150, 271]),
    (130, [140]),
    (5, [0]),
    (100, [120, 130]),
    (128, [0, 140, 129]),
]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "page_size"),
    [(2, 2, 16), (4, 1, 1), (12, 2, 17), (7, 1, 16), (8, 1, 17), (16, 1, 1), (40, 1, 16)],
)
@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETING else [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_prefixes(backend: str, dtype: torch.dtype, page_size: int, heads: int, kv_heads: int) -> None:
    case, shared = make_groups(
        GROUPS, heads=heads, kv_heads=kv_heads, head_dim=16, page_size=page_size, dtype=dtype
    )
    plain = case.run(backend)
    assert plain.isfinite().all()
    assert torch.equal(case.run(backend, shared=shared), plain)


@pytest.mark.parametrize(
    ("rows", "dtypes"), [(1, "f32"), (2, "f16"), (3, "bf16-f8"), (8, "f16"), (16, "f16"), (17, "f16")]
)
@pytest.mark.parametrize("backend", TRITON)
def test_shared_prefixes_of_many_rows(backend: str, rows: int, dtypes: str) -> None:
    dtype, _, kv_dtype = dtypes.partition("-")
    case, shared = make_groups(
        [(0, [5]), (144, [146 + 3 * i for i in range(rows)]), (16, [20, 30])],
        heads=6,
        kv_heads=1,
        head_dim=16,
        dtype=DTYPES[dtype],
        kv_dtype=DTYPES[kv_dtype or dtype],
    )
    plain = case.run(backend)
    assert torch.equal(case.run(backend, shared=shared), plain)
    shared.shared_len[1] -= 13  # less than what they do share; fewer splits than pages
    assert torch.equal(case.run(backend, shared=shared), plain)


@pytest.mark.parametrize("window", [1, 130, 1000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_prefixes_under_a_window(backend: str, window: int) -> None:
    case, shared = make_groups(GROUPS[:3], heads=4, kv_heads=1, head_dim=16)
    assert torch.equal(case.run(backend, window=window, shared=shared), case.run(backend, window=window))


@pytest.mark.parametrize("backend", TRITON)
def test_shared_prefixes_however_the_rest_is_walked(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one program, also where the workspace holds only some of the shared splits or none; by several."""
    from elastic_decode.kernels.paged_attention import triton, triton_tilings

    case, shared = make_groups(GROUPS[:3], heads=4, kv_heads=1, head_dim=16, dtype=torch.float16)
    plain = case.run(backend)
    for programs in (1, 2, 5):
        monkeypatch.setattr(triton, "programs_for_splits", lambda *_, n=programs: n)
        assert torch.equal(case.run(backend, shared=shared), plain), programs
    monkeypatch.setattr(triton, "programs_for_splits", triton_tilings.programs_for_splits)
    for splits in (2, 1, 0):
        split_bytes = len(case.q) * 4 * (16 + 2) * 4
        monkeypatch.setattr(triton_tilings, "WORKSPACE_BYTES", split_bytes * splits + 1)
        assert torch.equal(case.run(backend, shared=shared), plain), splits


@pytest.mark.parametrize("backend", TRITON)
def test_shared_prefixes_are_read_once(backend: str) -> None:
    """Whole splits of a prefix are not read through the pages of the group's other rows, which may be any
    there. (The public op refuses that on the CPU.)"""
    from elastic_decode.kernels.paged_attention import triton

    case, shared = make_groups([(300, [310, 330, 350])], heads=4, kv_heads=1, head_dim=16)
    plain = case.run(backend)
    case.page_table[1:, :16] = 0
    tensors = case.to(device_of(backend))
    groups = type(shared)(*(x.to(device_of(backend)) for x in shared))
    assert torch.equal(triton.paged_attention(*tensors.inputs(), shared=groups).cpu(), plain)
    assert not torch.equal(triton.paged_attention(*tensors.inputs()).cpu(), plain)
