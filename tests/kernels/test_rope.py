import os
from collections.abc import Iterator

import pytest
import torch

from elastic_decode.kernels import _C
from elastic_decode.kernels.rope import rope
from elastic_decode.kernels.testing import assert_close, device_of, runnable

BEST = _C.cpu.isa()
ISAS = [name for name, isa in _C.cpu.Isa.__members__.items() if int(isa) <= int(BEST)]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)


def variants() -> list[str]:
    """Every backend that can run here; the C++ one once for each instruction set."""
    found = runnable("rope")
    params = [name for name in found if name != "cpu"]
    return params + [f"cpu-{isa}" for isa in ISAS] if "cpu" in found else params


@pytest.fixture(params=variants())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.manual_seed(0)
    name, _, isa = request.param.partition("-")
    if isa:
        _C.cpu.limit_isa(_C.cpu.Isa.__members__[isa])
    with torch.device(device_of(name)):
        yield name
    _C.cpu.limit_isa(BEST)


def skip_unless_computed(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter does no bfloat16 arithmetic")
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("the C++ kernels take no float16")
    if backend == "cpu" and dtype == torch.float8_e4m3fn:
        pytest.skip("the C++ kernels take no float8")


CACHE_DTYPES = pytest.mark.parametrize(
    "cache_dtype",
    [torch.float32, torch.bfloat16, torch.float8_e4m3fn],
    ids=["cache_float32", "cache_bfloat16", "cache_float8"],
)


class Case:
    """Random inputs of one call; the caches start as NaN, so that unwanted and missed writes show."""

    def __init__(self, tokens, heads, kv_heads, dim, dtype, cache_dtype, normed, page_size=4, seed=0):
        torch.manual_seed(seed)
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
        angles = torch.rand(50, dim // 2) * 6.3
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
        self.positions = torch.randint(0, 50, (tokens,), dtype=torch.int32)
        pages = tokens // page_size + 2
        slots = torch.randperm(pages * page_size, dtype=torch.int32)[:tokens]
        slots[torch.rand(tokens) < 0.2] = -1
        self.slots = slots
        shape = (pages, page_size, kv_heads, dim)
        self.k_cache = torch.full(shape, torch.nan).to(cache_dtype)
        self.v_cache = torch.full(shape, torch.nan).to(cache_dtype)
        self.q_weight = torch.randn(dim).to(dtype) if normed else None
        self.k_weight = torch.randn(dim).to(dtype) if normed else None

    def run(self, backend, rows=slice(None), out=None):
        """q, and the caches as the call leaves them."""
        k_cache, v_cache = self.k_cache.clone(), self.v_cache.clone()
        q = rope(
            self.qkv[rows],
            self.cos_sin,
            self.positions[rows],
            self.slots[rows],
            k_cache,
            v_cache,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            q_weight=self.q_weight,
            k_weight=self.k_weight,
            eps=1e-6,
            out=out,
            backend=backend,
        )
        return q, k_cache, v_cache

    def expected(self, dtype):
        """As transformers computes it with every tensor in `dtype` (float64: the exact result)."""
        heads = self.qkv.to(dtype).view(len(self.qkv), -1, self.dim)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        cos, sin = self.cos_sin[self.positions.long()].unsqueeze(1).to(dtype).chunk(2, dim=-1)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)

        def norm(x, weight):
            wide = x if dtype == torch.float64 else x.float()
            normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            return weight.to(dtype) * normed.to(dtype)

        def rotate(x):
            half = self.dim // 2
            return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

        if self.q_weight is not None:
            q, k = norm(q, self.q_weight), norm(k, self.k_weight)
        return rotate(q), rotate(k), v


SHAPES = [
    (1, 1, 1, 2),
    (2, 2, 1, 6),
    (5, 4, 2, 16),
    (3, 3, 3, 34),
    (9, 14, 2, 64),
    (33, 8, 1, 128),
    (70, 6, 2, 80),
]


@DTYPES
@CACHE_DTYPES
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "norm"])
def test_close_to_exact(backend: str, dtype: torch.dtype, cache_dtype: torch.dtype, normed: bool) -> None:
    skip_unless_computed(backend, dtype)
    skip_unless_computed(backend, cache_dtype)
    for shape in SHAPES:
        case = Case(*shape, dtype, cache_dtype, normed)
        out = torch.full((shape[0], shape[1], shape[3]), torch.nan, dtype=dtype)
        q, k_cache, v_cache = case.run(backend, out=out)
        assert q is out
        exact_q, exact_k, exact_v = case.expected(torch.float64)
        base_q, base_k, _ = case.expected(dtype)
        assert_close(q, exact_q, base_q, what=f"q {shape}")

        written = case.slots >= 0
        slots = case.slots[written].long()
        k, v = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
        written_k, written_v = k.float()[slots].to(cache_dtype), v.float()[slots]  # float8 has no indexing
        assert_close(written_k, exact_k[written], base_k[written].to(cache_dtype), what=f"k {shape}")
        assert torch.equal(written_v, exact_v[written].float().to(cache_dtype).float())
        untouched = torch.ones(len(k), dtype=torch.bool)
        untouched[slots] = False
        assert k.float()[untouched].isnan().all()
        assert v.float()[untouched].isnan().all()


def test_only_one_of_q_and_k_is_normed(backend: str) -> None:
    both, neither = (Case(7, 4, 2, 16, torch.float32, torch.float32, normed) for normed in (True, False))
    q_normed, k_normed, _ = both.run(backend)
    both.q_weight = None
    q, k, _ = both.run(backend)
    plain_q, plain_k, _ = neither.run(backend)
    assert torch.equal(q, plain_q)
    assert not torch.equal(q, q_normed)
    assert torch.equal(k.nan_to_num(), k_normed.nan_to_num())
    assert not torch.equal(k.nan_to_num(), plain_k.nan_to_num())


def test_float8_saturates_and_rounds_to_even(backend: str) -> None:
    """Every float16 as a value; PyTorch's conversion is the measure where it does not overflow."""
    skip_unless_computed(backend, torch.float8_e4m3fn)
    case = Case(32, 1, 16, 128, torch.float32, torch.float8_e4m3fn, False, page_size=16)
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    case.qkv[:, 17 * 128 :] = values.view(32, -1)
    case.slots = torch.arange(32, dtype=torch.int32)
    _, _, v_cache = case.run(backend)
    found = v_cache.view(torch.uint8).flatten()[: len(values)]
    expected = values.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
    number = ~values.isnan()
    assert torch.equal(found[number], expected[number])
    assert (found[~number] & 0x7F == 0x7F).all()


@DTYPES
def test_tokens_do_not_depend_on_the_batch(backend: str, dtype: torch.dtype) -> None:
    skip_unless_computed(backend, dtype)
    case = Case(70, 6, 2, 80, dtype, dtype, True)
    q, k, v = case.run(backend)
    for row in range(70):
        alone_q, alone_k, alone_v = case.run(backend, slice(row, row + 1))
        assert torch.equal(alone_q[0], q[row])
        slot = int(case.slots[row])
        if slot >= 0:
            assert torch.equal(alone_k.flatten(0, 1)[slot], k.flatten(0, 1)[slot])
            assert torch.equal(alone_v.flatten(0, 1)[slot], v.flatten(0, 1)[slot])


def test_no_token_writes_where_all_slots_are_negative(backend: str) -> None:
    case = Case(5, 4, 2, 16, torch.float32, torch.float32, False)
    case.slots.fill_(-1)
    q, k, v = case.run(backend)
    assert q.isfinite().all()
    assert k.isnan().all()
    assert v.isnan().all()


def test_empty(backend: str) -> None:
    case = Case(0, 4, 2, 16, torch.float32, torch.float32, True)
    q, k, _ = case.run(backend)
    assert q.shape == (0, 4, 16)
    assert k.isnan().all()


def test_bad_arguments_raise() -> None:
    def case() -> Case:
        return Case(5, 4, 2, 16, torch.float32, torch.float32, True)

    bad = case()
    bad.positions[2] = 50
    with pytest.raises(ValueError, match="positions holds"):
        bad.run("cpu")
    bad = case()
    bad.positions[2] = -1
    with pytest.raises(ValueError, match="positions holds"):
        bad.run("cpu")
    bad = case()
    bad.slots[1] = 10_000
    with pytest.raises(ValueError, match="slot_mapping holds"):
        bad.run("cpu")
    bad = case()
    bad.positions = bad.positions.long()
    with pytest.raises(TypeError, match="positions has dtype"):
        bad.run("cpu")
    bad = case()
    bad.heads = 5
    with pytest.raises(ValueError, match="qkv has shape"):
        bad.run("cpu")
    bad = case()
    bad.k_weight = bad.k_weight[:8]
    with pytest.raises(ValueError, match="k_weight has shape"):
        bad.run("cpu")
    bad = case()
    bad.v_cache = bad.v_cache.bfloat16()
    with pytest.raises(TypeError, match="v_cache has dtype"):
        bad.run("cpu")
    with pytest.raises(TypeError, match="k_cache has dtype"):
        Case(5, 4, 2, 16, torch.float32, torch.float8_e4m3fn, True).run("cpu")


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_compiles(name: str) -> None:
    case = Case(5, 4, 2, 16, torch.float32, torch.float32, True)
    case.k_cache.zero_()
    case.v_cache.zero_()
    args = (case.qkv, case.cos_sin, case.positions, case.slots, case.k_cache, case.v_cache, 4, 2)
    torch.library.opcheck(torch.ops.elastic_decode.rope, (*args, case.q_weight, case.k_weight, 1e-6, name))
    torch.library.opcheck(torch.ops.elastic_decode.rope, (*args, None, None, 1e-6, name))

    eager = case.run(name, out=torch.empty(5, 4, 16))
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager")(name, out=torch.empty(5, 4, 16))
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a, b)
