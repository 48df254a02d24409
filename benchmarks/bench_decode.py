"""Decode throughput of the engine beside Hugging Face `generate`, over the very same weights, in alternating
pairs.

    make bench                                    # the small and the 0.5B shape, batch 1, 8, 32, bfloat16
    make bench ARGS="--shapes small --batch 1"
    make gpu-bench WHAT=decode                    # on a GPU: decode_window.py, which takes over there

Prompt 64 tokens, then `--new` tokens a row, greedy, EOS ignored; the engine thinks for half of them under a
budget that forces the close, and solves for the rest, so the budget machine is part of what is timed. Decode
tokens/s counts from the first new token to the last: prefill is in neither engine's figure. The engine shares
the module's weights (Engine.from_model), so one copy is in memory. `budget_share` is the budget step's own
median time over the whole step's.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from typing import Any

import decode_window
import harness
import shapes
import torch
import transformers
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from elastic_decode import Budget, Engine, EngineConfig, Request, SamplingParams
from elastic_decode.assets import tiny_model_path
from elastic_decode.kernels import registry
from elastic_decode.kernels.draw import make_ring

PROMPT = 64


class Clock(StoppingCriteria):
    """Never stops anything; notes when each new token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def run_hf(model: Any, prompts: torch.Tensor, new: int) -> float:
    clock = Clock()
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    assert len(clock.times) == new
    return (new - 1) * len(prompts) / (clock.times[-1] - clock.times[0])


def run_engine(engine: Engine, prompts: torch.Tensor, new: int) -> float:
    think = new // 2
    sampling = SamplingParams(temperature=0, ignore_eos=True)
    for prompt in prompts.tolist():
        engine.submit(Request(prompt, budget=Budget(think=think, solve=new - think - 1), sampling=sampling))
    started = count = 0.0
    while engine.has_work:
        events = len(engine.step())
        if started == 0.0:
            stats = engine.stats()
            if not stats["waiting"] and not stats["prefilling"]:
                started = time.perf_counter()  # every prompt is computed: from here on it is decoding
        else:
            count += events
    return count / (time.perf_counter() - started)


def budget_share(engine: Engine, prompts: torch.Tensor, new: int) -> tuple[float, float]:
    """(median microseconds of a decode step, of the budget step within it).

    `draw` samples and steps the machine in one; so the machine's step is run and timed once more before each
    draw, on a copy of its state and with the token to be drawn.
    """
    loop = engine._loop
    steps: list[float] = []
    budgets: list[float] = []
    whole, draw = loop._step, loop._draw
    sample = registry.implementation("sample", "cpu")
    budget_step = registry.implementation("budget", "cpu", "budget_step")
    ring = make_ring(1, len(prompts))
    ring.index.zero_()

    aside: list[float] = []  # what measuring took out of each step

    def timed_step(*args: Any) -> None:
        before = len(aside)
        begun = time.perf_counter()
        whole(*args)
        steps.append(time.perf_counter() - begun - sum(aside[before:]))

    def timed_draw(logits: Any, slots: Any, positions: Any, table: Any, machine: Any, out: Any) -> None:
        entered = time.perf_counter()
        drawn = sample(logits, slots, positions, table)
        state = machine.state.clone()
        rows = (state, machine.programs, machine.automata, slots, drawn.token, logits, drawn.lse)
        more = (drawn.sampling_logprob, table.temperature, *ring)
        begun = time.perf_counter()
        budget_step(*rows, *more)
        done = time.perf_counter()
        budgets.append(done - begun)
        aside.append(done - entered)
        draw(logits, slots, positions, table, machine, out)

    loop._step, loop._draw = timed_step, timed_draw  # type: ignore[method-assign]
    try:
        run_engine(engine, prompts, new)
    finally:
        loop._step, loop._draw = whole, draw  # type: ignore[method-assign]
    return harness.median(steps) * 1e6, harness.median(budgets) * 1e6


def bench_shape(name: str, tokenizer: Any, arguments: argparse.Namespace) -> None:
    """One row a batch size."""
    model = harness.random_qwen2(name, getattr(torch, arguments.dtype))
    config = EngineConfig(
        dtype=arguments.dtype,
        max_batch=max(arguments.batch),
        max_model_len=PROMPT + arguments.new + 8,
        kv_memory="1GiB",
        prefill_tokens=PROMPT * max(arguments.batch),  # all rows begin to decode together
        horizon=arguments.horizon,
    )
    with Engine.from_model(model, tokenizer, config) as engine:
        for batch in arguments.batch:
            # Past the tokenizer's ids: nothing in the prompt can be a delimiter.
            prompts = torch.randint(1000, shapes.SHAPES[name]["vocab_size"], (batch, PROMPT))
            run_engine(engine, prompts, 8)
            run_hf(model, prompts, 8)
            ours, theirs = harness.paired(
                partial(run_engine, engine, prompts, arguments.new),
                partial(run_hf, model, prompts, arguments.new),
                arguments.rounds,
            )
            ratio = harness.median([a / b for a, b in zip(ours, theirs, strict=True)])
            step, budget = budget_share(engine, prompts, min(arguments.new, 32))
            row = {
                "bench": "decode",
                "shape": name,
                "dtype": arguments.dtype,
                "batch": batch,
                "prompt": PROMPT,
                "new": arguments.new,
                "horizon": arguments.horizon,
                "engine_tokens_per_s": round(harness.median(ours), 1),
                "hf_tokens_per_s": round(harness.median(theirs), 1),
                "ratio": round(ratio, 2),
                "pairs": arguments.rounds,
                "step_us": round(step, 1),
                "budget_us": round(budget, 2),
                "budget_share": round(budget / step, 5),
                **harness.facts(),
            }
            print(
                f"{name:8} {batch:5} {row['engine_tokens_per_s']:10} {row['hf_tokens_per_s']:10} "
                f"{ratio:7.2f} "
                f"{step:9.0f} {budget:9.2f} {row['budget_share']:7.2%}",
                flush=True,
            )
            if not arguments.dry:
                harness.append(row)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:2] == ["--device", "cuda"]:
        return decode_window.main(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["small", "0.5B"], choices=list(shapes.SHAPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--new", type=int, default=64, help="new tokens a row (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="pairs (default: 3)")
    parser.add_argument("--horizon", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="print only; append nothing to benchmarks/results")
    arguments = parser.parse_args(argv)

    # its delimiters are among the ids
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_path())
    print(
        f"{'shape':8} {'batch':>5} {'engine':>10} {'HF':>10} {'ratio':>7} {'step us':>9} {'budget us':>9} "
        f"{'share':>7}"
    )
    for name in arguments.shapes:
        bench_shape(name, tokenizer, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
