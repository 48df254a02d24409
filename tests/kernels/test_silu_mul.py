import os
from collections.abc import Iterator

import pytest
import torch

from elastic_decode.kernels import _C
from elastic_decode.kernels.silu_mul import silu_mul
from elastic_decode.kernels.testing import assert_close, device_of, runnable

BEST = _C.cpu.isa()
ISAS = [name for name, isa in _C.cpu.Isa.__members__.items() if int(isa) <= int(BEST)]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)


def variants() -> list[str]:
    """Every backend that can run here; the C++ one once for each instruction set."""
    found = runnable("silu_mul")
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


SHAPES = [(1, 1), (2, 3), (1, 15), (3, 16), (5, 33), (4, 100), (2, 4864), (33, 257), (70, 1024)]


def exact_and_baseline(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = gate_up.chunk(2, dim=-1)
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    return exact, torch.nn.functional.silu(gate) * up


@DTYPES
def test_close_to_exact(backend: str, dtype: torch.dtype) -> None:
    skip_unless_computed(backend, dtype)
    for rows, width in SHAPES:
        gate_up = (4 * torch.randn(rows, 2 * width)).to(dtype)
        exact, baseline = exact_and_baseline(gate_up)
        out = torch.full((rows, width), torch.nan, dtype=dtype)
        assert silu_mul(gate_up, out=out, backend=backend) is out
        assert_close(out, exact, baseline, what=f"silu_mul {rows}x{width}")
        assert torch.equal(silu_mul(gate_up, backend=backend), out)


@DTYPES
def test_every_gate_within_units_in_the_last_place(backend: str, dtype: torch.dtype) -> None:
    """Relative, so that small results count as much as large ones: all finite bfloat16 gates, with up = 1."""
    skip_unless_computed(backend, dtype)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    gate = bits.view(torch.bfloat16)
    gate = gate[gate.isfinite() & (gate.abs() > 1e-30) & (gate > -80)].to(dtype)
    gate = gate[gate.isfinite()]
    gate_up = torch.cat((gate, torch.ones_like(gate))).unsqueeze(0)
    exact, _ = exact_and_baseline(gate_up.double())
    size = exact.abs().clamp_min(torch.finfo(dtype).tiny)  # below it (float16) the units are all the same
    relative = ((silu_mul(gate_up, backend=backend).double() - exact) / size).abs().max().item()
    units = 3.0 if dtype == torch.float32 else 0.51
    assert relative <= units * torch.finfo(dtype).eps


def test_extremes(backend: str) -> None:
    gate = torch.tensor([100.0, -100.0, 1e30, -1e30, torch.inf, torch.nan, 0.0, -0.0, 88.8, -88.8, -110.0])
    result = silu_mul(torch.cat((gate, torch.full_like(gate, 2.0))).unsqueeze(0), backend=backend)[0]
    exact = torch.nn.functional.silu(gate.double()) * 2
    torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-36, equal_nan=True)


@DTYPES
def test_rows_do_not_depend_on_the_batch(backend: str, dtype: torch.dtype) -> None:
    skip_unless_computed(backend, dtype)
    gate_up = torch.randn(120, 2 * 301).to(dtype)
    whole = silu_mul(gate_up, backend=backend)
    alone = torch.cat([silu_mul(row.unsqueeze(0), backend=backend) for row in gate_up])
    assert torch.equal(whole, alone)


def test_empty(backend: str) -> None:
    assert silu_mul(torch.empty(0, 8), backend=backend).shape == (0, 4)


def test_bad_arguments_raise() -> None:
    with pytest.raises(ValueError, match="even number of columns"):
        silu_mul(torch.randn(3, 7))
    with pytest.raises(ValueError, match="out has shape"):
        silu_mul(torch.randn(3, 8), out=torch.empty(3, 8))
    with pytest.raises(ValueError, match="contiguous"):
        silu_mul(torch.randn(8, 4).T)
    with pytest.raises(TypeError, match="gate_up has dtype"):
        silu_mul(torch.randn(3, 8).half(), backend="cpu")
    with pytest.raises(TypeError, match="gate_up has dtype"):
        silu_mul(torch.ones(3, 8, dtype=torch.int32))


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_compiles(name: str) -> None:
    gate_up = torch.randn(3, 8)
    torch.library.opcheck(torch.ops.elastic_decode.silu_mul, (gate_up, name))

    def layer(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return silu_mul(silu_mul(gate_up, backend=name), backend=name, out=out) + 1

    eager_out, out = torch.empty(3, 2), torch.empty(3, 2)
    eager = layer(gate_up, eager_out)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(gate_up, out), eager)
    assert torch.equal(out, eager_out)
