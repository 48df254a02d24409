"""Log-probabilities of rollouts made again by the trainer: by the Hugging Face module and by the engine's own
kernels (`optim.forward`). How far they are from the rollouts', and what an update costs.

    python benchmarks/bench_on_policy.py --config recipes/toy.yaml --steps 16 [optim.dtype=bfloat16 ...]
    python benchmarks/bench_on_policy.py --shape small --dtype bfloat16 --samples 16 --new 256

With --config two runs of the recipe, one with each forward, take their steps in turn; seconds are a step's
`update_seconds`, and mismatches those of its metrics, over all steps. With --shape a module of random weights
decodes `--samples` prompts of 64 tokens, and seconds are of one pass over them, forwards and backwards,
without an optimizer. Ratios are medians of pairs. A row each goes to the results.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import harness
import shapes
import torch
from transformers import AutoTokenizer

from elastic_decode import Budget, Engine, EngineConfig, SamplingParams
from elastic_decode.assets import tiny_model_path
from elastic_decode.rl.assemble import assemble
from elastic_decode.rl.config import load_config
from elastic_decode.rl.engine_forward import EngineForward
from elastic_decode.rl.logprobs import TokenLogprobs, attends_in_rows, pack, plan, token_logprobs
from elastic_decode.rl.loss import mismatch

FORWARDS = ("hf", "engine")
PROMPT = 64


def recipe(config: str, steps: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Two runs of `config`, step by step in turn."""
    told: dict[str, list[dict[str, float]]] = {name: [] for name in FORWARDS}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as opened:

        def step(name: str) -> Callable[[], float]:
            own = (
                f"run.folder={folder}/{name}",
                f"optim.forward={name}",
                "run.progress=false",
                "run.save_every=0",
            )
            parts = opened.enter_context(assemble(load_config(config, [*overrides, *own])))

            def run() -> float:
                metrics, _ = parts.trainer.train_step()
                told[name].append(metrics)
                return metrics["update_seconds"]

            return run

        runs = {name: step(name) for name in FORWARDS}
        theirs, ours = harness.paired(runs["hf"], runs["engine"], steps)
    dtype = load_config(config, overrides).optim.dtype
    worst = {
        name: {key: max(m.get(key, 0.0) for m in metrics) for key in _KEYS} for name, metrics in told.items()
    }
    return {"what": f"{config}, {steps} steps", "dtype": dtype} | _row(worst, theirs, ours)


def shape(
    name: str, dtype: torch.dtype, samples: int, new: int, rounds: int, max_tokens: int
) -> dict[str, Any]:
    """One pass over the rollouts of random weights."""
    model = harness.random_qwen2(name, dtype)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    length = PROMPT + new + 8
    generator = torch.Generator().manual_seed(0)
    vocabulary = shapes.SHAPES[name]["vocab_size"]
    prompts = torch.randint(vocabulary, (samples, PROMPT), generator=generator).tolist()
    with Engine.from_model(
        model, tokenizer, EngineConfig(max_batch=samples, max_model_len=length, kv_memory="1GiB")
    ) as engine:
        generations = engine.generate(
            prompts,
            budget=Budget(think=new // 2, solve=new // 2),
            sampling=SamplingParams(seed=0, ignore_eos=True),
        )
        forward = EngineForward(engine).token_logprobs
    pairs = [(g.prompt_token_ids, g.completions[0].token_ids) for g in generations]
    rollout = torch.tensor([x for g in generations for x in g.completions[0].logprobs])
    lengths = [len(prompt) + len(output) for prompt, output in pairs]
    found: dict[str, torch.Tensor] = {}

    def once(name: str, logprobs: TokenLogprobs) -> Callable[[], float]:
        in_rows = logprobs is token_logprobs and attends_in_rows(model)
        micro = plan(lengths, max_tokens, rows=in_rows)

        def run() -> float:
            model.zero_grad()
            values = {}
            start = time.perf_counter()
            for chosen in micro:
                packed = pack(pairs, chosen, [1.0] * samples, rows=in_rows)
                mine, _ = logprobs(model, packed)
                mine.sum().backward()
                outputs = mine.detach().split([len(pairs[i][1]) for i in chosen])
                values |= dict(zip(chosen, outputs, strict=True))
            taken = time.perf_counter() - start
            found[name] = torch.cat([values[i] for i in range(samples)])
            return taken

        return run

    theirs, ours = harness.paired(once("hf", token_logprobs), once("engine", forward), rounds)
    everything = torch.ones(len(rollout), dtype=torch.bool)
    worst = {key: mismatch(values, rollout, everything) for key, values in found.items()}
    what = f"{name}, {samples} x ({PROMPT} + {new}) tokens"
    return {"what": what, "dtype": str(dtype).removeprefix("torch.")} | _row(worst, theirs, ours)


_KEYS = ("mismatch_p95", "mismatch_max", "mismatch_outside", "mismatch_kl")


def _row(worst: dict[str, dict[str, float]], theirs: list[float], ours: list[float]) -> dict[str, Any]:
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return {
        "benchmark": "on_policy",
        "mismatch": worst,
        "seconds": {"hf": harness.median(theirs), "engine": harness.median(ours)},
        "ratio": harness.median(ratios),
        **harness.facts(),
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--shape", choices=sorted(shapes.SHAPES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(arguments)
    if (given.config is None) == (given.shape is None):
        parser.error("give one of --config and --shape")
    if given.config:
        row = recipe(given.config, given.steps, given.overrides)
    else:
        dtype = getattr(torch, given.dtype)
        row = shape(given.shape, dtype, given.samples, given.new, given.rounds, given.max_tokens)
    harness.append(row)
    print(f"{row['what']}, {row['dtype']}")
    for name in FORWARDS:
        told = ", ".join(f"{key.removeprefix('mismatch_')} {row['mismatch'][name][key]:.2g}" for key in _KEYS)
        print(f"{name:8}{told}, {row['seconds'][name]:.3f} s")
    print(f"engine / hf: {row['ratio']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
