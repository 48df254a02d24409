"""How attention in Triton is cut up, by architecture and shape: tiles, splits, partial results, programs."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .. import gpu

INTERPRETING: bool = triton.knobs.runtime.interpret
SPLIT = 128  # keys whose order of summation is independent of all others
WALK_AT_MOST = 32  # splits that one program takes, where there is room for partial results
WORKSPACE_BYTES = 256 << 20  # partial results at most; past that, programs walk their splits
# No contraction that the code does not spell out: variants of a kernel then round alike.
EXACT: dict[str, Any] = {"enable_fp_fusion": False}

TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Tiling(NamedTuple):
    """How a shape is cut. `rows` and `keys` are powers of two, at least 16 (tl.dot's least)."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int  # 5: two buffers each of K and V (the page table is read ahead of them); 4: one


DECODE_ROWS, WIDE_ROWS = 16, 32

# (keys, num_warps, num_stages) by padded head_dim. Chosen by what compiles without spills (registers: Q's
# fragments, the accumulator, the pages' addresses) and leaves 130 KiB of keys and values in flight on a
# processor. No GPU has timed them; `keys` and `num_warps` change a token's bits, `num_stages` does not.
_Table = dict[int, tuple[int, int, int]]
_HALF: _Table = dict.fromkeys((16, 32, 64, 128), (64, 4, 5))
_FLOAT: _Table = {16: (32, 4, 4), 32: (32, 4, 4), 64: (32, 4, 5), 128: (32, 8, 5)}  # no tensor cores
# At 256 some 200 bytes a thread are spilled, whatever the tiling.
_MIXED: _Table = {16: (32, 8, 5), 32: (32, 8, 5), 64: (32, 8, 5), 128: (16, 8, 5), 256: (16, 8, 4)}
TILINGS: dict[int, dict[str, _Table]] = {
    80: {
        "half": {**_HALF, 256: (32, 4, 5)},
        "fp8": {**_HALF, 128: (64, 8, 4), 256: (32, 4, 5)},
        "float": {**_FLOAT, 128: (32, 4, 4), 256: (16, 8, 5)},
        "mixed": _MIXED,
    },
    90: {
        "half": {**_HALF, 256: (64, 8, 4)},
        "fp8": {**_HALF, 256: (64, 8, 4)},
        "float": {**_FLOAT, 256: (16, 4, 4)},
        "mixed": _MIXED,
    },
    100: {
        "half": {**_HALF, 256: (64, 8, 4)},
        "fp8": {**_HALF, 256: (64, 8, 4)},
        "float": {**_FLOAT, 256: (16, 4, 4)},
        "mixed": _MIXED,
    },
}


def kind_of(product: torch.dtype, kv: torch.dtype) -> str:
    """half and float: the cache is of the products' dtype; fp8 and mixed: it is converted in the kernel."""
    if product == torch.float32:
        return "float" if kv == torch.float32 else "mixed"
    return "fp8" if kv == torch.float8_e4m3fn else "half"


def padded_dim(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def product_dtype(q: torch.dtype, kv: torch.dtype) -> torch.dtype:
    """What products are taken in: q's dtype where the cache has it, too, or float8; else float32, and for
    bfloat16 under the interpreter, whose arithmetic works on bfloat16's raw bits."""
    if INTERPRETING and q == torch.bfloat16:
        return torch.float32
    return q if kv in (q, torch.float8_e4m3fn) else torch.float32


def tiling(arch: int, head_dim: int, group: int, product: torch.dtype, kv: torch.dtype, wide: bool) -> Tiling:
    """For an architecture, head_dim, query heads a kv head, the dtype that is multiplied and the cache's.

    `wide` tiles (prefill, shared prefixes) have more rows than those of decode. A token's bits depend on the
    rest of the tiling and not on `rows`, as long as there are fewer of them than keys."""
    table = TILINGS[arch][kind_of(product, kv)]
    padded = padded_dim(head_dim)
    if padded not in table:
        raise ValueError(f"paged_attention in Triton takes head_dim up to {max(table)}, got {head_dim}")
    keys, num_warps, num_stages = table[padded]
    rows = max(WIDE_ROWS if wide and keys > WIDE_ROWS else DECODE_ROWS, triton.next_power_of_2(group))
    return Tiling(rows, keys, num_warps, num_stages)


def takes_fp8_bits(arch: int, kv: torch.dtype) -> bool:
    """Whether kernels get a float8 cache as bytes: GPUs before sm_89 do not convert float8."""
    return kv == torch.float8_e4m3fn and arch < 90


def stored_splits(num_splits: int, split_bytes: int) -> int:
    """How many splits' partial results the workspace holds; split_bytes: of one split of all tokens."""
    return min(num_splits, WORKSPACE_BYTES // max(1, split_bytes))


def programs_for_splits(num_tiles: int, num_splits: int, split_bytes: int, device: torch.device) -> int:
    """How many programs share a tile's splits: enough for four a processor, since rows differ in length; more
    where a row may be so long that one program would be at it when all others are done. Depends on sizes that
    a captured graph fixes."""
    if stored_splits(num_splits, split_bytes) < num_splits:
        return 1
    fill = -(-4 * gpu.num_processors(device) // max(1, num_tiles))
    return min(num_splits, max(fill, -(-num_splits // WALK_AT_MOST)))


# A fold is a chain over splits: small programs, many results on their way.
FOLD_HEADS, FOLD_AHEAD = 1, 12
FOLD_OPTIONS: dict[str, Any] = {"num_warps": 1, **EXACT}
