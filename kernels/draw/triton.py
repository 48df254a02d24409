"""`draw` in Triton, for NVIDIA GPUs: the launches of `sample`, the second of which also steps the machine.

No GPU has run these kernels: they are compared with the reference under Triton's interpreter, and compiled
for sm_80, sm_90 and sm_100 (benchmarks/compile_triton.py). Nothing is tuned.

The scan advances the ring and passes over rows that do not run; for a row whose next token is forced it finds
lse only. The finish, a program a row, begins with all that the machine will need but the draw, so that those
loads overlap with the folding; what follows the draw is two dependent loads, the automaton's class and cell,
0.7 us. Beside the logits and what the scan leaves (kernels/sample/triton_scan.py) a row moves under 1 kB:
its words of the state there and back, a few of its program, six of its automaton, four of the ring.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ..budget import layout
from ..budget.triton_machine import is_forced, is_running, load_rows, step_rows
from ..gpu import why_no_triton
from ..sample import SamplingTable, triton_finish, triton_scan
from ..sample.triton import constants, scan, signature, sizes
from ..sample.triton_finish import finish_row
from . import Machine, Ring

why_unavailable = why_no_triton


@triton.jit(do_not_specialize=["ring_width"])
def _finish_kernel(
    state, programs, automata,
    ring_tokens, ring_flags, ring_logprobs, ring_sampling_logprobs, ring_index, ring_width,
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
    one = tl.arange(0, 1)  # the machine works on blocks: of one row here
    slot = tl.load(slots + row).to(tl.int64)
    its_slot = slot + one
    safe = tl.maximum(its_slot, 0)
    words = state + safe * layout.STATE_WORDS
    program = programs + safe * layout.PROGRAM_WORDS
    active = is_running(words, its_slot)
    loaded = load_rows(words, program, automata, active)
    if PDL:  # so far nothing that the scan writes
        tl.extra.cuda.gdc_wait()
    entry = tl.load(ring_index).to(tl.int64) * ring_width + row
    if tl.max(active.to(tl.int32), axis=0) > 0:
        drawing = active & (is_forced(words, active) == 0)
        token, lse, draw_logprob = finish_row(
            row, slot, tl.load(positions + row), tl.max(drawing.to(tl.int32), axis=0),
            logits, temperature, top_k, top_p, min_p, seed, sample_index, repetition, presence, frequency,
            ban_until, ban_ids, bias_ids, bias_values, output_counts, prompt_mask,
            partial, best_id, group_max, hot_groups, listed, listed_ids, vocab, num_tiles,
            PENALTIES, BANS, BIASES, BAN_PAD, BIAS_PAD, TILE, GROUP, TILE_PAD, GROUP_PAD, HOT, BLOCK,
            CAPACITY,
        )  # fmt: skip
        emitted, emitting, forced, flags = step_rows(
            words, program, automata, active, one * 0 + token, *loaded, ROWS=1, SHARED=True
        )
        tl.store(ring_flags + entry + one, flags)
        tl.store(ring_tokens + entry + one, emitted, mask=emitting)
        scored = emitting & (emitted >= 0) & (emitted < vocab)
        logit = tl.load(logits + row * vocab + emitted, mask=scored, other=0.0)
        scale = tl.load(temperature + slot)
        logprob = tl.div_rn(logit, tl.where(scale > 0, scale, 1.0) + tl.zeros_like(logit)) - lse
        tl.store(ring_logprobs + entry + one, tl.where(scored, logprob, -float("inf")), mask=emitting)
        draw_logprob = tl.where(forced, 0.0, draw_logprob)
        tl.store(ring_sampling_logprobs + entry + one, draw_logprob, mask=emitting)
        if PENALTIES:
            count = output_counts + slot * vocab + emitted
            counted = tl.load(count, mask=scored, other=0)
            tl.debug_barrier()  # every thread reads it, one writes it
            tl.store(count, counted + 1, mask=scored)
    else:
        tl.store(ring_flags + entry, 0)


def draw(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    table: SamplingTable,
    machine: Machine,
    ring: Ring,
) -> None:
    """See `kernels.draw.draw`; unchecked. Reads no tensor on the host."""
    length, width = ring.tokens.shape
    if logits.shape[0] == 0:
        ring.index.add_(1).remainder_(length)
        return
    arguments, named = scan(logits, slots, positions, table, machine.state, ring.index, length)
    _finish_kernel[(logits.shape[0],)](*machine, *ring, width, *arguments, **named, **triton_finish.OPTIONS)


def compile_cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """See benchmarks/compile_triton.py."""
    types = signature("i32:16") | dict.fromkeys(("ring_logprobs", "ring_sampling_logprobs"), "*fp32")
    types |= dict.fromkeys(("programs", "automata", "ring_tokens", "ring_flags"), "*i32")
    types["ring_width"] = "i32"
    few, many = constants(False, 0, 0), constants(True, 8, 16)
    for name, shared, dependent in (
        ("plain", few, False),
        ("every option", many, False),
        ("dependent on sm_90", few, True),
    ):
        for part, kernel, constexprs, options in (
            ("scan", triton_scan.scan_kernel, triton_scan.machine(True), triton_scan.OPTIONS),
            ("finish", _finish_kernel, sizes(75), triton_finish.OPTIONS),
        ):
            chosen = {key: types[key] for key in kernel.arg_names if key in types}
            constexprs = shared | constexprs | {"PDL": dependent}
            yield f"{part} {name}", kernel, chosen, constexprs, options | {"launch_pdl": dependent}
