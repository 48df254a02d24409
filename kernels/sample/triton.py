"""`sample` in Triton, for NVIDIA GPUs: two launches, whatever the options (triton_scan.py, triton_finish.py).

No GPU has run these kernels: they are compared with the reference under Triton's interpreter, and compiled
for sm_80, sm_90 and sm_100 (benchmarks/compile_triton.py). Nothing is tuned.

A single launch with a program a row would leave most of the GPU idle at the batches of decoding. Tiles and
the order of folding depend on the vocabulary alone: a row's bits do not depend on the batch.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..gpu import dependent_launch, why_no_triton
from . import Sampled, SamplingTable, empty, triton_finish, triton_scan
from .triton_finish import finish_row

TABLE = SamplingTable._fields

why_unavailable = why_no_triton


class Work(NamedTuple):
    """What the scan leaves for the finish, and the finish's own lists; R rows, T tiles."""

    partial: torch.Tensor  # float32 [R, 5, T]
    best_id: torch.Tensor  # int32 [R, T]
    group_max: torch.Tensor  # float32 [R, T * TILE / GROUP]
    hot_groups: torch.Tensor  # int32 [R, T * TILE / GROUP + 1]
    listed: torch.Tensor  # float32 [R, CAPACITY]
    listed_ids: torch.Tensor  # int32 [R, CAPACITY]


def work_space(rows: int, tiles: int, device: torch.device) -> Work:
    def space(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    groups, capacity = tiles * triton_scan.TILE // triton_scan.GROUP, triton_finish.CAPACITY
    return Work(
        space(torch.float32, rows, 5, tiles),
        space(torch.int32, rows, tiles),
        space(torch.float32, rows, groups),
        space(torch.int32, rows, groups + 1),
        space(torch.float32, rows, capacity),
        space(torch.int32, rows, capacity),
    )


@triton.jit
def _finish_kernel(
    token_out, lse_out, logprob_out,
    logits, slots, positions,
    temperature, top_k, top_p, min_p, seed, sample_index, repetition, presence, frequency,
    ban_until, ban_ids, bias_ids, bias_values, output_counts, prompt_mask,
    partial, best_id, group_max, hot_groups, listed, listed_ids, vocab, num_tiles,
    PENALTIES: tl.constexpr, BANS: tl.constexpr, BIASES: tl.constexpr,
    BAN_PAD: tl.constexpr, BIAS_PAD: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
    TILE_PAD: tl.constexpr, GROUP_PAD: tl.constexpr, HOT: tl.constexpr, BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = -1
    lse = 0.0
    logprob = 0.0
    if slot >= 0:
        token, lse, logprob = finish_row(
            row, slot, tl.load(positions + row), 1,
            logits, temperature, top_k, top_p, min_p, seed, sample_index, repetition, presence, frequency,
            ban_until, ban_ids, bias_ids, bias_values, output_counts, prompt_mask,
            partial, best_id, group_max, hot_groups, listed, listed_ids, vocab, num_tiles,
            PENALTIES, BANS, BIASES, BAN_PAD, BIAS_PAD, TILE, GROUP, TILE_PAD, GROUP_PAD, HOT, BLOCK,
            CAPACITY,
        )  # fmt: skip
    tl.store(token_out + row, token)
    tl.store(lse_out + row, lse)
    tl.store(logprob_out + row, logprob)


def scan(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    table: SamplingTable,
    state: torch.Tensor | None = None,
    ring_index: torch.Tensor | None = None,
    ring_length: int = 1,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first launch, of one row or more; returns the arguments of the second, positional and by name.

    With `state`, rows that have finished are idle, forced ones get lse only, and ring_index is advanced.
    """
    rows, vocab = logits.shape
    shared = constants(table.output_counts is not None, table.ban_ids.shape[1], table.bias_ids.shape[1])
    tiles = triton.cdiv(vocab, triton_scan.TILE)
    each = triton_scan.tiles_a_program(rows, tiles, logits.device)
    work = work_space(rows, tiles, logits.device)
    common = (logits, slots, positions, *(logits if part is None else part for part in table))
    launch = dependent_launch(logits.device)
    triton_scan.scan_kernel[(triton.cdiv(tiles, each), rows)](
        *common,
        slots if state is None else state,
        slots if ring_index is None else ring_index,
        ring_length,
        *work[:3],
        vocab,
        tiles,
        each,
        **shared,
        **triton_scan.machine(state is not None),
        **triton_scan.OPTIONS,
        **launch,
    )
    return (*common, *work, vocab, tiles), shared | sizes(tiles) | launch


def sample(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    table: SamplingTable,
    *,
    out: Sampled | None = None,
) -> Sampled:
    """See `kernels.sample.sample`; unchecked. Reads no tensor on the host."""
    if out is None:
        out = empty(logits)
    if logits.shape[0] > 0:
        arguments, named = scan(logits, slots, positions, table)
        _finish_kernel[(logits.shape[0],)](*out, *arguments, **named, **triton_finish.OPTIONS)
    return out


def constants(penalties: bool, bans: int, biases: int) -> dict[str, Any]:
    """The constexprs that both launches take."""
    return {
        "PENALTIES": penalties,
        "BANS": bans,
        "BIASES": biases,
        "BAN_PAD": triton.next_power_of_2(max(1, bans)),
        "BIAS_PAD": triton.next_power_of_2(max(1, biases)),
        "TILE": triton_scan.TILE,
        "GROUP": triton_scan.GROUP,
    }


def sizes(tiles: int) -> dict[str, Any]:
    """The constexprs of the second launch alone."""
    return {
        "TILE_PAD": triton.next_power_of_2(tiles),
        "GROUP_PAD": triton.next_power_of_2(tiles * triton_scan.TILE // triton_scan.GROUP),
        "HOT": triton_finish.HOT,
        "BLOCK": triton_finish.BLOCK,
        "CAPACITY": triton_finish.CAPACITY,
    }


def compile_cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """See benchmarks/compile_triton.py."""
    results = {"token_out": "*i32", "lse_out": "*fp32", "logprob_out": "*fp32"}
    for name, shared in (("plain", constants(False, 0, 0)), ("every option", constants(True, 8, 16))):
        for suffix, kind in (("", "i32:16"), (" odd vocabulary", "i32")):
            types = signature(kind)
            kernel = triton_scan.scan_kernel
            constexprs = shared | triton_scan.machine(False) | {"PDL": False}
            chosen = {key: types[key] for key in kernel.arg_names if key in types}
            yield f"scan {name}{suffix}", kernel, chosen, constexprs, triton_scan.OPTIONS
        chosen = {key: (types | results)[key] for key in _finish_kernel.arg_names if key in types | results}
        constexprs = shared | sizes(75) | {"PDL": False}
        yield f"finish {name}", _finish_kernel, chosen, constexprs, triton_finish.OPTIONS


def signature(vocab: str) -> dict[str, str]:
    """The types of the arguments of both launches, here and in `draw`."""
    floats = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency", "bias_values")
    types = {name: "*fp32" if name in floats else "*i32" for name in TABLE}
    types |= {"seed": "*i64", "prompt_mask": "*u8"}
    types |= dict.fromkeys(("logits", "partial", "group_max", "listed"), "*fp32")
    integers = ("slots", "positions", "best_id", "hot_groups", "listed_ids", "state", "ring_index")
    types |= dict.fromkeys(integers, "*i32")
    return types | {"vocab": vocab, "num_tiles": "i32", "tiles_a_program": "i32", "ring_length": "i32"}
