"""What an evaluation comes to: accuracy under each budget with its standard error, as numbers and a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from elastic_decode.rl.options import EvaluationBudget

PREFIX = "eval/"  # of every metric's name


class Outcome(NamedTuple):
    """What is kept of a sample."""

    score: float | None
    think_tokens: int
    solve_tokens: int
    forced: bool
    natural: bool
    cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetScore:
    """What came of one budget. scores: [row][sample], None where unscorable.

    accuracy: the mean of the scores. standard_error: of the accuracy, samples of one row taken together (see
    `clustered`). think_tokens, solve_tokens: sampled ones, means. forced, natural: shares of thoughts that
    ended so. cut: share of samples that ended by a budget. unscorable: share without a score.
    """

    budget: EvaluationBudget
    scores: tuple[tuple[float | None, ...], ...]
    accuracy: float
    standard_error: float
    think_tokens: float
    solve_tokens: float
    forced: float
    natural: float
    cut: float
    unscorable: float

    @property
    def said(self) -> str:
        """The accuracy, and what it costs where nothing bounds it."""
        unlimited = self.budget.think is None and self.budget.truncate is None
        return f"{self.accuracy:.3f}" + (f" ({self.think_tokens:.1f} tokens)" if unlimited else "")


_FIGURES = tuple(name for name in BudgetScore.__dataclass_fields__ if name not in ("budget", "scores"))


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """step: updates before it. rows: dataset rows, in the order of each budget's scores. skipped: rows that
    leave no room for some budget, evaluated under none.
    """

    step: int
    budgets: tuple[BudgetScore, ...]
    rows: tuple[int, ...]
    skipped: int
    seconds: float

    def metrics(self) -> dict[str, float]:
        """As flat numbers: `eval/t15_s3/accuracy` …"""
        named = {
            f"{PREFIX}{score.budget.label}/{name}": float(getattr(score, name))
            for score in self.budgets
            for name in _FIGURES
        }
        return {
            **named,
            f"{PREFIX}problems": len(self.rows),
            f"{PREFIX}skipped": self.skipped,
            f"{PREFIX}seconds": self.seconds,
        }

    def __str__(self) -> str:
        """One line for a terminal; a solution budget that all have is said once."""
        labels = [score.budget.label for score in self.budgets]
        common = labels[0][labels[0].rfind("_") :] if "_" in labels[0] else ""
        shared = bool(common) and len(labels) > 1 and all(label.endswith(common) for label in labels)
        short = [label.removesuffix(common) if shared else label for label in labels]
        said = [f"{label} {score.said}" for label, score in zip(short, self.budgets, strict=True)]
        errors = [e for score in self.budgets if math.isfinite(e := score.standard_error)]
        spread = f", ±{max(errors):.3f}" if errors else ""
        return (
            f"evaluation after {self.step} step{'s' * (self.step != 1)}"
            f"{f', {common[1:]}' if shared else ''}  {'  '.join(said)}  "
            f"({len(self.rows)} prompts{spread}, {self.seconds:.1f} s)"
        )


def clustered(scores: Sequence[Sequence[float | None]]) -> tuple[float, float]:
    """The mean of all scores, and its standard error where the scores of one row depend on each other.

    scores: [row][sample]; None is left out. The cluster-robust error of a mean over N samples of G rows,
    √(G/(G-1) Σ_g (Σ_i (x_gi - x̄))²) / N (arXiv 2411.00640, with the small-sample factor); with equally many
    samples a row it is that of the mean of the rows' means. NaN where there are too few.
    """
    known = [[score for score in row if score is not None] for row in scores]
    known = [row for row in known if row]
    count, rows = sum(map(len, known)), len(known)
    if not count:
        return math.nan, math.nan
    mean = math.fsum(score for row in known for score in row) / count
    if rows < 2:
        return mean, math.nan
    squares = math.fsum(math.fsum(score - mean for score in row) ** 2 for row in known)
    return mean, math.sqrt(squares * rows / (rows - 1)) / count


def score_of(budget: EvaluationBudget, rows: Sequence[Sequence[Outcome]]) -> BudgetScore:
    """What samples under one budget come to; rows: [row][sample]."""
    scores = tuple(tuple(outcome.score for outcome in row) for row in rows)
    accuracy, error = clustered(scores)
    outcomes = [outcome for row in rows for outcome in row]

    def mean(name: str) -> float:
        return math.fsum(getattr(outcome, name) for outcome in outcomes) / len(outcomes)

    return BudgetScore(
        budget=budget,
        scores=scores,
        accuracy=accuracy,
        standard_error=error,
        think_tokens=mean("think_tokens"),
        solve_tokens=mean("solve_tokens"),
        forced=mean("forced"),
        natural=mean("natural"),
        cut=mean("cut"),
        unscorable=sum(outcome.score is None for outcome in outcomes) / len(outcomes),
    )
