"""Rotary position embedding in Triton, for NVIDIA GPUs: norm, rotation, the write of K and V in one launch.

No GPU has run this kernel: it is compared with the reference under Triton's interpreter and compiled for
sm_80, sm_90 and sm_100 (benchmarks/compile_triton.py).

A program is HEADS_BLOCK heads of one token: heads of q, or heads of k with the same heads of v. A head is
read as its two halves, 16 bytes of each a thread.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ..gpu import dependent_launch
from ..gpu import why_no_triton as why_unavailable

__all__ = ["compile_cases", "rope", "why_unavailable"]

EXACT: dict[str, Any] = {"enable_fp_fusion": False}  # roundings as written
HEADS_BLOCK = 4  # four heads of 128 elements: a warp


@triton.jit
def _to_float8(x):
    """The bits of float8_e4m3fn nearest to float32 x, ties to even, at most 448 in magnitude; NaN stays NaN.

    In integers: the same bits on every GPU (sm_80 has no instruction) and under the interpreter.
    """
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(tl.abs(x), 448.0)
    size_bits = size.to(tl.int32, bitcast=True)
    # Below 2**-6 the numbers are multiples of 2**-9: adding 2**14 rounds to that.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    # From 2**-6 on: 20 of 23 bits of mantissa go, and the bias becomes 7.
    large = ((size_bits + 0x7FFFF + ((size_bits >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(size < 0.015625, small, large)
    code = tl.where(x == x, code, 0x7F)
    return (code | sign).to(tl.uint8)


@triton.jit
def _to_cache(x, cache):
    if cache.dtype.element_ty == tl.uint8:
        return _to_float8(x)
    else:
        return x.to(cache.dtype.element_ty)


@triton.jit
def _norm(a, b, weight, eps, d_ids, d_live, HEAD_DIM: tl.constexpr):
    squares = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, HEAD_DIM * 1.0) + eps))
    weight_a = tl.load(weight + d_ids, mask=d_live, other=0.0).to(tl.float32)
    weight_b = tl.load(weight + HEAD_DIM // 2 + d_ids, mask=d_live, other=0.0).to(tl.float32)
    return a * scale[:, None] * weight_a[None, :], b * scale[:, None] * weight_b[None, :]


@triton.jit
def _rope_kernel(
    out,
    qkv,
    cos_sin,
    positions,
    slot_mapping,
    k_cache,
    v_cache,
    q_weight,
    k_weight,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    NORM_Q: tl.constexpr,
    NORM_K: tl.constexpr,
    PDL: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    Q_BLOCKS: tl.constexpr = (HEADS + HEADS_BLOCK - 1) // HEADS_BLOCK
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    d_ids = tl.arange(0, HALF_PAD)
    d_live = d_ids < HALF
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    angles = cos_sin + tl.load(positions + token).to(tl.int64) * HEAD_DIM + d_ids
    cos = tl.load(angles, mask=d_live, other=0.0)[None, :]
    sin = tl.load(angles + HALF, mask=d_live, other=0.0)[None, :]
    row = qkv + token * ((HEADS + 2 * KV_HEADS) * HEAD_DIM)

    if block < Q_BLOCKS:
        heads = block * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
        live = (heads < HEADS)[:, None] & d_live[None, :]
        at = heads[:, None] * HEAD_DIM + d_ids[None, :]
        a = tl.load(row + at, mask=live, other=0.0).to(tl.float32)
        b = tl.load(row + HALF + at, mask=live, other=0.0).to(tl.float32)
        if NORM_Q:
            a, b = _norm(a, b, q_weight, eps, d_ids, d_live, HEAD_DIM)
        to = out + token * (HEADS * HEAD_DIM) + at
        tl.store(to, (a * cos - b * sin).to(out.dtype.element_ty), mask=live)
        tl.store(to + HALF, (b * cos + a * sin).to(out.dtype.element_ty), mask=live)
    else:
        slot = tl.load(slot_mapping + token).to(tl.int64)
        if slot >= 0:
            heads = (block - Q_BLOCKS) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
            live = (heads < KV_HEADS)[:, None] & d_live[None, :]
            at = heads[:, None] * HEAD_DIM + d_ids[None, :]
            keys = row + HEADS * HEAD_DIM + at
            a = tl.load(keys, mask=live, other=0.0).to(tl.float32)
            b = tl.load(keys + HALF, mask=live, other=0.0).to(tl.float32)
            v_a = tl.load(keys + KV_HEADS * HEAD_DIM, mask=live, other=0.0).to(tl.float32)
            v_b = tl.load(keys + KV_HEADS * HEAD_DIM + HALF, mask=live, other=0.0).to(tl.float32)
            if NORM_K:
                a, b = _norm(a, b, k_weight, eps, d_ids, d_live, HEAD_DIM)
            to = slot * (KV_HEADS * HEAD_DIM) + at
            tl.store(k_cache + to, _to_cache(a * cos - b * sin, k_cache), mask=live)
            tl.store(k_cache + to + HALF, _to_cache(b * cos + a * sin, k_cache), mask=live)
            tl.store(v_cache + to, _to_cache(v_a, v_cache), mask=live)
            tl.store(v_cache + to + HALF, _to_cache(v_b, v_cache), mask=live)


def options(head_dim: int, element_size: int) -> tuple[int, dict[str, Any]]:
    """HALF_PAD, and how to launch it: threads enough for 16 bytes of each half."""
    half_pad: int = triton.next_power_of_2(head_dim // 2)
    warps = HEADS_BLOCK * half_pad * element_size // 512
    return half_pad, {"num_warps": min(4, max(1, warps)), **EXACT}


def rope(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    tokens, head_dim = qkv.shape[0], cos_sin.shape[1]
    if out is None:
        out = qkv.new_empty((tokens, num_heads, head_dim))
    if tokens == 0:
        return out
    if k_cache.dtype == torch.float8_e4m3fn:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    half_pad, launch = options(head_dim, qkv.element_size())
    blocks = triton.cdiv(num_heads, HEADS_BLOCK) + triton.cdiv(num_kv_heads, HEADS_BLOCK)
    _rope_kernel[(tokens, blocks)](
        out,
        qkv,
        cos_sin,
        positions,
        slot_mapping,
        k_cache,
        v_cache,
        qkv if q_weight is None else q_weight,
        qkv if k_weight is None else k_weight,
        eps,
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HALF_PAD=half_pad,
        HEADS_BLOCK=HEADS_BLOCK,
        NORM_Q=q_weight is not None,
        NORM_K=k_weight is not None,
        **launch,
        **dependent_launch(qkv.device),
    )
    return out


def compile_cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """See benchmarks/compile_triton.py. Heads, kv heads, head_dim of models in use; normed: Qwen3."""
    sizes = {"bf16": 2, "fp16": 2, "fp32": 4}
    for heads, kv_heads, head_dim, name, cache, normed in (
        (14, 2, 64, "bf16", "bf16", False),
        (12, 2, 128, "bf16", "bf16", False),
        (32, 8, 128, "bf16", "bf16", True),
        (32, 8, 128, "bf16", "u8", True),  # float8_e4m3fn
        (28, 4, 128, "fp16", "fp16", False),
        (12, 2, 128, "fp32", "fp32", True),
    ):
        half_pad, launch = options(head_dim, sizes[name])
        signature = {
            **dict.fromkeys(("out", "qkv", "q_weight", "k_weight"), f"*{name}"),
            **dict.fromkeys(("k_cache", "v_cache"), f"*{cache}"),
            **dict.fromkeys(("positions", "slot_mapping"), "*i32"),
            "cos_sin": "*fp32",
            "eps": "fp32",
        }
        constexprs = {
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "HEAD_DIM": head_dim,
            "HALF_PAD": half_pad,
            "HEADS_BLOCK": HEADS_BLOCK,
            "NORM_Q": normed,
            "NORM_K": normed,
            "PDL": False,
        }
        label = f"{name}-{'fp8' if cache == 'u8' else cache} {heads}/{kv_heads}x{head_dim}"
        yield f"{label} norm" if normed else label, _rope_kernel, signature, constexprs, launch
