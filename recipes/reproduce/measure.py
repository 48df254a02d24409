"""A checkpoint's accuracy and tokens over policies and budgets, a record a cell.

A cell is (policy, think budget). Every cell decodes the same problems with the same seeds, so that
checkpoints, policies and budgets are compared a problem at a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from elastic_decode import Engine, EngineConfig, SamplingParams, budgets
from elastic_decode.assets import tiny_model_path
from elastic_decode.rl import yaml_files
from elastic_decode.rl.seeds import derive
from elastic_decode.tasks import countdown

PROTOCOL = Path(__file__).with_name("protocol.yaml")
ENGINE = EngineConfig(
    device="cpu", dtype="float32", max_batch=64, max_model_len=256, kv_memory="64MiB", horizon=1
)
Cell = tuple[str, int | None]


def load_protocol(path: Path = PROTOCOL) -> dict[str, Any]:
    return yaml_files.load(path)


def cells(protocol: Mapping[str, Any], policies: Sequence[str]) -> list[Cell]:
    """Every policy at every budget; without budgets there is but one policy."""
    thinks = protocol["evaluate"]["think"]
    return [(policy, t) for policy in policies for t in thinks if t is not None or policy == "elastic"]


def policies_of(protocol: Mapping[str, Any], arm: str) -> list[str]:
    """All for the base and the main arm; an L1 model also with nothing but its wish."""
    if arm in ("base", next(iter(protocol["arms"]))):
        return list(protocol["evaluate"]["policies"])
    return ["elastic", "wish"] if "wish" in protocol["arms"][arm] else ["elastic"]


def finished(protocol: Mapping[str, Any], arm: str, records: Iterable[Mapping[str, Any]]) -> bool:
    """Whether these are all the cells of a run of `arm`."""
    return set(cells(protocol, policies_of(protocol, arm))) <= {(r["policy"], r["think"]) for r in records}


def policy_of(name: str, think: int | None, protocol: Mapping[str, Any]) -> budgets.Policy:
    """A policy whose sampled tokens are at most think + solve in all."""
    solve = protocol["evaluate"]["solve"]
    if think is None or name == "wish":
        return budgets.elastic()
    if name == "elastic":
        return budgets.elastic(think, solve)
    if name == "truncate":
        return budgets.truncate(think + solve)
    if name == "s1":
        return budgets.budget_forcing(think, solve, **protocol["evaluate"]["s1"])
    raise ValueError(f"no policy {name!r}")


def prompt_of(problem: countdown.Problem, wish: int | None) -> list[dict[str, str]]:
    """The task's chat, with L1's wish as one more word."""
    suffix = "" if wish is None else f" {wish}"
    return [{"role": "user", "content": problem.prompt + suffix}]


def measure(
    engine: Engine, cell: Cell, protocol: Mapping[str, Any], wish: Sequence[int] | None
) -> dict[str, Any]:
    """One cell. wish: the wishes an L1 model was trained on; it is asked for think + solve tokens."""
    name, think = cell
    wanted = protocol["evaluate"]
    problems = countdown.problems(wanted["split"])
    asked = None
    if wish is not None:
        asked = wish[1] if think is None else min(max(think + wanted["solve"], wish[0]), wish[1])
    seeds = [derive("reproduce", wanted["seed"], index) for index in range(len(problems))]
    generations = engine.generate(
        [prompt_of(problem, asked) for problem in problems],
        n=wanted["samples"],
        budget=policy_of(name, think, protocol),
        sampling=[SamplingParams(temperature=1.0, seed=seed) for seed in seeds],
    )
    found = [generation.completions for generation in generations]
    every = [completion for group in found for completion in group]
    return {
        "policy": name,
        "think": think,
        "wish": asked,
        "samples": wanted["samples"],
        # A problem each, summed over its samples.
        "right": [
            sum(countdown.grade(problem, completion.solution) for completion in group)
            for problem, group in zip(problems, found, strict=True)
        ],
        "think_tokens": [sum(completion.think_tokens for completion in group) for group in found],
        "solve_tokens": [sum(completion.solve_tokens for completion in group) for group in found],
        "forced": sum(completion.think_end == "forced" for completion in every) / len(every),
        "cut": sum(completion.finish_reason != "eos" for completion in every) / len(every),
    }


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file; a last line that a kill has cut off is left out."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
        if line.endswith("\n"):
            yield json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", help='a folder, or "tiny"')
    parser.add_argument(
        "--out", type=Path, required=True, help="records are appended; cells there are skipped"
    )
    parser.add_argument("--policies", required=True, help="elastic,truncate,s1 or, of an L1 model, wish")
    parser.add_argument("--wish", type=int, nargs=2, metavar=("LOW", "HIGH"))
    parser.add_argument("--protocol", type=Path, default=PROTOCOL)
    args = parser.parse_args()
    torch.set_num_threads(1)
    protocol = load_protocol(args.protocol)
    done = list(read(args.out))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(record) + "\n" for record in done), encoding="utf-8")
    seen = {(record["policy"], record["think"]) for record in done}
    path = tiny_model_path() if args.checkpoint == "tiny" else args.checkpoint
    with Engine.from_pretrained(path, ENGINE) as engine, args.out.open("a", encoding="utf-8") as file:
        for cell in cells(protocol, args.policies.split(",")):
            if cell not in seen:
                file.write(json.dumps(measure(engine, cell, protocol, args.wish)) + "\n")
                file.flush()


if __name__ == "__main__":
    main()
