import os
from collections.abc import Iterator

import pytest
import torch

from elastic_decode.kernels import _C
from elastic_decode.kernels.rms_norm import rms_norm
from elastic_decode.kernels.testing import assert_close, device_of, runnable

BEST = _C.cpu.isa()
ISAS = [name for name, isa in _C.cpu.Isa.__members__.items() if int(isa) <= int(BEST)]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)


def variants() -> list[str]:
    """Every backend that can run here; the C++ one once for each instruction set."""
    found = runnable("rms_norm")
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


def exact_and_baseline(x, weight, eps, residual):
    """The formula in float64, and as the models of transformers compute it in their dtype."""

    def norm(x, weight, wide):
        normed = x.to(wide) * torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + eps)
        return weight * normed.to(x.dtype)

    if residual is not None:
        x = residual + x
    return norm(x.double(), weight.double(), torch.float64), norm(x, weight, torch.float32), x


SHAPES = [
    (1, 1),
    (2, 3),
    (1, 31),
    (3, 32),
    (5, 33),
    (4, 64),
    (7, 257),
    (2, 896),
    (33, 1000),
    (300, 256),
    (1, 9001),
]


@DTYPES
@pytest.mark.parametrize("added", [False, True], ids=["plain", "residual"])
def test_close_to_exact(backend: str, dtype: torch.dtype, added: bool) -> None:
    skip_unless_computed(backend, dtype)
    for rows, width in SHAPES:
        x = torch.randn(rows, width).to(dtype)
        weight = torch.randn(width).to(dtype)
        residual = 3 * torch.randn(rows, width).to(dtype) if added else None
        exact, baseline, total = exact_and_baseline(x, weight, 1e-6, residual)
        out = torch.full_like(x, torch.nan)
        updated = residual.clone() if added else None
        assert rms_norm(x, weight, 1e-6, residual=updated, out=out, backend=backend) is out
        assert_close(out, exact, baseline, what=f"rms_norm {rows}x{width}")
        if added:
            assert torch.equal(updated, total)
        again = residual.clone() if added else None
        assert torch.equal(rms_norm(x, weight, 1e-6, residual=again, backend=backend), out)


@DTYPES
def test_rows_do_not_depend_on_the_batch(backend: str, dtype: torch.dtype) -> None:
    skip_unless_computed(backend, dtype)
    x = torch.randn(257, 199).to(dtype)
    weight = torch.randn(199).to(dtype)
    whole = rms_norm(x, weight, 1e-5, backend=backend)
    alone = torch.cat([rms_norm(row.unsqueeze(0), weight, 1e-5, backend=backend) for row in x])
    assert torch.equal(whole, alone)


def test_in_place(backend: str) -> None:
    x, weight = torch.randn(5, 70), torch.randn(70)
    expected = rms_norm(x, weight, 1e-6, backend=backend)
    assert torch.equal(rms_norm(x, weight, 1e-6, out=x, backend=backend), expected)
    assert torch.equal(x, expected)


@DTYPES
def test_eps_extremes_and_not_a_number(backend: str, dtype: torch.dtype) -> None:
    skip_unless_computed(backend, dtype)
    x = torch.randn(4, 50).to(dtype)
    x[0] = 0
    x[1] *= 1e-6
    x[2, 7] = torch.nan
    weight = torch.randn(50).to(dtype)
    exact, baseline, _ = exact_and_baseline(x, weight, 1e-5, None)
    result = rms_norm(x, weight, 1e-5, backend=backend)
    assert_close(result, exact, baseline)
    assert (result[0] == 0).all()
    assert result[2].isnan().all()


def test_empty(backend: str) -> None:
    assert rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6, backend=backend).shape == (0, 8)
    residual = torch.empty(0, 8)
    assert rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6, residual=residual, backend=backend).shape == (
        0,
        8,
    )


def test_bad_arguments_raise() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(x, weight[:7], 1e-6)
    with pytest.raises(TypeError, match="weight has dtype"):
        rms_norm(x.bfloat16(), weight, 1e-6)
    with pytest.raises(ValueError, match="residual has shape"):
        rms_norm(x, weight, 1e-6, residual=x[:2])
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(torch.randn(8, 3).T, weight, 1e-6)
    with pytest.raises(TypeError, match="x has dtype"):
        rms_norm(x.half(), weight.half(), 1e-6, backend="cpu")


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_compiles(name: str) -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    torch.library.opcheck(torch.ops.elastic_decode.rms_norm, (x, weight, 1e-6, None, name))
    torch.library.opcheck(torch.ops.elastic_decode.rms_norm, (x, weight, 1e-6, torch.randn(3, 8), name))

    def layer(x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        y = rms_norm(x, weight, 1e-6, residual=residual, backend=name)
        return rms_norm(y, weight, 1e-6, out=out, backend=name) + 1

    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        residual, out = torch.ones(3, 8), torch.empty(3, 8)
        results.append((run(x, residual, out), residual, out))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
