"""`elastic-decode demo`: the bundled model under several think budgets, streamed, then accuracy against
budget.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from elastic_decode.assets import tiny_model_path
from elastic_decode.cli import options, screen
from elastic_decode.core import Budget, SamplingParams
from elastic_decode.tasks import countdown

SHOWN = (0, 5, 15, None)
BUDGETS: tuple[int | None, ...] = (0, 5, 10, 15, 20, 30, 45, None)
SOLVE = 8


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="the bundled model under several budgets, and what each budget is worth",
        description="Stream a few problems of the bundled model under several think budgets, then measure "
        "accuracy, tokens and speed for each budget.",
    )
    parser.add_argument(
        "--problems", type=int, default=200, help="problems a budget in the table (default: 200)"
    )
    parser.add_argument("--shown", type=int, default=2, help="problems to stream (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="which problems and which noise (default: 0)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1)")
    options.add_engine(parser, dtype="float32", max_batch=64, max_model_len=256, kv_memory="256MiB")
    parser.set_defaults(run=run)


@dataclass(frozen=True, slots=True)
class Row:
    """What one budget was worth."""

    budget: int | None
    accuracy: float
    think: float
    solve: float
    forced: float
    rate: float


def measure(
    engine: Any, problems: list[countdown.Problem], budget: int | None, sampling: SamplingParams, tick: Any
) -> Row:
    """Decode every problem once under `budget` and grade the solutions."""
    right = 0.0
    think = solve = forced = tokens = 0
    started = time.perf_counter()
    rollout = engine.rollout(
        [problem.chat for problem in problems], budget=Budget(think=budget, solve=SOLVE), sampling=sampling
    )
    for generation in rollout:
        (completion,) = generation.completions
        right += countdown.grade(problems[generation.index], completion.solution)
        think += completion.think_tokens
        solve += completion.solve_tokens
        forced += completion.think_end == "forced"
        tokens += len(completion.token_ids)
        tick()
    seconds, count = time.perf_counter() - started, len(problems)
    return Row(budget, right / count, think / count, solve / count, forced / count, tokens / seconds)


def _name(budget: int | None) -> str:
    return "unlimited" if budget is None else str(budget)


def run(arguments: argparse.Namespace) -> int:
    from elastic_decode.llm import Engine  # imports torch: not for --help

    console = Console(highlight=False)
    sampling = SamplingParams(temperature=arguments.temperature, seed=arguments.seed)
    problems = countdown.sample("test", max(arguments.problems, arguments.shown), arguments.seed)
    with Engine.from_pretrained(tiny_model_path(), options.engine_of(arguments)) as engine:
        console.print("Find two operators that make (x ? y) ? z the target.  ", end="")
        screen.legend(console)
        for problem in problems[: arguments.shown]:
            console.rule(f"[bold]{problem.prompt}", align="left")
            for budget in SHOWN:
                console.print(f"[cyan]think <= {_name(budget):>9}[/cyan]  ", end="")
                said = []
                for event in engine.stream(
                    [problem.chat], budget=Budget(think=budget, solve=SOLVE), sampling=sampling
                ):
                    screen.show(console, event)
                    said.append(event)
                solution = "".join(e.text for e in said if e.phase == "solve")
                right = countdown.grade(problem, solution) == 1.0
                console.print("  [green]right[/green]" if right else "  [red]wrong[/red]")
        rows = []
        problems = problems[: arguments.problems]
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("measuring", total=len(BUDGETS) * len(problems))
            for budget in BUDGETS:
                bar.update(task, description=f"think <= {_name(budget)}")
                rows.append(measure(engine, problems, budget, sampling, lambda: bar.advance(task)))
    table = Table(
        title=f"{len(problems)} held-out problems, solve <= {SOLVE}; think and solve: mean tokens",
        title_justify="left",
    )
    for column in ("budget", "accuracy", "think", "solve", "forced", "tokens/s"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            _name(row.budget),
            f"{row.accuracy:.1%}",
            f"{row.think:.1f}",
            f"{row.solve:.1f}",
            f"{row.forced:.0%}",
            f"{row.rate:,.0f}",
        )
    console.print(table)
    return 0
