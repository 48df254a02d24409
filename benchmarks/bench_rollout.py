"""Rollouts of the bundled model under budgets: the engine beside two calls of transformers' `generate`, in
alternating pairs over the same weights and prompts.

    make bench-rollout                                     # batches of 64, think budgets 15, 45 and 200
    make bench-rollout ARGS="--budgets 15/3 --rounds 5"

A round decodes fresh Countdown-lite problems, groups of eight samples, at temperature 1, as a trainer does:
one batch of 64 rows for both, and (`--rows 256`) a step of the toy recipe, which the engine has to decode in
64 slots and `generate` may decode as it likes best: in batches of 64, and all at once. Both must have drawn
from the same distribution: mean tokens and accuracy come with their differences in standard errors, over
problems. Times are of wall and of processor. `generate` is used as peers/hf_budgets.py says.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import harness
import torch
import transformers
from peers import hf_budgets

from elastic_decode import Budget, Engine, EngineConfig, SamplingParams
from elastic_decode.assets import tiny_model_path
from elastic_decode.tasks import countdown

GROUP = 8
LONGEST = 256


@dataclass
class Figures:
    """What one side's rounds came to: seconds of wall and of processor a round; a problem's mean tokens and
    accuracy over its group.
    """

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)

    @contextmanager
    def timed(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    def add(self, problems: list[countdown.Problem], outputs: list[list[int]], solutions: list[str]) -> None:
        for place, problem in enumerate(problems):
            part = slice(place * GROUP, (place + 1) * GROUP)
            self.tokens.append(statistics.mean(len(output) for output in outputs[part]))
            self.right.append(statistics.mean(countdown.grade(problem, text) for text in solutions[part]))


def run_engine(engine: Engine, prompts: list[list[int]], budget: Budget, seed: int) -> list[Any]:
    """Completions in the prompts' order."""
    sampling = [SamplingParams(temperature=1.0, seed=seed * len(prompts) + at) for at in range(len(prompts))]
    done = list(engine.rollout(prompts, n=GROUP, budget=budget, sampling=sampling))
    done.sort(key=lambda generation: generation.index)
    return [completion for generation in done for completion in generation.completions]


def run_hf(
    model: Any, prompts: list[list[int]], budget: Budget, ids: hf_budgets.Ids, batch: int
) -> list[list[int]]:
    """Outputs of every prompt, GROUP times each."""
    rows = [prompt for prompt in prompts for _ in range(GROUP)]
    assert budget.think is not None
    assert budget.solve is not None
    outputs = []
    for at in range(0, len(rows), batch):
        some = rows[at : at + batch]
        outputs += hf_budgets.generate(model, some, think=budget.think, solve=budget.solve, ids=ids)
    return [output.ids for output in outputs]


def apart(first: list[float], second: list[float]) -> float:
    """The difference of means of pairs, in standard errors."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences) / error if error else 0.0


def bench(
    engine: Engine,
    model: Any,
    tokenizer: Any,
    budget: Budget,
    *,
    rows: int,
    batch: int,
    rounds: int,
    seed: int,
) -> dict[str, Any]:
    """A row: `rows` samples a round, of which `generate` has `batch` in a call."""
    ids = hf_budgets.Ids.of(tokenizer, countdown.CLOSE)
    ours, theirs = Figures(), Figures()

    def ours_once(problems: list[countdown.Problem], prompts: list[list[int]], number: int) -> None:
        with ours.timed():
            completions = run_engine(engine, prompts, budget, number)
        ours.add(problems, [c.token_ids for c in completions], [c.solution for c in completions])

    def theirs_once(problems: list[countdown.Problem], prompts: list[list[int]], number: int) -> None:
        torch.manual_seed(number)
        with theirs.timed():
            outputs = run_hf(model, prompts, budget, ids, batch)
        answers = [[t for t in output[output.index(ids.close) + 1 :] if t != ids.eos] for output in outputs]
        theirs.add(problems, outputs, [tokenizer.decode(answer) for answer in answers])

    for number in range(rounds + 1):
        problems = countdown.sample("train", rows // GROUP, 1000 * seed + number)
        prompts = [engine.encode(problem.chat) for problem in problems]
        for side in (ours_once, theirs_once)[:: 1 if number % 2 else -1]:
            side(problems, prompts, number)
    # The first round warms up.
    ratio, cpu_ratio = (
        harness.median([b / a for a, b in zip(mine[1:], other[1:], strict=True)])
        for mine, other in ((ours.seconds, theirs.seconds), (ours.cpu, theirs.cpu))
    )
    return {
        "bench": "rollout",
        "think": budget.think,
        "solve": budget.solve,
        "rows": rows,
        "slots": engine.config.max_batch,
        "hf_batch": batch,
        "rounds": rounds,
        "engine_ms": round(1000 * harness.median(ours.seconds[1:]), 1),
        "hf_ms": round(1000 * harness.median(theirs.seconds[1:]), 1),
        "ratio": round(ratio, 2),
        "engine_cpu_ms": round(1000 * harness.median(ours.cpu[1:]), 1),
        "hf_cpu_ms": round(1000 * harness.median(theirs.cpu[1:]), 1),
        "cpu_ratio": round(cpu_ratio, 2),
        "engine_tokens": round(statistics.mean(ours.tokens), 2),
        "hf_tokens": round(statistics.mean(theirs.tokens), 2),
        "tokens_apart": round(apart(ours.tokens, theirs.tokens), 2),
        "engine_accuracy": round(statistics.mean(ours.right), 4),
        "hf_accuracy": round(statistics.mean(theirs.right), 4),
        "accuracy_apart": round(apart(ours.right, theirs.right), 2),
        **harness.facts(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budgets", nargs="+", default=["15/3", "45/3", "200/3"], metavar="THINK/SOLVE")
    parser.add_argument("--rows", nargs="+", type=int, default=[64, 256], help=f"a multiple of {GROUP}")
    parser.add_argument("--rounds", type=int, default=15, help="pairs (default: 15)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="print only; append nothing to benchmarks/results")
    arguments = parser.parse_args(argv)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_path())
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32).eval()
    config = EngineConfig(dtype="float32", max_batch=64, max_model_len=LONGEST, kv_memory="64MiB")
    print(
        f"{'budget':>8} {'rows':>5} {'HF batch':>8} {'engine ms':>10} {'HF ms':>8} {'ratio':>6} {'CPU':>6} "
        f"{'tokens':>15} {'apart':>6} {'accuracy':>15} {'apart':>6}"
    )
    with Engine.from_model(model, tokenizer, config) as engine:
        for said in arguments.budgets:
            think, solve = map(int, said.split("/"))
            for rows in arguments.rows:
                for batch in sorted({min(64, rows), rows}):
                    row = bench(
                        engine,
                        model,
                        tokenizer,
                        Budget(think, solve),
                        rows=rows,
                        batch=batch,
                        rounds=arguments.rounds,
                        seed=arguments.seed,
                    )
                    print(
                        f"{said:>8} {rows:5} {batch:8} {row['engine_ms']:10} {row['hf_ms']:8} "
                        f"{row['ratio']:6} {row['cpu_ratio']:6} "
                        f"{row['engine_tokens']:7} {row['hf_tokens']:7} {row['tokens_apart']:6} "
                        f"{row['engine_accuracy']:7} {row['hf_accuracy']:7} {row['accuracy_apart']:6}",
                        flush=True,
                    )
                    if not arguments.dry:
                        harness.append(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
