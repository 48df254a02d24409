"""RMS norm in Triton, for NVIDIA GPUs: a program a row, which it reads once.

No GPU has run this kernel: it is compared with the reference under Triton's interpreter and compiled for
sm_80, sm_90 and sm_100 (benchmarks/compile_triton.py).

A thread holds 16 bytes of the row, or more where the row is longer than a block's threads reach; x, residual
and weight are all asked for before the first is used. The order of the sum depends on H alone.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ..gpu import dependent_launch
from ..gpu import why_no_triton as why_unavailable

__all__ = ["compile_cases", "rms_norm", "why_unavailable"]

EXACT: dict[str, Any] = {"enable_fp_fusion": False}  # roundings as written


@triton.jit
def _rms_norm_kernel(
    out,
    residual,
    x,
    weight,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    dtype = out.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK)
    live = columns < WIDTH
    scale = tl.load(weight + columns, mask=live, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    if ADD:
        total = value + tl.load(residual + at, mask=live, other=0.0).to(tl.float32)
        total = total.to(dtype)
        tl.store(residual + at, total, mask=live)
        value = total.to(tl.float32)
    mean = tl.div_rn(tl.sum(value * value, axis=0), WIDTH * 1.0)
    normed = value * tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(out + at, (normed.to(dtype).to(tl.float32) * scale).to(dtype), mask=live)


def options(width: int, element_size: int) -> tuple[int, dict[str, Any]]:
    """BLOCK, and how to launch it: threads enough for 16 bytes each, at most 512."""
    block: int = triton.next_power_of_2(width)
    return block, {"num_warps": min(16, max(1, block * element_size // 512)), **EXACT}


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if out is None:
        out = torch.empty_like(x)
    rows, width = x.shape
    if rows and width:
        block, launch = options(width, x.element_size())
        added = residual is not None
        _rms_norm_kernel[(rows,)](
            out,
            residual if added else x,
            x,
            weight,
            eps,
            WIDTH=width,
            BLOCK=block,
            ADD=added,
            **launch,
            **dependent_launch(x.device),
        )
    return out


def compile_cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """See benchmarks/compile_triton.py. Hidden sizes of models in use."""
    for label, width, name, size in (
        ("", 896, "bf16", 2),
        ("", 1536, "bf16", 2),
        ("", 3584, "fp16", 2),
        ("", 8192, "bf16", 2),
        ("", 1536, "fp32", 4),
        (" dependent on sm_90", 1536, "bf16", 2),
    ):
        block, launch = options(width, size)
        signature = {**dict.fromkeys(("out", "residual", "x", "weight"), f"*{name}"), "eps": "fp32"}
        constexprs = {"WIDTH": width, "BLOCK": block, "ADD": True, "PDL": bool(label)}
        launch["launch_pdl"] = bool(label)
        yield f"{name} {width}{label}", _rms_norm_kernel, signature, constexprs, launch
