"""Linear in Triton, for NVIDIA GPUs: few tokens at the speed of memory, many on the tensor cores.

No GPU has run this kernel: it is compared with the reference under Triton's interpreter and compiled for
sm_80, sm_90 and sm_100 (benchmarks/compile_triton.py). Nothing is tuned.

A tile is `outputs` rows of the weight by `tokens` rows of x, the weight on the side of the tensor cores'
fixed length, so that one token wastes no more than the other side's 16. Where a weight has too few rows to
fill the GPU, K is cut into splits: each goes to a program of its own, which leaves its sums in a workspace,
and the last to arrive at a tile adds them up, split by split. With many tokens the tiles fill the GPU: a
program then walks its splits and adds them up in that same order.

What makes a row's bits independent of the batch: the splits depend on N, K and the architecture; within one,
k advances in steps of 16, in order, one accumulator a result; and the tiles for few and for many tokens are
compiled to one kind of instruction: mma.sync m16n8k16 on sm_80, wgmma k16 on sm_90, tcgen05.mma k16 on
sm_100 (float32: fused multiply-adds), as their PTX says. What a GPU must confirm: that wgmma sums alike
whatever its n is, and tcgen05.mma also for 64 and 128 rows. tests/kernels/test_linear.py compares the bits of
1 to 257 tokens; under the interpreter it takes that for granted and tests the order of the rest.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..gpu import architecture, dependent_launch
from ..gpu import why_no_triton as why_unavailable

__all__ = ["compile_cases", "linear", "plan", "why_unavailable"]

EXACT: dict[str, Any] = {"enable_fp_fusion": False}  # roundings as written
INTERPRETING: bool = triton.knobs.runtime.interpret
TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Tile(NamedTuple):
    """What a program computes: outputs x tokens, `depth` of K at a time, that many loads ahead."""

    outputs: int
    tokens: int
    depth: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # a thread's where splits are spread: adding up would take more


class Tiles(NamedTuple):
    """An architecture's. Splits are made as if it had `processors`, however many the GPU has."""

    processors: int
    half: tuple[Tile, ...]  # bfloat16 and float16: the first whose tokens are enough, else the last
    float: tuple[Tile, ...]
    wide: Tile | None = None  # for more than WIDE_TOKENS of a weight that is not split: twice the sums


# By arithmetic, not by measurement: 3.3 TB/s at 0.7 us from memory need 2.3 MB in flight, 18 kB on each of
# 132 processors, and twice that for comfort. A stage of the first tile is 16 kB of weights and 4 kB of x;
# three stages, 61 kB, let three programs onto a processor, with two stages of each in flight. On sm_90, for
# DeepSeek-R1-Distill-Qwen-1.5B:
#
#   weight       rows x K       tiles  splits  programs  a processor       weights in flight, MB
#   qkv          2048 x 1536       32       6       192  1.5               all 6.3
#   o            1536 x 1536       24       6       144  1.1               all 4.7
#   gate_up     17920 x 1536      280       1       280  2.1               9.2 of 55
#   down         1536 x 8960       24      10       240  1.8               7.9 of 28
#   lm_head    151936 x 1536     2374       1      2374  18: six waves     13 of 467
#
# Three programs a processor, not two, keep gate_up's 280 tiles from needing a second wave. The second tile,
# of 17 to 64 tokens, does so with stages half as deep (sm_100 has processors enough for two). The third, for
# compute, has two; the wide one for prefill has one, and asks the L2 cache for a quarter fewer bytes. sm_80
# buffers a stage less: mma.sync reads registers.
TILES: dict[int, Tiles] = {
    80: Tiles(
        108,
        (Tile(64, 16, 128, 4, 3), Tile(64, 64, 64, 4, 4), Tile(128, 128, 32, 8, 4)),
        (Tile(64, 16, 32, 4, 3), Tile(64, 32, 32, 4, 3)),
    ),
    90: Tiles(
        132,
        (Tile(64, 16, 128, 4, 3), Tile(64, 64, 64, 4, 4), Tile(128, 128, 64, 8, 3, 128)),
        (Tile(64, 16, 32, 4, 3), Tile(64, 32, 32, 4, 3)),
        Tile(128, 256, 64, 8, 3),
    ),
    100: Tiles(
        148,
        (Tile(64, 16, 128, 4, 3), Tile(64, 64, 128, 4, 3), Tile(128, 128, 64, 8, 3, 128)),
        (Tile(64, 16, 32, 4, 3), Tile(64, 32, 32, 4, 3)),
        Tile(128, 256, 64, 8, 3),
    ),
}
SPLIT_ROWS = 64  # the tiles that `splits` counts; of them and SPLIT_DEPTH all bits depend
SPLIT_DEPTH = 128  # splits begin at multiples; a multiple of every tile's depth
MAX_SPLITS = 16
PREFETCH = 512  # 16 to 18 MB of a weight in all: what memory brings in 5 us
WIDE_TOKENS = 256
SPREAD_TOKENS = 512  # from more tokens on, reading and writing partial sums costs more than it gains


@cache
def splits(outputs: int, inputs: int, arch: int) -> tuple[int, int]:
    """How many splits K is cut into, and their length (the last may be shorter).

    One where the tiles of few tokens reach every processor; else enough for two programs a processor, of two
    steps at least.
    """
    processors = TILES[arch].processors
    tiles, steps = triton.cdiv(outputs, SPLIT_ROWS), max(1, triton.cdiv(inputs, SPLIT_DEPTH))
    count = 1
    if 0 < tiles < processors:
        count = max(1, min(triton.cdiv(2 * processors, tiles), steps // 2, MAX_SPLITS))
    length = triton.cdiv(steps, count)
    return triton.cdiv(steps, length), length * SPLIT_DEPTH


class Plan(NamedTuple):
    tile: Tile
    splits: int
    split_length: int
    spread: bool  # splits go to programs of their own


def plan(tokens: int, outputs: int, inputs: int, dtype: torch.dtype, arch: int) -> Plan:
    """How `linear` cuts up a call. `splits` and `split_length` do not depend on `tokens`; nothing else of a
    plan can change a bit of the result."""
    count, length = splits(outputs, inputs, arch)
    _, half, full, wide = TILES[arch]
    table = full if dtype == torch.float32 else half
    tile = next((tile for tile in table if tokens <= tile.tokens), table[-1])
    if wide and count == 1 and tokens > WIDE_TOKENS and dtype != torch.float32:
        tile = wide
    tiles = triton.cdiv(outputs, tile.outputs) * triton.cdiv(tokens, tile.tokens)
    spread = count > 1 and tokens <= SPREAD_TOKENS and tiles < TILES[arch].processors
    return Plan(tile, count, length, spread)


@triton.jit
def _sum_split(
    x_at,
    weight_at,
    token_live,
    row_live,
    first,
    end,
    EVEN: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums over k from first to end, [BLOCK_N, BLOCK_T]. EVEN: BLOCK_K divides end - first."""
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for k in range(first, end, BLOCK_K):
        w_mask = row_live[:, None]
        x_mask = token_live[:, None]
        if not EVEN:
            inside = (tl.arange(0, BLOCK_K) < end - k)[None, :]
            w_mask &= inside
            x_mask &= inside
        w = tl.load(weight_at + k, mask=w_mask, other=0.0).to(PRODUCT)
        x = tl.load(x_at + k, mask=x_mask, other=0.0).to(PRODUCT)
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    return acc


@triton.jit
def _prefetch(at, length):
    """Has `length` elements behind each pointer brought to the L2 cache; both in units of 16 bytes."""
    size: tl.constexpr = at.dtype.element_ty.primitive_bitwidth // 8
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
        "=r,l,r",
        [at.to(tl.int64), tl.zeros_like(at.to(tl.int64)).to(tl.int32) + length * size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _finish(out, bias, total, at, rows, row_live, live, BIAS: tl.constexpr):
    if BIAS:
        total += tl.load(bias + rows, mask=row_live, other=0.0).to(tl.float32)[:, None]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=("num_tokens",))
def _linear_kernel(
    out,
    x,
    weight,
    bias,
    partial,  # float32 [tiles, SPLITS, BLOCK_T, BLOCK_N], where SPREAD
    arrived,  # int32, a counter a tile, where SPREAD; 0 before and after
    num_tokens,
    num_outputs,
    num_inputs,
    weight_stride,
    split_length,
    SPLITS: tl.constexpr,
    SPREAD: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,  # so much of each row's split while the kernel before runs, where PDL; 0: nothing
):
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_live = tokens < num_tokens
    row_live = rows < num_outputs
    columns = tl.arange(0, BLOCK_K)[None, :]
    x_at = x + tokens.to(tl.int64)[:, None] * num_inputs + columns
    weight_at = weight + rows.to(tl.int64)[:, None] * weight_stride + columns
    live = row_live[:, None] & token_live[None, :]
    at = tokens.to(tl.int64)[None, :] * num_outputs + rows[:, None]

    first = 0
    if SPREAD:
        first = tl.program_id(2) * split_length
    end = num_inputs
    if SPLITS > 1:
        end = tl.minimum(first + split_length, num_inputs)
    if PDL:
        if PREFETCH > 0:
            row = tl.minimum(rows, num_outputs - 1).to(tl.int64)
            _prefetch(weight + row * weight_stride + first, tl.minimum(end - first, PREFETCH))
        tl.extra.cuda.gdc_wait()
    total = _sum_split(
        x_at, weight_at, token_live, row_live, first, end, EVEN, PRODUCT, BLOCK_N, BLOCK_T, BLOCK_K
    )
    if PDL:  # not sooner: what the next kernel prefetches would leave the cache before it is read
        tl.extra.cuda.gdc_launch_dependents()
    if SPREAD:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        size: tl.constexpr = BLOCK_N * BLOCK_T
        inside = tl.arange(0, BLOCK_T)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        present = token_live[None, :]
        sums = partial + tile.to(tl.int64) * (SPLITS * size) + inside
        tl.store(sums + tl.program_id(2) * size, total, mask=present)
        tl.debug_barrier()  # every thread's sums are stored before one thread says so
        before = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu")
        if before == SPLITS - 1:
            tl.store(arrived + tile, 0)  # for the next call
            total = tl.load(sums, mask=present, other=0.0, cache_modifier=".cg")
            if BLOCK_T <= 16:  # few registers: all loads at once
                for split in tl.static_range(1, SPLITS):
                    total += tl.load(sums + split * size, mask=present, other=0.0, cache_modifier=".cg")
            else:
                for split in tl.range(1, SPLITS, num_stages=1):
                    total += tl.load(sums + split * size, mask=present, other=0.0, cache_modifier=".cg")
            _finish(out, bias, total, at, rows, row_live, live, BIAS)
        return
    if SPLITS > 1:
        for begin in range(split_length, num_inputs, split_length):
            end = tl.minimum(begin + split_length, num_inputs)
            total += _sum_split(
                x_at, weight_at, token_live, row_live, begin, end, EVEN, PRODUCT, BLOCK_N, BLOCK_T, BLOCK_K
            )
    _finish(out, bias, total, at, rows, row_live, live, BIAS)


# Counters of the programs that have arrived at each tile, a stream's and a weight's own: engines that run at
# the same time on streams of their own do not meet. Each call leaves zeros, so one allocation serves whatever
# weight later lies at that address.
_arrived: dict[tuple[torch.device, int, int], torch.Tensor] = {}


def _counters(weight: torch.Tensor) -> torch.Tensor:
    stream = torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else 0
    key = weight.device, stream, weight.data_ptr()
    found = _arrived.get(key)
    if found is None:
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "linear must have run once with this weight, on this stream, before a CUDA graph is captured "
                "around it"
            )
        count = max(tiles.processors for tiles in TILES.values())
        found = _arrived[key] = torch.zeros(count, dtype=torch.int32, device=weight.device)
    return found


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See the package's `linear`."""
    tokens, inputs = x.shape
    outputs = weight.shape[0]
    if out is None:
        out = x.new_empty((tokens, outputs), dtype=out_dtype)
    if tokens == 0 or outputs == 0:
        return out
    tile, count, length, spread = plan(tokens, outputs, inputs, x.dtype, architecture(x.device))
    across, down = triton.cdiv(tokens, tile.tokens), triton.cdiv(outputs, tile.outputs)
    partial = arrived = out
    if count > 1:
        arrived = _counters(weight)  # here whatever the batch: a later one may be captured
    if spread:
        sums = across * down * count * tile.outputs * tile.tokens
        partial = torch.empty(sums, dtype=torch.float32, device=x.device)
    _linear_kernel[(across, down, count if spread else 1)](
        out,
        x,
        weight,
        x if bias is None else bias,
        partial,
        arrived,
        tokens,
        outputs,
        inputs,
        weight.stride(0),
        length,
        **_constants(tile, count, spread, inputs, bias is not None, x.dtype),
        PREFETCH=PREFETCH if _is_aligned(weight, inputs) else 0,
        **_options(tile, spread),
        **dependent_launch(x.device),
    )
    return out


def _is_aligned(weight: torch.Tensor, inputs: int) -> bool:
    """Whether every row, and what there is of it to read, is whole units of 16 bytes."""
    bits = weight.data_ptr() | weight.stride(0) * weight.element_size() | inputs * weight.element_size()
    return bits % 16 == 0


def _constants(
    tile: Tile, count: int, spread: bool, inputs: int, biased: bool, dtype: torch.dtype
) -> dict[str, Any]:
    # The interpreter computes with bfloat16's raw bits.
    widened = INTERPRETING and dtype == torch.bfloat16
    return {
        "SPLITS": count,
        "SPREAD": spread,
        "EVEN": inputs % tile.depth == 0,
        "BIAS": biased,
        "PRODUCT": tl.float32 if widened else TL_DTYPES[dtype],
        "BLOCK_N": tile.outputs,
        "BLOCK_T": tile.tokens,
        "BLOCK_K": tile.depth,
    }


def _options(tile: Tile, spread: bool) -> dict[str, Any]:
    launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **EXACT}
    return {**launch, "maxnreg": tile.max_registers} if spread and tile.max_registers else launch


def compile_cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """See benchmarks/compile_triton.py. Weights of DeepSeek-R1-Distill-Qwen-1.5B, as each GPU cuts them."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    for label, outputs, inputs, tokens, dtype, biased in (
        ("decode qkv", 2048, 1536, 1, torch.bfloat16, True),
        ("decode o", 1536, 1536, 1, torch.float16, False),
        ("decode gate_up", 17920, 1536, 1, torch.bfloat16, False),
        ("decode gate_up", 17920, 1536, 64, torch.bfloat16, False),
        ("decode gate_up", 17920, 1536, 256, torch.bfloat16, False),
        ("decode down", 1536, 8960, 1, torch.bfloat16, False),
        ("decode down", 1536, 8960, 64, torch.bfloat16, False),
        ("decode down", 1536, 8960, 256, torch.bfloat16, False),
        ("decode uneven", 17920, 1568, 64, torch.bfloat16, False),
        ("decode o", 1536, 1536, 1, torch.float32, False),
        ("prefill o", 1536, 1536, 2048, torch.bfloat16, False),
        ("prefill gate_up", 17920, 1536, 2048, torch.bfloat16, False),
    ):
        signature = {
            **dict.fromkeys(("out", "x", "weight", "bias"), f"*{names[dtype]}"),
            "partial": "*fp32",
            "arrived": "*i32",
            "num_tokens": "i32",
            **dict.fromkeys(("num_outputs", "num_inputs", "weight_stride", "split_length"), "i32:16"),
        }
        for arch, dependent in (*((arch, False) for arch in TILES), (90, True)):
            tile, count, _, spread = plan(tokens, outputs, inputs, dtype, arch)
            constants = _constants(tile, count, spread, inputs, biased, dtype)
            constants |= {"PDL": dependent, "PREFETCH": PREFETCH}
            options = {**_options(tile, spread), "launch_pdl": dependent}
            name = f"{label} {names[dtype]} T={tokens}{' dependent' if dependent else ''} on sm_{arch}"
            if not dependent or tokens == 1:
                yield name, _linear_kernel, signature, constants, options
