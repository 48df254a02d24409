import os
from collections.abc import Iterator

import pytest
import torch

from elastic_decode.kernels import _C, registry
from elastic_decode.kernels.linear import linear
from elastic_decode.kernels.testing import assert_close, device_of, runnable

BEST = _C.cpu.isa()
ISAS = [name for name, isa in _C.cpu.Isa.__members__.items() if int(isa) <= int(BEST)]


INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)


def variants() -> list[str]:
    """Every backend that can run here; the C++ one once for each instruction set."""
    found = runnable("linear")
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
    if backend == "triton" and dtype == torch.bfloat16 and INTERPRETING:
        pytest.skip("the interpreter does no bfloat16 arithmetic")
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("the C++ kernels take no float16")


def skip_unless_invariant(backend: str) -> None:
    if backend in registry.NOT_BATCH_INVARIANT["linear"]:
        pytest.skip("not batch-invariant, as it says")


@pytest.fixture
def threads() -> Iterator:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random_inputs(tokens: int, outputs: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> tuple:
    torch.manual_seed(seed)
    x = torch.randn(tokens, inputs).to(dtype)
    weight = torch.randn(outputs, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    return x, weight, bias


SHAPES = [
    (1, 1, 1),
    (2, 3, 5),
    (1, 64, 64),
    (1, 7, 33),
    (3, 17, 31),
    (4, 33, 32),
    (5, 31, 95),
    (8, 96, 257),
    (9, 50, 896),
    (33, 129, 130),
    (70, 19, 1000),
    (2, 5, 4864),  # long rows are taken in chunks, whose sums wait for the next one
    (67, 9, 3333),
    (130, 12, 1601),
]
if INTERPRETING:  # which takes its time
    SHAPES = [shape for shape in SHAPES if shape[0] * shape[2] < 100_000]


@DTYPES
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_close_to_exact(backend: str, dtype: torch.dtype, biased: bool) -> None:
    skip_unless_computed(backend, dtype)
    for shape in SHAPES:
        x, weight, bias = random_inputs(*shape, dtype)
        added = bias if biased else None
        exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double() if biased else None)
        baseline = torch.nn.functional.linear(x, weight, added)
        # Terms cancel: a unit in the last place is one of the terms' sum, not of the result's.
        floor = torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T).max().item()
        if dtype != torch.float32:
            floor = None
        out = torch.full(baseline.shape, torch.nan, dtype=dtype)
        result = linear(x, weight, added, out=out, backend=backend)
        assert result is out
        assert_close(out, exact, baseline, floor=floor, what=f"linear {shape}")
        if backend not in registry.NOT_BATCH_INVARIANT["linear"]:
            assert torch.equal(linear(x, weight, added, backend=backend), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_float32_out_of_half(backend: str, dtype: torch.dtype) -> None:
    skip_unless_computed(backend, dtype)
    for shape in SHAPES:
        x, weight, bias = random_inputs(*shape, dtype)
        exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        baseline = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
        floor = torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T).max().item()
        result = linear(x, weight, bias, out_dtype=torch.float32, backend=backend)
        assert_close(result, exact, baseline, floor=floor, what=f"linear {shape}")
        out = torch.full(baseline.shape, torch.nan)
        assert torch.equal(linear(x, weight, bias, out=out, backend=backend), result)
        if backend not in registry.NOT_BATCH_INVARIANT["linear"]:
            assert torch.equal(linear(x, weight, bias, backend=backend), result.to(dtype))


@DTYPES
@pytest.mark.parametrize(("outputs", "inputs"), [(37, 67), (200, 896), (500, 96), (21, 3333)])
# Triton has a test of its own, below.
@pytest.mark.parametrize("backend", [name for name in variants() if name != "triton"], indirect=True)
def test_rows_do_not_depend_on_the_batch(
    backend: str, dtype: torch.dtype, outputs: int, inputs: int, threads
) -> None:
    skip_unless_invariant(backend)
    skip_unless_computed(backend, dtype)
    x, weight, bias = random_inputs(257, outputs, inputs, dtype)
    threads(1)
    alone = torch.cat([linear(row.unsqueeze(0), weight, bias, backend=backend) for row in x])
    for count in (1, 2):
        threads(count)
        for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 12, 33, 64, 257) if backend == "cpu" else (2, 33):
            for start in {0, (257 - tokens) // 2, 257 - tokens}:
                part = linear(x[start : start + tokens], weight, bias, backend=backend)
                assert torch.equal(part, alone[start : start + tokens]), (tokens, start, count)


@pytest.fixture
def sums_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter: tl.dot adds its products to the accumulator one k after the other. NumPy's would
    sum in an order of its own for each shape; a GPU's instructions are taken as they are."""
    if not INTERPRETING:
        return
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right, total = a.data.astype("float32"), b.data.astype("float32"), d.data.copy()
        for k in range(left.shape[1]):
            total += left[:, k, None] * right[None, k]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


SMALL = [(70, 67), (40, 700), (9, 1410)]
REAL = [(2048, 1536), (17920, 1536), (1536, 8960), (896, 4864)]
# Each case compiles six kernels: on a GPU one dtype of the large ones is enough.
OF_TILES = [
    (*size, dtype)
    for size in (SMALL if INTERPRETING else SMALL[:1])
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
] + [(*size, torch.bfloat16) for size in (() if INTERPRETING else REAL)]


@pytest.mark.parametrize("name", ["triton"])
@pytest.mark.parametrize(("outputs", "inputs", "dtype"), OF_TILES)
def test_bits_do_not_depend_on_the_tile(
    name: str, dtype: torch.dtype, outputs: int, inputs: int, sums_in_order: None, monkeypatch
) -> None:
    """Every tile, with splits spread over programs and walked by one."""
    skip_unless_computed(name, dtype)
    from elastic_decode.kernels.linear import triton as module

    with torch.device(device_of(name)):
        x, weight, bias = random_inputs(257, outputs, inputs, dtype)
        whole = linear(x, weight, bias, backend=name)
        for tokens in (1, 2, 7, 16, 17, 64, 65, 256):
            for most, start in ((0, 257 - tokens), (1000, 0)):
                monkeypatch.setattr(module, "SPREAD_TOKENS", most)
                part = linear(x[start : start + tokens], weight, bias, backend=name)
                assert torch.equal(part, whole[start : start + tokens]), (tokens, start, most)
        assert all(not counters.any() for counters in module._arrived.values())


def test_plans_of_real_weights() -> None:
    """What the tables beside the Triton kernel promise, on every architecture."""
    pytest.importorskip("triton")
    from elastic_decode.kernels.linear.triton import SPLIT_DEPTH, TILES, plan

    assert plan(257, 17920, 1536, torch.bfloat16, 90).tile == TILES[90].wide
    assert plan(1, 1536, 8960, torch.bfloat16, 90)[1:] == (10, 896, True)
    for arch, tiles in TILES.items():
        for hidden, qkv, intermediate in ((896, 1152, 4864), (1536, 2048, 8960), (3584, 4608, 18944)):
            for outputs, inputs in (
                (qkv, hidden),
                (hidden, hidden),
                (2 * intermediate, hidden),
                (hidden, intermediate),
                (151936, hidden),
            ):
                for dtype in (torch.bfloat16, torch.float32):
                    plans = [plan(n, outputs, inputs, dtype, arch) for n in (1, 17, 65, 257, 2048)]
                    assert len({found[1:3] for found in plans}) == 1
                    for tokens, found in zip((1, 17, 65, 257, 2048), plans, strict=True):
                        tile, count, length, spread = found
                        assert length % SPLIT_DEPTH == SPLIT_DEPTH % tile.depth == 0
                        assert (count - 1) * length < inputs <= count * length
                        cut = -(-outputs // tile.outputs) * -(-tokens // tile.tokens)
                        assert not spread or cut < tiles.processors  # that many counters there are
                    programs = -(-outputs // 64) * plans[0].splits
                    assert programs > tiles.processors or inputs // plans[0].splits <= 3 * SPLIT_DEPTH
                    assert plans[0].spread == (plans[0].splits > 1)
                    assert not plans[-1].spread


@DTYPES
def test_columns_do_not_depend_on_the_slice_of_weights(
    backend: str, dtype: torch.dtype, sums_in_order: None
) -> None:
    """Fused matrices give what their parts give; rows need not start on a cache line."""
    skip_unless_invariant(backend)
    skip_unless_computed(backend, dtype)
    x, weight, bias = random_inputs(6, 100, 77, dtype)
    whole = linear(x, weight, bias, backend=backend)
    for begin, end in ((0, 1), (1, 2), (3, 50), (50, 100), (99, 100)):
        part = linear(x, weight[begin:end], bias[begin:end], backend=backend)
        assert torch.equal(part, whole[:, begin:end])
    narrow = weight[:, 5:70]
    assert torch.equal(
        linear(x[:, 5:70].contiguous(), narrow, backend=backend),
        linear(x[:, 5:70].contiguous(), narrow.contiguous(), backend=backend),
    )


def test_not_a_number_stays_in_its_row(backend: str) -> None:
    x, weight, _ = random_inputs(9, 40, 70, torch.float32)
    clean = linear(x, weight, backend=backend)
    x[4, 69] = torch.nan
    x[6, 3] = torch.inf
    result = linear(x, weight, backend=backend)
    assert result[4].isnan().all()
    assert not result[6].isfinite().any()
    others = [0, 1, 2, 3, 5, 7, 8]
    assert torch.equal(result[others], clean[others])


def test_empty(backend: str) -> None:
    x, weight, bias = random_inputs(3, 4, 5, torch.float32)
    assert linear(x[:0], weight, bias, backend=backend).shape == (0, 4)
    assert linear(x, weight[:0], bias[:0], backend=backend).shape == (3, 0)
    assert torch.equal(linear(x[:, :0], weight[:, :0].contiguous(), bias, backend=backend), bias.expand(3, 4))


def test_threads_of_torch_are_respected(threads) -> None:
    """One thread asked for: the C++ kernel must not start another (seen in the CPU time it uses)."""
    import time

    x, weight, _ = random_inputs(64, 2048, 1024, torch.float32)
    threads(1)
    linear(x, weight, backend="cpu")
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(10):
        linear(x, weight, backend="cpu")
    assert time.process_time() - cpu < 1.3 * (time.perf_counter() - wall)


def test_bad_arguments_raise() -> None:
    x, weight, bias = random_inputs(3, 4, 5, torch.float32)
    with pytest.raises(ValueError, match="weight has shape"):
        linear(x, weight[:, :4])
    with pytest.raises(ValueError, match="contiguous rows"):
        linear(torch.ones(3, 4), weight.T)
    with pytest.raises(ValueError, match="x must be contiguous"):
        linear(torch.ones(5, 3).T, weight)
    with pytest.raises(TypeError, match="weight has dtype"):
        linear(x, weight.bfloat16())
    with pytest.raises(TypeError, match="x has dtype"):
        linear(x.half(), weight.half(), backend="cpu")
    with pytest.raises(ValueError, match="bias has shape"):
        linear(x, weight, bias[:3])
    with pytest.raises(TypeError, match="out_dtype"):
        linear(x, weight, out_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="out has shape"):
        linear(x, weight, out=torch.empty(3, 5))
    with pytest.raises(TypeError, match="out has dtype"):
        linear(x.bfloat16(), weight.bfloat16(), out=torch.empty(3, 4), out_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="unknown backend"):
        linear(x, weight, backend="fast")


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_compiles(name: str) -> None:
    x, weight, bias = random_inputs(3, 4, 5, torch.bfloat16)
    torch.library.opcheck(torch.ops.elastic_decode.linear, (x, weight, bias, torch.float32, name))
    torch.library.opcheck(torch.ops.elastic_decode.linear, (x, weight, None, torch.bfloat16, name))

    def layer(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return linear(linear(x, weight, bias, backend=name), weight[:, :4], backend=name, out=out) + 1

    out, eager_out = torch.empty(3, 4, dtype=torch.bfloat16), torch.empty(3, 4, dtype=torch.bfloat16)
    eager = layer(x, eager_out)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, out)
    assert torch.equal(compiled, eager)
    assert torch.equal(out, eager_out)
