"""The variants of the attention kernels that benchmarks/compile_triton.py compiles."""

from collections.abc import Iterator
from typing import Any

import torch

from .triton_rows import COUNTS, attend_kernel, fold_kernel
from .triton_shared import shared_kernel
from .triton_tilings import (
    EXACT,
    FOLD_AHEAD,
    FOLD_HEADS,
    FOLD_OPTIONS,
    SPLIT,
    TILINGS,
    TL_DTYPES,
    padded_dim,
    product_dtype,
    takes_fp8_bits,
    tiling,
)

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", FP8: "fp8e4nv"}
# Of models in use: query heads, kv heads, head_dim, dtypes of q and of the cache, variants
SHAPES: list[tuple[int, int, int, torch.dtype, torch.dtype, str]] = [
    (12, 2, 128, BF16, BF16, "spread walk spread+shared walk+shared shared window prefill fold"),
    (12, 2, 128, BF16, FP8, "spread walk shared"),
    (14, 2, 64, BF16, BF16, "walk shared"),
    (16, 8, 256, BF16, BF16, "walk shared"),
    (32, 32, 96, BF16, BF16, "walk"),
    (32, 8, 128, FP16, FP16, "walk"),
    (12, 2, 128, FP32, FP32, "walk shared"),
]


def compile_cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """See benchmarks/compile_triton.py. Each as each GPU cuts it. Decode spread over programs or walked by
    one, after shared prefixes or not; the shared prefixes; prefill."""
    for heads, kv_heads, head_dim, dtype, kv, variants in SHAPES:
        for variant in variants.split():
            for arch in TILINGS:
                yield _case(arch, variant, heads, kv_heads, head_dim, dtype, kv)
    for variant in ("spread+shared", "shared", "fold"):
        yield _case(90, variant, 12, 2, 128, BF16, BF16, dependent=True)


def _case(
    arch: int,
    variant: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    kv: torch.dtype,
    dependent: bool = False,
) -> tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    group, product = heads // kv_heads, product_dtype(dtype, kv)
    tile = tiling(arch, head_dim, group, product, kv, variant in ("shared", "prefill"))
    kernel = {"shared": shared_kernel, "fold": fold_kernel}.get(variant, attend_kernel)
    cache = f"*{'u8' if takes_fp8_bits(arch, kv) else NAMES[kv]}"
    types = {
        **dict.fromkeys(("q", "out"), f"*{NAMES[dtype]}"),
        **dict.fromkeys(("k_cache", "v_cache"), cache),
        **dict.fromkeys(("page_table", "seq_lens", "query_start", "shared_splits"), "*i32"),
        **dict.fromkeys(("group_start", "shared_len"), "*i32"),
        **dict.fromkeys(("partial_out", "partial_sums"), "*fp32"),
        **dict.fromkeys(COUNTS, "i32"),
        "scale_log2e": "fp32",
    }
    constants = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "D_PAD": padded_dim(head_dim),
        "PAGE_SIZE": 16,
        "WINDOW": 4096 if variant == "window" else 0,
        "PRODUCT": TL_DTYPES[product],
        "FP8_BITS": takes_fp8_bits(arch, kv),
        "SPLIT": SPLIT,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "BLOCK_H": FOLD_HEADS,
        "AHEAD": FOLD_AHEAD,
        "QUERIES": tile.rows // group if variant == "prefill" else 1,
        "SPREAD": variant.startswith("spread"),
        "SHARED": variant.endswith("+shared"),
        "PDL": dependent,
    }
    options: dict[str, Any] = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **EXACT}
    name = f"{variant} {NAMES[dtype]}-{NAMES[kv]} {heads}/{kv_heads}x{head_dim}"
    return (
        f"{name}{' dependent' if dependent else ''} on sm_{arch}",
        kernel,
        {name: kind for name, kind in types.items() if name in kernel.arg_names},
        {name: value for name, value in constants.items() if name in kernel.arg_names},
        {**(FOLD_OPTIONS if variant == "fold" else options), "launch_pdl": dependent},
    )
