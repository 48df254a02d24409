"""Steps of GRPO on recipes/toy.yaml by this trainer and by TRL's, taking turns in one run: rewards and time.

    make bench-grpo                          # makes .venv-trl, an environment with TRL, and runs this in it
    make bench-grpo ARGS="--arms ours trl_budgets --seeds 0 --steps 20"
    make bench-grpo ARGS=--check             # one step's samples into both trainers: are the gradients equal?

Every arm is a process that keeps its state and waits for its turn, a few steps each, so that what else the
machine does meets all of them. Same base, prompts in the same order, group size, objective, optimizer and
precision; the arms are in peers/grpo.py, and what could not be made equal in docs/rl-measured.md. A row an
arm and seed: rewards as means over ten steps; medians of milliseconds of wall and of processor without the
first steps; and the median over turns of the arm's wall time divided by that of `ours`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from peers import grpo

from elastic_decode.rl.config import GRPOConfig, load_config

TOY = Path(__file__).parents[1] / "recipes" / "toy.yaml"
EVERY = 10  # steps a mean of rewards is over
SKIPPED = 5  # steps at the beginning that are not timed


def load(name: str, seed: int, steps: int, folder: str, overrides: Sequence[str]) -> GRPOConfig:
    """The toy recipe as an arm runs it."""
    run = [f"run.seed={seed}", f"run.steps={steps}", f"run.folder={folder}"]
    return load_config(TOY, [*grpo.ARMS[name].overrides, *overrides, *run])


def run_one(arguments: argparse.Namespace) -> int:
    """This process: one arm. A line on standard input lets it go on so many steps, each is a line out."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no figure
    torch.set_num_threads(arguments.threads)
    left = 0

    def wait() -> None:
        nonlocal left
        if left == 0:
            asked = sys.stdin.readline()
            if not asked:
                sys.exit(0)
            left = int(asked)

    def tell(step: grpo.Step) -> None:
        nonlocal left
        out.write(json.dumps(dataclasses.asdict(step)) + "\n")
        left -= 1
        wait()

    name = arguments.one
    wait()
    with tempfile.TemporaryDirectory() as folder:
        # One step more than is asked for: the last one asked for is told before anything ends.
        config = load(name, arguments.seeds[0], arguments.steps + 1, folder, arguments.set)
        grpo.arm(name).train(config, tell, way=grpo.ARMS[name].way)
    return 0


def check(arguments: argparse.Namespace) -> int:
    from peers import grpo_gradient

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        config = load("ours", arguments.seeds[0], 1, folder, arguments.set)
        found = grpo_gradient.compare(config, folder)
    print(
        f"norms of the gradients: ours {found.norms[0]:.6f}, TRL's {found.norms[1]:.6f}; relative difference "
        f"{found.apart:.1e}, {found.turned:.1e} of it in direction"
    )
    return 0


class Process:
    """A process that makes steps when it is told to."""

    def __init__(self, name: str, seed: int, options: Sequence[str], threads: int) -> None:
        self.name, self.seed = name, seed
        self.steps: list[grpo.Step] = []
        command = [sys.executable, str(Path(__file__)), *options, "--one", name, "--seeds", str(seed)]
        path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "OMP_NUM_THREADS": str(threads),
            "TRL_EXPERIMENTAL_SILENCE": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def go(self, count: int) -> float:
        """So many steps; the seconds they took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        for _ in range(count):
            line = self._process.stdout.readline()
            if not line:
                raise SystemExit(f"{self.name}, seed {self.seed}, ended early: see above")
            self.steps.append(grpo.Step(**json.loads(line)))
        return sum(step.seconds for step in self.steps[-count:])

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()


def turns(names: Sequence[str], seed: int, options: Sequence[str], arguments: Any) -> list[dict[str, Any]]:
    """All arms of a seed, taking turns, changing who begins; a row each."""
    arms = [Process(name, seed, options, arguments.threads) for name in names]
    took: dict[str, list[float]] = {name: [] for name in names}
    try:
        done = 0
        while done < arguments.steps:
            count = min(SKIPPED, arguments.steps - done)
            for arm in arms:
                took[arm.name].append(arm.go(count))
            arms.append(arms.pop(0))
            done += count
    finally:
        for arm in arms:
            arm.end()
    found = {arm.name: arm.steps for arm in arms}
    return [row(name, seed, found[name], took, arguments) for name in names]


def row(
    name: str, seed: int, steps: list[grpo.Step], took: dict[str, list[float]], arguments: Any
) -> dict[str, Any]:
    timed = steps[SKIPPED:] or steps
    medians = {
        f"{part}_ms": round(1000 * statistics.median(getattr(step, part) for step in timed), 1)
        for part in ("seconds", "rollout", "rewards", "update", "cpu", "rollout_cpu")
    }
    ours = took.get("ours")
    pairs = list(zip(took[name], ours, strict=True))[1:] if ours and len(ours) > 1 else []
    return {
        "bench": "grpo",
        "arm": name,
        "seed": seed,
        "steps": len(steps),
        "rewards": [
            round(statistics.mean(step.reward for step in steps[at : at + EVERY]), 4)
            for at in range(0, len(steps), EVERY)
        ],
        "tokens": [
            round(statistics.mean(step.tokens for step in steps[at : at + EVERY]), 2)
            for at in range(0, len(steps), EVERY)
        ],
        "closed": round(statistics.mean(step.closed for step in steps[-EVERY:]), 4),
        "forced": round(statistics.mean(step.forced for step in steps[-EVERY:]), 4),
        **medians,
        "times_ours": round(statistics.median(a / b for a, b in pairs), 2) if pairs else None,
        "settings": arguments.set,
        **grpo.arm(name).versions(),
        **(harness.facts() | {"threads": arguments.threads}),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """A table in Markdown: means over seeds."""
    count = min(len(each["rewards"]) for each in rows)
    heads = [str(EVERY * (place + 1)) for place in range(count)]
    heads += ["tokens", "ms a step", "rollout", "update", "times ours", "CPU ms", "rollout"]
    print(f"| arm | {' | '.join(heads)} |")
    print("|---" * (len(heads) + 1) + "|")
    for name in dict.fromkeys(each["arm"] for each in rows):
        own = [each for each in rows if each["arm"] == name]
        rewards = [statistics.mean(each["rewards"][place] for each in own) for place in range(count)]
        cells = [f"{value:.3f}" for value in rewards]
        cells.append(f"{statistics.mean(each['tokens'][-1] for each in own):.1f}")
        cells += [
            f"{statistics.mean(each[key] for each in own):.{places}f}" if own[0][key] is not None else "-"
            for key, places in (
                ("seconds_ms", 0),
                ("rollout_ms", 0),
                ("update_ms", 0),
                ("times_ours", 2),
                ("cpu_ms", 0),
                ("rollout_cpu_ms", 0),
            )
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", choices=grpo.ARMS, default=list(grpo.PEERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of the configuration")
    parser.add_argument("--dry", action="store_true", help="print only; append nothing")
    parser.add_argument("--one", choices=grpo.ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help="compare gradients; nothing is timed")
    arguments = parser.parse_args(argv)
    if arguments.check:
        return check(arguments)
    if arguments.one:
        return run_one(arguments)
    names = []
    for name in arguments.arms:
        reason = grpo.arm(name).why_unavailable()
        print(f"{name}: not here: {reason}" if reason else f"{name}: runs", flush=True)
        names += [] if reason else [name]
    options = ["--steps", str(arguments.steps), "--threads", str(arguments.threads), "--set", *arguments.set]
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        for each in turns(names, seed, options, arguments):
            rows.append(each)
            if not arguments.dry:
                harness.append(each)
        print(f"seed {seed} is done", flush=True)
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
