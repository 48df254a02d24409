"""One decode step captured in a CUDA graph: with `draw`, with `sample` in its place, and without either.

The difference of the first two is what the budget machine costs a step; the first is what a perfect host
would decode with. Rows stand still: every replay computes the same position again.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import floors
import op_cases
import torch
from timing import Replayable, Timing, samples_in_turn, summary

from elastic_decode.kernels import registry
from elastic_decode.kernels.draw import make_ring
from elastic_decode.kernels.sample import make_table
from elastic_decode.models.decoder import Decoder, ForwardBatch
from elastic_decode.models.layout import Weights

PAGE = 16


def measure_step(
    decoder: Decoder,
    weights: Weights,
    backends: Mapping[str, str],
    rows: int,
    context: int,
    *,
    seconds: float = 0.3,
) -> tuple[Timing, Timing, Timing]:
    """(a step with `draw`, the same with `sample` only, their difference), `rows` rows of `context` keys."""
    config, device, dtype = decoder.config, weights.device, weights.dtype
    per_row = -(-context // PAGE)
    shape = (2, rows * per_row, PAGE, config.num_kv_heads, config.head_dim)
    layers = [torch.randn(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
    kv_pages = [(cache[0], cache[1]) for cache in layers]
    page_table = torch.randperm(rows * per_row, device=device).int().view(rows, per_row)
    position = torch.full((rows,), context - 1, device=device, dtype=torch.int32)
    batch = ForwardBatch(
        positions=position,
        slot_mapping=page_table[:, -1] * PAGE + (context - 1) % PAGE,
        page_table=page_table,
        seq_lens=position + 1,
        query_start=torch.arange(rows + 1, device=device, dtype=torch.int32),
    )
    slots = torch.arange(rows, device=device, dtype=torch.int32)
    token = torch.randint(0, config.vocab_size, (rows,), device=device, dtype=torch.int32)
    machine, ring = op_cases.budget_tables(rows, config.vocab_size, device), make_ring(64, rows, device)
    table = make_table(rows, device=device)
    table.temperature.fill_(0.6)
    logits = torch.empty((rows, config.vocab_size), device=device)
    draw = registry.implementation("draw", backends)
    sample = registry.implementation("sample", backends)
    inputs = registry.implementation("budget", backends, "decode_inputs")
    scratch = [torch.empty_like(token) for _ in range(4)]

    def forward() -> None:
        inputs(machine.state, page_table, slots, PAGE, *scratch)
        decoder.logits(decoder.forward(token, batch, kv_pages), out=logits)

    def with_draw() -> None:
        forward()
        draw(logits, slots, batch.seq_lens, table, machine, ring)

    def with_sample() -> None:
        forward()
        sample(logits, slots, batch.seq_lens, table)

    captured = [Replayable([work], device) for work in (with_draw, with_sample)]
    drawn, sampled = samples_in_turn(captured, seconds=seconds)
    added = [a - b for a, b in zip(drawn, sampled, strict=True)]
    return summary(drawn), summary(sampled), summary(added)


def step_row(
    decoder: Decoder,
    weights: Weights,
    backends: Mapping[str, str],
    rows: int,
    context: int,
    rates: floors.Rates,
    **options: Any,
) -> dict[str, Any]:
    """What is measured, beside floor and prediction, as a row."""
    drawn, sampled, added = measure_step(decoder, weights, backends, rows, context, **options)
    size = weights.dtype.itemsize
    floor = floors.step_floor_us(decoder.config, rows, context, rates, size=size)
    return {
        "bench": "step",
        "batch": rows,
        "context": context,
        "backends": dict(backends),
        "us": round(drawn.us, 2),
        "us_low": round(drawn.low, 2),
        "us_high": round(drawn.high, 2),
        "without_budget_us": round(sampled.us, 2),
        "budget_us": round(added.us, 2),
        "budget_us_low": round(added.low, 2),
        "budget_us_high": round(added.high, 2),
        "budget_share": round(added.us / drawn.us, 5),
        "floor_us": round(floor, 2),
        "of_floor": round(floor / drawn.us, 3),
        "predicted_us": round(floors.step_predicted_us(decoder.config, rows, context, rates, size=size), 2),
        "tokens_per_s": round(rows / drawn.us * 1e6, 1),
    }


def make(
    decoder_config: Any, weights: Weights, backends: Mapping[str, str], max_positions: int
) -> partial[dict[str, Any]]:
    """step_row of one model."""
    decoder = Decoder(decoder_config, weights, backend=backends, max_positions=max_positions)
    return partial(step_row, decoder, weights, backends)
