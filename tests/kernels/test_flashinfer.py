"""FlashInfer's backends against a stand-in for the package, which has its signatures and computes by our
reference; and the line that says why the package cannot be used.
"""

import importlib.metadata
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from elastic_decode.kernels import flashinfer_support, registry, selfcheck
from elastic_decode.kernels.paged_attention import flashinfer, reference
from elastic_decode.kernels.paged_attention.selfcheck import make_rows, pytorch
from elastic_decode.kernels.sample import flashinfer as sampling
from elastic_decode.kernels.sample import make_table
from elastic_decode.kernels.selfcheck import Matrix, Random, Shapes
from elastic_decode.kernels.testing import assert_close

CPU = torch.device("cpu")
SHAPES = Shapes(
    hidden_size=256, intermediate_size=64, num_heads=4, num_kv_heads=2, head_dim=64, vocab_size=97,
    page_size=16, matrices=(Matrix(8, 8),), dtype=torch.bfloat16, kv_dtype=torch.bfloat16,
    windows=(None, 4096),
)  # fmt: skip


def check(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
    assert tensor.is_contiguous()


# ---- the stand-in: parameters by name and default as in flashinfer-python 0.6.4 (0.7.2 adds some after) ----


def trtllm_batch_decode_with_kv_cache(
    query, kv_cache, workspace_buffer, block_tables, seq_lens, max_seq_len, bmm1_scale=1.0, bmm2_scale=1.0,
    window_left=-1, out=None, out_dtype=None, o_sf_scale=None, o_sf_vec_size=None, sinks=None,
    kv_layout="HND", enable_pdl=None, backend="auto", q_len_per_req=1, o_scale=1.0, mask=None, max_q_len=None,
    cum_seq_lens_q=None, skip_softmax_threshold_scale_factor=None,
):  # fmt: skip
    tokens, heads, dim = query.shape
    k_cache, v_cache = kv_cache
    pages, size, kv_heads, _ = k_cache.shape
    assert kv_layout == "NHD", "[pages, page_size, kv heads, head_dim]"
    assert isinstance(kv_cache, tuple)
    assert size in (16, 32, 64, 128)
    assert (dim % 16, heads % kv_heads) == (0, 0)
    assert query.dtype in (torch.float16, torch.bfloat16)
    for cache in kv_cache:
        check(cache, (pages, size, kv_heads, dim), query.dtype)
    check(query, (tokens, heads, dim), query.dtype)
    check(out, (tokens, heads, dim), query.dtype)
    check(block_tables, (tokens, block_tables.shape[1]), torch.int32)
    check(seq_lens, (tokens,), torch.int32)  # read as uint32
    assert int(seq_lens.min()) >= 1, "XQA subtracts the query's length from it, unsigned"
    assert max_seq_len >= int(seq_lens.max())
    assert 0 <= int(block_tables.min()) <= int(block_tables.max()) < pages, "what is prefetched must be there"
    assert isinstance(bmm1_scale, float)
    assert bmm2_scale == 1.0
    # The workspace: 8 MB of semaphores, which must be zero when it is first used, then scratch.
    assert (workspace_buffer.dtype, workspace_buffer.numel() > 8 << 20) == (torch.uint8, True)
    assert not workspace_buffer[: 8 << 20].any()
    begin = torch.arange(tokens + 1, dtype=torch.int32)
    window = None if window_left == -1 else window_left + 1
    return reference.paged_attention(
        query, k_cache, v_cache, block_tables, seq_lens, begin, scale=bmm1_scale, window=window, out=out
    )


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None,
        paged_kv_indptr_buf=None, paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None,
        custom_mask_buf=None, mask_indptr_buf=None, backend="auto", jit_args=None, jit_kwargs=None,
    ):  # fmt: skip
        assert (kv_layout, use_cuda_graph) == ("NHD", False)
        assert float_workspace_buffer.numel() >= 128 << 20, "the recommended size"
        self.device = float_workspace_buffer.device
        self.planned = None

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads,
        num_kv_heads, head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None,
        causal=False,
        pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None, window_left=-1,
        logits_soft_cap=None, rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None,
        o_data_type=None, non_blocking=True, prefix_len_ptr=None, token_pos_in_items_ptr=None,
        token_pos_in_items_len=0, max_item_len_ptr=None, seq_lens=None, seq_lens_q=None, block_tables=None,
        max_token_per_sequence=None, max_sequence_kv=None, fixed_split_size=None, disable_split_kv=False,
    ):  # fmt: skip
        rows = len(qo_indptr) - 1
        check(qo_indptr, (rows + 1,), torch.int32)
        check(paged_kv_indptr, (rows + 1,), torch.int32)
        check(paged_kv_last_page_len, (rows,), torch.int32)
        check(paged_kv_indices, (int(paged_kv_indptr[-1]),), torch.int32)
        assert causal
        assert qo_indptr.device == paged_kv_indptr.device == CPU, "else every plan copies them back"
        assert paged_kv_indices.device == self.device
        assert bool(((paged_kv_last_page_len >= 1) & (paged_kv_last_page_len <= page_size)).all())
        counts = paged_kv_indptr.diff()
        assert bool((counts > 0).all())
        lens = (counts - 1) * page_size + paged_kv_last_page_len
        assert bool((qo_indptr.diff() <= lens).all())
        table = torch.full((rows, int(counts.max())), -1, dtype=torch.int32)
        for row in range(rows):
            own = paged_kv_indices[paged_kv_indptr[row] : paged_kv_indptr[row + 1]]
            table[row, : len(own)] = own
        self.planned = table, lens.to(torch.int32), qo_indptr
        self.sizes = num_qo_heads, num_kv_heads, head_dim_qk, page_size, q_data_type, kv_data_type
        self.options = {"scale": sm_scale, "window": None if window_left == -1 else window_left + 1}

    def run(
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None,
        return_lse=False, enable_pdl=None, window_left=None, sinks=None,
        skip_softmax_threshold_scale_factor=None,
    ):  # fmt: skip
        k_cache, v_cache = paged_kv_cache
        pages, size, kv_heads, dim = k_cache.shape
        assert self.sizes == (q.shape[1], kv_heads, dim, size, q.dtype, k_cache.dtype)
        check(q, (int(self.planned[2][-1]), self.sizes[0], dim), q.dtype)
        check(v_cache, (pages, size, kv_heads, dim), k_cache.dtype)
        out = torch.empty_like(q) if out is None else out
        return reference.paged_attention(q, k_cache, v_cache, *self.planned, **self.options, out=out)


def top_k_top_p_sampling_from_logits(
    logits, top_k, top_p, indices=None, filter_apply_order="top_k_first", deterministic=True, generator=None,
    check_nan=False, seed=None, offset=None,
):  # fmt: skip
    rows = len(logits)
    check(logits, (rows, logits.shape[1]), torch.float32)
    check(top_k, (rows,), torch.int32)
    check(top_p, (rows,), torch.float32)
    check(seed, (rows,), torch.int64)
    check(offset, (rows,), torch.int64)
    assert filter_apply_order == "top_k_first"
    assert bool(((top_k >= 1) & (top_k <= logits.shape[1])).all())
    assert bool(((top_p > 0) & (top_p <= 1)).all())
    tokens = []
    for row in range(rows):
        keep = reference_kept(logits[row], int(top_k[row]), float(top_p[row]))
        generator = torch.Generator().manual_seed(int(seed[row]) * 1000 + int(offset[row]))
        tokens.append(
            torch.multinomial(logits[row].masked_fill(~keep, -torch.inf).softmax(0), 1, generator=generator)
        )
    return torch.cat(tokens).int()


def reference_kept(row: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    from elastic_decode.kernels.sample.reference import kept

    return kept(row.double(), top_k, top_p, 0.0)


@pytest.fixture
def package(monkeypatch):
    """The stand-in, importable as `flashinfer`."""
    parts = {
        "decode": [trtllm_batch_decode_with_kv_cache],
        "prefill": [BatchPrefillWithPagedKVCacheWrapper],
        "sampling": [top_k_top_p_sampling_from_logits],
    }
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    for name, functions in parts.items():
        module = ModuleType(f"flashinfer.{name}")
        for function in functions:
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, f"flashinfer.{name}", module)
    flashinfer._prefill_wrapper.cache_clear()
    yield
    flashinfer._prefill_wrapper.cache_clear()
    flashinfer._decode_workspace.cache_clear()


# ---- attention ----


def run(rows: Any, **options: Any) -> torch.Tensor:
    out = torch.full_like(rows.q, torch.nan)
    assert flashinfer.paged_attention(*rows.tensors(), out=out, **options) is out
    return out


DECODE = [(1, 1), (15, 1), (16, 1), (0, 1), (17, 1), (300, 1)]
PREFILL = [(17, 17), (1, 1), (69, 19), (48, 40), (16, 1)]


@pytest.mark.parametrize("window", [None, 1, 37])
@pytest.mark.parametrize("lens", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_attention(package, lens, window, dtype):
    shapes = SHAPES._replace(dtype=dtype, kv_dtype=dtype, page_size=32)
    rows = make_rows(shapes, Random(CPU), lens)
    exact = reference.paged_attention(rows.q.double(), *rows.tensors()[1:], window=window)
    assert_close(run(rows, window=window), exact, pytorch(rows, dtype, window))
    again = flashinfer.paged_attention(*rows.tensors(), window=window, scale=0.3)
    assert_close(
        again,
        reference.paged_attention(rows.q.double(), *rows.tensors()[1:], window=window, scale=0.3),
        reference.paged_attention(*rows.tensors(), window=window, scale=0.3),
    )


def test_idle_rows_and_tokens_of_none(package):
    rows = make_rows(SHAPES, Random(CPU), [(0, 3), (33, 5), (20, 0), (64, 2)])
    assert not run(rows)[:3].any()
    exact = reference.paged_attention(rows.q.double(), *rows.tensors()[1:])
    assert_close(run(rows), exact, pytorch_of_used(rows))
    extra = torch.randn(4, *rows.q.shape[1:]).to(rows.q.dtype)
    rows.q = torch.cat((rows.q, extra))
    assert not run(rows)[-4:].any()
    nothing = make_rows(SHAPES, Random(CPU), [(0, 3), (9, 0)])
    assert not run(nothing).any()


def pytorch_of_used(rows: Any) -> torch.Tensor:
    return reference.paged_attention(rows.q, *rows.tensors()[1:])


def test_no_tokens(package):
    rows = make_rows(SHAPES, Random(CPU), [(5, 1)])
    none = flashinfer.paged_attention(
        rows.q[:0], rows.k_cache, rows.v_cache, rows.page_table[:0], rows.seq_lens[:0], rows.query_start[:1]
    )
    assert none.shape == (0, 4, 64)


def test_garbage_in_the_page_table_and_a_slice_of_one(package):
    rows = make_rows(SHAPES, Random(CPU), DECODE)
    want = run(rows)
    table = torch.full((len(rows.page_table), rows.page_table.shape[1] + 3), 2**30, dtype=torch.int32)
    table[1::2] = -1
    used = (rows.seq_lens + 15) // 16
    for row, count in enumerate(used.tolist()):
        table[row, :count] = rows.page_table[row, :count]
    rows.page_table = table[:, : rows.page_table.shape[1] + 1]
    assert torch.equal(run(rows), want)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dtype": torch.float32, "kv_dtype": torch.float32}, TypeError, "float16 or bfloat16"),
        ({"kv_dtype": torch.float8_e4m3fn}, TypeError, "a cache in torch.float8_e4m3fn"),
        ({"head_dim": 96}, ValueError, "head_dim 64, 128, 256, got 96"),
        ({"page_size": 8}, ValueError, "pages of 16, 32, 64, 128, got 8"),
    ],
)
def test_what_it_does_not_take(package, changes, error, message):
    rows = make_rows(SHAPES._replace(**changes), Random(CPU), [(5, 1)])
    with pytest.raises(error, match=message):
        flashinfer.paged_attention(*rows.tensors())


def test_more_queries_than_tokens(package):
    rows = make_rows(SHAPES, Random(CPU), [(5, 7), (9, 1)])
    with pytest.raises(ValueError, match="row 0 has 7 queries, but 5 tokens"):
        flashinfer.paged_attention(*rows.tensors())


def test_the_devices_check_passes_and_needs_no_invariance(package, monkeypatch):
    monkeypatch.setattr(flashinfer, "why_unavailable", lambda: None)
    registry._implementation.cache_clear()
    outcome = selfcheck.check("paged_attention", "flashinfer", SHAPES, CPU, batch_invariant=False)
    assert outcome.ok, outcome.summary()
    assert outcome.findings > 3
    registry._implementation.cache_clear()


# ---- sampling, for comparison ----


def test_sampling(package):
    torch.manual_seed(0)
    table = make_table(5)
    table.temperature.copy_(torch.tensor([0.0, 1.0, 0.5, 1.0, 1.0]))
    table.top_k.copy_(torch.tensor([0, 3, 0, 10**6, 1]))
    table.top_p.copy_(torch.tensor([1.0, 1.0, 0.2, 1.5, 1.0]))
    table.seed.copy_(torch.arange(5))
    slots = torch.tensor([4, 0, -1, 1, 2, 3], dtype=torch.int32)
    positions = torch.arange(6, dtype=torch.int32)
    logits = torch.randn(6, 97)
    drawn = sampling.sample(logits, slots, positions, table)
    best = logits.argmax(1)
    assert drawn.token[0] == best[0]
    assert drawn.token[1] == best[1]
    assert drawn.token[2] == -1
    assert drawn.token[3] in logits[3].topk(3).indices
    scale = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 1.0])
    lse = torch.logsumexp(logits / scale[:, None], 1)
    lse[2] = 0
    torch.testing.assert_close(drawn.lse, lse)
    assert drawn.sampling_logprob.isnan().all()


def test_sampling_has_no_penalties():
    with pytest.raises(ValueError, match="without penalties, bias and bans"):
        sampling.sample(
            torch.randn(1, 9), *(torch.zeros(1, dtype=torch.int32),) * 2, make_table(1, num_bias=1)
        )


def test_sampling_is_chosen_for_no_engine(monkeypatch):
    monkeypatch.setattr(registry, "why_unavailable", lambda op, backend: None)
    assert registry.choose("flashinfer", "cuda")["sample"] == "triton"
    with pytest.raises(ValueError, match="for comparison only"):
        registry.resolve({"sample": "flashinfer"}, "cuda", batch_invariant=False)


# ---- why it cannot be used ----

WHOLE = {
    "packages": {"flashinfer-python": "0.6.4"},
    "capability": (9, 0),
    "tools": {"nvcc": "/usr/bin/env", "ninja": "/usr/bin/env"},
}


def why(monkeypatch, package: ModuleType | None = None, **changes: Any) -> str | None:
    """The reason on a machine that has everything, but for `changes`."""
    machine = WHOLE | changes

    def version(name: str) -> str:
        if name not in machine["packages"]:
            raise importlib.metadata.PackageNotFoundError(name)
        return machine["packages"][name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine["capability"] is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: machine["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    monkeypatch.setattr(shutil, "which", lambda name: machine["tools"].get(name))
    real = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: "nvcc" not in str(path) and real(path))
    for name in ("CUDA_HOME", "CUDA_PATH", "FLASHINFER_NVCC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "flashinfer", package)  # None: its import raises
    flashinfer_support.why_no_flashinfer.cache_clear()
    try:
        return flashinfer_support.why_no_flashinfer(flashinfer.CAPABILITIES)
    finally:
        flashinfer_support.why_no_flashinfer.cache_clear()


@pytest.mark.parametrize("version", ["0.6.4", "0.6.18.post1", "0.7.2", "0.7.0rc1"])
def test_available(monkeypatch, version):
    assert why(monkeypatch, ModuleType("flashinfer"), packages={"flashinfer-python": version}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packages": {}}, "FlashInfer is not installed; pip install 'elastic-decode[flashinfer]'"),
        ({"packages": {"flashinfer-python": "0.6.3"}}, "0.6.3 is installed; this code is for 0.6.4 up to"),
        ({"packages": {"flashinfer-python": "0.8.0"}}, "this code is for 0.6.4 up to, not including, 0.8"),
        (
            {"packages": {"flashinfer-python": "0.6.4", "flashinfer-cubin": "0.6.5"}},
            "cubin 0.6.5 does not match flashinfer-python 0.6.4; install the same",
        ),
        (
            {"packages": {"flashinfer-python": "0.7.2", "flashinfer-jit-cache": "0.7.1+cu130"}},
            "jit-cache 0.7.1+cu130 does not match",
        ),
        ({"capability": None}, "FlashInfer needs a CUDA device"),
        (
            {"capability": (8, 0)},
            "NVIDIA X has compute capability 8.0; what is used of FlashInfer here needs 9.x",
        ),
        (
            {"tools": {"ninja": "/usr/bin/env"}},
            "there is no nvcc; install it, or install flashinfer-jit-cache",
        ),
        ({"tools": {"nvcc": "/usr/bin/env"}}, "ninja, which is not on the PATH"),
        ({}, "FlashInfer cannot be imported: import of flashinfer halted"),
    ],
)
def test_every_reason_is_a_line(monkeypatch, changes, message):
    reason = why(monkeypatch, **changes)
    assert reason is not None
    assert message in reason
    assert "\n" not in reason


def test_compiled_kernels_need_no_compiler(monkeypatch):
    packages = {"flashinfer-python": "0.6.4", "flashinfer-jit-cache": "0.6.4+cu129"}
    assert why(monkeypatch, ModuleType("flashinfer"), packages=packages, tools={}) is None
