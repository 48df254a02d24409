"""Paged attention: every backend against PyTorch, and what the public op refuses."""

import os
from collections.abc import Iterator

import pytest
import torch

from elastic_decode.kernels import _C
from elastic_decode.kernels.paged_attention import SharedPrefixes, paged_attention, reference
from elastic_decode.kernels.paged_attention.testing import (
    KEY_SCALE,
    Case,
    make_case,
    make_groups,
    pytorch_attention,
)
from elastic_decode.kernels.paged_attention.traffic import kv_bytes, shared_kv_bytes
from elastic_decode.kernels.testing import assert_close, device_of, runnable

BACKENDS = [b for b in runnable("paged_attention") if b in ("reference", "cpu", "triton")]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # slowly: with fewer cases, then
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f8": torch.float8_e4m3fn}
CPU_DTYPES = (torch.float32, torch.bfloat16)


def check(case: Case, backend: str, window: int | None = None) -> None:
    """The backend is as close as PyTorch is; the C++ kernel on every instruction set of this processor."""
    if backend == "cpu" and not {case.q.dtype, case.k_cache.dtype} <= set(CPU_DTYPES):
        with pytest.raises(TypeError, match="has dtype"):
            case.run(backend, window=window)
        return
    exact = pytorch_attention(case, torch.float64, window)
    baseline = pytorch_attention(case, case.q.dtype, window)
    # On a GPU exp2 is approximate, and float32 scores are rounded in another order than the CPU's.
    floor = score_floor(case) if device_of(backend).type == "cuda" else None
    for isa in each_isa() if backend == "cpu" else [backend]:
        assert_close(case.run(backend, window=window), exact, baseline, floor=floor, what=isa)


def score_floor(case: Case) -> float | None:
    """For float32: a score's rounding, of one unit in its last place, moves a weight by as much relatively;
    the largest score is at most the product of the norms."""
    if case.q.dtype != torch.float32:
        return None
    k, v = (cache.float().nan_to_num() for cache in (case.k_cache, case.v_cache))
    most = case.q.norm(dim=-1).max() * k.norm(dim=-1).max() * case.q.shape[-1] ** -0.5
    return float(torch.finfo(torch.float32).eps * most * v.abs().max())


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
if INTERPRETING:
    MIXED = [(1, 1), (17, 5), (0, 1), (33, 1), (0, 0), (5, 0), (140, 3)]


def test_reference_is_pytorch_attention() -> None:
    case = make_case(MIXED, heads=6, kv_heads=2, head_dim=24, dtype=torch.float64)
    for window in (None, 7):
        exact = pytorch_attention(case, torch.float64, window)
        torch.testing.assert_close(reference.paged_attention(*case.inputs(), window=window), exact)


@pytest.mark.parametrize("head_dim", [80] if INTERPRETING else [24, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    "dtypes", ["f32", "bf16", "f16", "f32-bf16", "bf16-f32", "f32-f16", "bf16-f8", "f16-f8", "f32-f8"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_dims_and_dtypes(backend: str, dtypes: str, head_dim: int) -> None:
    dtype, _, kv_dtype = dtypes.partition("-")
    case = make_case(
        MIXED,
        heads=4,
        kv_heads=2,
        head_dim=head_dim,
        dtype=DTYPES[dtype],
        kv_dtype=DTYPES[kv_dtype or dtype],
    )
    check(case, backend)


@pytest.mark.parametrize("head_dim", [1, 20] if INTERPRETING else [1, 7, 17, 20, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_head_dims(backend: str, head_dim: int, dtype: torch.dtype) -> None:
    check(make_case(MIXED, heads=3, kv_heads=3, head_dim=head_dim, dtype=dtype), backend)


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (5, 5), (6, 2), (14, 2), (8, 1), (9, 1), (16, 1), (71, 1)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_ratios(backend: str, heads: int, kv_heads: int) -> None:
    rows = MIXED[:4] if INTERPRETING else MIXED
    check(make_case(rows, heads=heads, kv_heads=kv_heads, head_dim=16, dtype=torch.bfloat16), backend)


@pytest.mark.parametrize("page_size", [1, 3, 16, 17, 100])
@pytest.mark.parametrize("backend", BACKENDS)
def test_page_sizes(backend: str, page_size: int) -> None:
    check(make_case(MIXED, heads=4, kv_heads=2, head_dim=16, page_size=page_size), backend)


WINDOWS = [1, 2, 15, 16, 31, 64, 255, 256, 257, 1000]


@pytest.mark.parametrize("window", [1, 70, 257] if INTERPRETING else WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_windows(backend: str, window: int, dtype: torch.dtype) -> None:
    rows = [(400, 1), (290, 5)] if INTERPRETING else [*MIXED, (700, 1), (1030, 40)]
    check(make_case(rows, heads=4, kv_heads=2, head_dim=32, dtype=dtype), backend, window)


@pytest.mark.parametrize("backend", BACKENDS)
def test_page_table_may_be_part_of_a_wider_one(backend: str) -> None:
    case = make_case(MIXED, heads=2, kv_heads=1, head_dim=32)
    expected = case.run(backend)
    wide = torch.full((len(MIXED), case.page_table.shape[1] + 7), -9, dtype=torch.int32)
    wide[:, : case.page_table.shape[1]] = case.page_table
    case.page_table = wide[:, : case.page_table.shape[1] - 2]
    assert torch.equal(case.run(backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_given(backend: str) -> None:
    """Twice the scale is twice the query: a power of two leaves no rounding."""
    case = make_case([(40, 3)], heads=2, kv_heads=1, head_dim=64).to(device_of(backend))
    small, large = (paged_attention(*case.inputs(), scale=s, backend=backend) for s in (0.125, 0.25))
    assert torch.equal(small, case.run(backend).to(small.device))
    case.q.mul_(2)
    assert torch.equal(large, case.run(backend).to(large.device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_no_tokens(backend: str) -> None:
    case = make_case([(4, 0)], heads=2, kv_heads=1, head_dim=8)
    assert case.run(backend).shape == (0, 2, 8)
    case.page_table, case.seq_lens = torch.zeros(0, 3, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    case.query_start = torch.zeros(1, dtype=torch.int32)
    assert case.run(backend).shape == (0, 2, 8)
    case.q = torch.full((3, 2, 8), torch.nan)
    assert torch.equal(case.run(backend), torch.zeros(3, 2, 8))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("dtype", CPU_DTYPES[:1] if INTERPRETING else CPU_DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of an infinity
def test_future_tokens_cannot_reach_the_past(
    backend: str, dtype: torch.dtype, window: int | None, bad: float
) -> None:
    """Not even as 0 * NaN: a chunk is computed together, yet a NaN or an infinity in a token stays there."""
    sizes = [(75, 21)] if INTERPRETING else [(37, 37), (290, 60)]
    for seq_len, count in sizes:
        case = make_case([(seq_len, count)], heads=4, kv_heads=2, head_dim=32, dtype=dtype)
        for isa in each_isa() if backend == "cpu" else [backend]:
            clean = case.run(backend, window=window)
            for poisoned in (seq_len - count + 1, seq_len - 20, seq_len - 1):
                page, offset = case.page_table[0, poisoned // 16], poisoned % 16
                saved = case.v_cache[page, offset].clone(), case.k_cache[page, offset].clone()
                case.v_cache[page, offset], case.k_cache[page, offset] = bad, torch.nan
                dirty = case.run(backend, window=window)
                case.v_cache[page, offset], case.k_cache[page, offset] = saved
                before = poisoned - (seq_len - count)
                after = before + window if window else count
                assert torch.equal(dirty[:before], clean[:before]), (isa, poisoned)
                assert dirty[before:after].isnan().all(), (isa, poisoned)
                assert torch.equal(dirty[after:], clean[after:]), (isa, poisoned)


# ---- float8 keys and values ----


def test_what_float8_loses() -> None:
    """The figures of docs/kernels.md: keys and values N(0, 1), 64 to 1024 tokens, head_dim 128."""
    case = make_case([(n, 1) for n in (64, 256, 512, 1024)], heads=8, kv_heads=2, head_dim=128)
    caches = case.k_cache.div(KEY_SCALE), case.v_cache
    outs = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        case.k_cache, case.v_cache = (cache.to(dtype) for cache in caches)
        outs[dtype] = case.run("reference")
    exact = outs[torch.float32]
    errors = {dtype: ((out - exact).norm() / exact.norm()).item() for dtype, out in outs.items()}
    assert 0.030 < errors[torch.float8_e4m3fn] < 0.045
    assert 0.0015 < errors[torch.bfloat16] < 0.0030


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "triton"])
def test_every_float8_is_read(backend: str, as_bytes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One key a row, whose value is the output: every code but the two NaN, converted by the GPU and by the
    kernel."""
    from elastic_decode.kernels.paged_attention import triton

    if as_bytes or device_of(backend).type == "cpu":
        monkeypatch.setattr(triton, "takes_fp8_bits", lambda *_: as_bytes)
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    case = make_case([(1, 1)] * 16, heads=1, kv_heads=1, head_dim=16, kv_dtype=torch.float8_e4m3fn)
    values = torch.zeros_like(case.v_cache, dtype=torch.uint8)
    values[case.page_table[:, 0].long(), 0, 0] = codes.view(16, 16)
    case.v_cache = values.view(torch.float8_e4m3fn)
    assert torch.equal(case.run(backend)[:, 0], codes.view(torch.float8_e4m3fn).float().view(16, 16))


# ---- the public op ----


def test_reads_the_cache_through_the_compiled_op() -> None:
    case = make_case([(5, 1), (33, 4)], heads=4, kv_heads=2, head_dim=32)
    arguments = (*case.inputs(), 32**-0.5, 0, "cpu", None, None)
    torch.library.opcheck(torch.ops.elastic_decode.paged_attention.default, arguments)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*tensors: torch.Tensor) -> torch.Tensor:
        return paged_attention(*tensors) + 1

    assert torch.equal(compiled(*case.inputs()), case.run("cpu") + 1)


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


def test_wrong_options_raise() -> None:
    case = make_case([(5, 1)], heads=4, kv_heads=2, head_dim=32)
    for window in (0, -3):
        with pytest.raises(ValueError, match="window"):
            paged_attention(*case.inputs(), window=window)
    with pytest.raises(TypeError, match="out"):
        paged_attention(*case.inputs(), out=case.q.bfloat16())
    with pytest.raises(ValueError, match="backend"):
        paged_attention(*case.inputs(), backend="nonsense")


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "triton"])
def test_triton_refuses_what_it_has_no_tiling_for(backend: str) -> None:
    case = make_case([(4, 1)], heads=1, kv_heads=1, head_dim=300)
    with pytest.raises(ValueError, match="head_dim up to 256"):
        case.run(backend)


# ---- what the public op checks of groups ----

GROUPS = [(64, [65, 70, 100]), (0, [9]), (33, [0, 40, 34]), (5, [0]), (16, [17, 80])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 20])
def test_rows_of_groups(backend: str, window: int | None) -> None:
    """The result is the plain call's: tests/kernels/test_paged_attention_bits.py has the rest."""
    case, shared = make_groups(GROUPS, heads=4, kv_heads=2, head_dim=16)
    exact, baseline = (pytorch_attention(case, dtype, window) for dtype in (torch.float64, torch.float32))
    floor = score_floor(case) if device_of(backend).type == "cuda" else None
    assert_close(case.run(backend, window=window, shared=shared), exact, baseline, floor=floor)


def test_shared_prefixes_through_the_compiled_op() -> None:
    case, shared = make_groups(GROUPS, heads=4, kv_heads=2, head_dim=16)
    arguments = (*case.inputs(), 0.25, 0, "cpu", *shared)
    torch.library.opcheck(torch.ops.elastic_decode.paged_attention.default, arguments)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(group_start: torch.Tensor, shared_len: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return paged_attention(*tensors, shared=SharedPrefixes(group_start, shared_len))

    assert torch.equal(compiled(*shared, *case.inputs()), case.run("cpu"))


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
        case.run("cpu", shared=wrong)


def test_groups_are_for_decode_in_the_same_pages() -> None:
    case, shared = make_groups([(16, [30, 17])], heads=2, kv_heads=1, head_dim=16)
    case.page_table[1, 0] = case.page_table[1, 1]
    with pytest.raises(ValueError, match="same pages"):
        case.run("cpu", shared=shared)
    prefill = make_case([(30, 2), (17, 1)], heads=2, kv_heads=1, head_dim=16)
    with pytest.raises(ValueError, match="one query a row"):
        prefill.run("cpu", shared=shared)
    two_and_none = make_case([(30, 2), (17, 0)], heads=2, kv_heads=1, head_dim=16)
    with pytest.raises(ValueError, match="one query a row"):
        two_and_none.run("cpu", shared=shared)


# ---- bytes read ----


def test_bytes_of_keys_and_values() -> None:
    assert kv_bytes([3, 0, 5], 2, 64, 2) == 2 * 8 * 2 * 64 * 2
    groups = [(300, [400, 0, 310, 500]), (64, [70]), (0, [9, 9])]
    alone = kv_bytes([n for _, lens in groups for n in lens], 2, 128, 2)
    token = kv_bytes([1], 2, 128, 2)
    assert shared_kv_bytes(groups, 2, 128, 2) == alone - 2 * 300 * token
    assert shared_kv_bytes(groups, 2, 128, 2, split=128) == alone - 2 * 256 * token


@pytest.mark.parametrize(("rows", "alone", "shared"), [(8, 352, 147), (16, 705, 264)])
def test_bytes_of_the_documents_table(rows: int, alone: int, shared: int) -> None:
    lens = [1024 + 512] * rows
    assert round(28 * kv_bytes(lens, 2, 128, 2) / 1e6) == alone
    assert round(28 * shared_kv_bytes([(1024, lens)], 2, 128, 2, split=128) / 1e6) == shared
