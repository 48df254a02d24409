"""Records into figures: accuracy with its error a cell, tokens, shares, pass@k; CSV and a table.

A cell is (policy, think budget). Samples of one problem are not independent, so the standard error is that of
the problems' means: stdev over problems / sqrt(problems).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.table import Table

from elastic_decode.eval.records import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class CellSummary:
    """accuracy: mean score of problems, each the mean of its graded samples. error: its standard error,
    clustered by problem; nan with one problem. tokens_error likewise. natural, forced: shares of completions
    whose thinking ended by itself, or was closed; truncated: that ran into the end of their last budget.
    pass_at: k -> pass@k. ungraded: completions without a score; they are in no accuracy.
    """

    policy: str
    think: int | None
    solve: int | None
    problems: int
    completions: int
    ungraded: int
    accuracy: float
    error: float
    think_tokens: float
    solve_tokens: float
    forced_tokens: float
    tokens: float
    tokens_error: float
    natural: float
    forced: float
    truncated: float
    pass_at: dict[int, float]


def summarize(records: Iterable[Record], *, pass_at: Sequence[int] = ()) -> list[CellSummary]:
    """A summary a cell, in the order in which cells come, budgets ascending with unlimited last."""
    cells: dict[tuple[str, int | None], list[Record]] = {}
    for record in records:
        cells.setdefault((record.policy, record.think), []).append(record)
    policies = list(dict.fromkeys(policy for policy, _ in cells))
    order = sorted(
        cells, key=lambda cell: (policies.index(cell[0]), math.inf if cell[1] is None else cell[1])
    )
    return [_cell(cells[key], pass_at) for key in order]


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of k is right, without bias from n samples of which c are: 1 - C(n-c, k) / C(n, k)
    (Chen et al. 2021, arXiv 2107.03374). Raises ValueError where k > n.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs {k} samples or more, there are {samples}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def standard_error(means: Sequence[float]) -> float:
    return stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan


def _cell(records: Sequence[Record], pass_at: Sequence[int]) -> CellSummary:
    problems: dict[int, list[Record]] = {}
    for record in records:
        problems.setdefault(record.problem, []).append(record)
    scores = {
        problem: [record.score for record in group if record.score is not None]
        for problem, group in problems.items()
    }
    means = [fmean(found) for found in scores.values() if found]
    tokens = [fmean(r.think_tokens + r.solve_tokens for r in group) for group in problems.values()]
    count = len(records)
    first = records[0]
    passing = {}
    for k in pass_at:
        graded = [found for found in scores.values() if len(found) >= k]
        if len(graded) == len(scores):
            passing[k] = fmean(pass_at_k(len(found), sum(s >= 1 for s in found), k) for found in graded)
    return CellSummary(
        policy=first.policy,
        think=first.think,
        solve=first.solve,
        problems=len(problems),
        completions=count,
        ungraded=sum(record.score is None for record in records),
        accuracy=fmean(means) if means else math.nan,
        error=standard_error(means),
        think_tokens=fmean(record.think_tokens for record in records),
        solve_tokens=fmean(record.solve_tokens for record in records),
        forced_tokens=fmean(record.forced_tokens for record in records),
        tokens=fmean(tokens),
        tokens_error=standard_error(tokens),
        natural=sum(record.think_end == "natural" for record in records) / count,
        forced=sum(record.think_end == "forced" for record in records) / count,
        truncated=sum(record.finish_reason in ("budget", "length") for record in records) / count,
        pass_at=passing,
    )


def write_csv(cells: Sequence[CellSummary], path: Path) -> None:
    """A row a cell; unlimited budgets are empty, pass@k columns last."""
    ks = sorted({k for cell in cells for k in cell.pass_at})
    with path.open("w", encoding="utf-8", newline="") as file:
        names = [name for name in CellSummary.__dataclass_fields__ if name != "pass_at"]
        writer = csv.writer(file)
        writer.writerow([*names, *(f"pass_at_{k}" for k in ks)])
        for cell in cells:
            values: dict[str, Any] = asdict(cell)
            writer.writerow([*(values[name] for name in names), *(cell.pass_at.get(k, "") for k in ks)])


def as_table(cells: Sequence[CellSummary], title: str = "") -> Table:
    """For a terminal."""
    ks = sorted({k for cell in cells for k in cell.pass_at})
    table = Table(title=title or None, title_justify="left")
    table.add_column("policy")
    heads = ("think", "solve", "accuracy", "± s.e.", "think tokens", "solve tokens", "tokens", "natural")
    for name in (*heads, "forced", "truncated", *(f"pass@{k}" for k in ks), "n"):
        table.add_column(name, justify="right")
    for cell in cells:
        table.add_row(
            cell.policy,
            "none" if cell.think is None else f"{cell.think:,}",
            "none" if cell.solve is None else f"{cell.solve:,}",
            f"{100 * cell.accuracy:.1f}",
            f"{100 * cell.error:.1f}",
            f"{cell.think_tokens:,.1f}",
            f"{cell.solve_tokens:,.1f}",
            f"{cell.tokens:,.1f}",
            f"{cell.natural:.0%}",
            f"{cell.forced:.0%}",
            f"{cell.truncated:.0%}",
            *(f"{100 * cell.pass_at[k]:.1f}" if k in cell.pass_at else "" for k in ks),
            f"{cell.completions:,}" + (f" ({cell.ungraded} ungraded)" if cell.ungraded else ""),
        )
    return table
