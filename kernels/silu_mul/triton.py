"""SwiGLU's activation in Triton, for NVIDIA GPUs: 16 bytes of gates and of ups a thread.

No GPU has run this kernel: it is compared with the reference under Triton's interpreter and compiled for
sm_80, sm_90 and sm_100 (benchmarks/compile_triton.py).
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ..gpu import dependent_launch
from ..gpu import why_no_triton as why_unavailable

__all__ = ["compile_cases", "silu_mul", "why_unavailable"]

EXACT: dict[str, Any] = {"enable_fp_fusion": False}  # roundings as written
THREADS = 128
LOG2_E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693145751953125)  # 17 bits: times an exponent, exact
LN2_LOW = tl.constexpr(1.428606765330187e-06)


@triton.jit
def _exp(x):
    """exp(x) to one unit in the last place of float32, also far from 0, where tl.exp (2**(x log2 e), the
    product rounded) loses eight bits. Infinite from 88.72 on; 2**-126 at the least."""
    bounded = tl.minimum(tl.maximum(x, -87.0), 88.72)
    exponent = tl.floor(bounded * LOG2_E + 0.5)
    rest = tl.fma(exponent, -LN2_LOW, tl.fma(exponent, -LN2_HIGH, bounded))
    # Taylor's series: |rest| <= ln(2) / 2, so the first term left out is below 2**-28.
    series = tl.fma(rest, 1.0 / 5040.0, 1.0 / 720.0)
    series = tl.fma(series, rest, 1.0 / 120.0)
    series = tl.fma(series, rest, 1.0 / 24.0)
    series = tl.fma(series, rest, 1.0 / 6.0)
    series = tl.fma(series, rest, 0.5)
    series = tl.fma(series, rest, 1.0)
    series = tl.fma(series, rest, 1.0)
    # Two factors: 2**128, for the largest x, is no float32.
    power = exponent.to(tl.int32)
    half = power // 2
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((power - half + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x > 88.72, float("inf"), series * first * second)


@triton.jit
def _silu_mul_kernel(out, gate_up, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < WIDTH
    at = gate_up + row * (2 * WIDTH) + columns
    gate = tl.load(at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=live, other=0.0).to(tl.float32)
    if out.dtype.element_ty == tl.float32:
        result = tl.div_rn(gate, 1.0 + _exp(-gate)) * up
    else:  # what tl.exp and the quick division lose is a hundredth of a unit in the last place
        result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * WIDTH + columns, result.to(out.dtype.element_ty), mask=live)


def options(element_size: int) -> tuple[int, dict[str, Any]]:
    """BLOCK, and how to launch it: a row of 8960 bfloat16 is nine programs, so one token is still quick."""
    return THREADS * 16 // element_size, {"num_warps": THREADS // 32, **EXACT}


def silu_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = gate_up.new_empty((rows, width))
    if rows and width:
        block, launch = options(gate_up.element_size())
        _silu_mul_kernel[(rows, triton.cdiv(width, block))](
            out, gate_up, WIDTH=width, BLOCK=block, **launch, **dependent_launch(gate_up.device)
        )
    return out


def compile_cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """See benchmarks/compile_triton.py. Intermediate sizes of models in use."""
    for width, name, size in ((4864, "bf16", 2), (8960, "bf16", 2), (18944, "fp16", 2), (8960, "fp32", 4)):
        block, launch = options(size)
        constexprs = {"WIDTH": width, "BLOCK": block, "PDL": False}
        yield (
            f"{name} {width}",
            _silu_mul_kernel,
            dict.fromkeys(("out", "gate_up"), f"*{name}"),
            constexprs,
            launch,
        )
