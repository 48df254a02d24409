"""What was measured as figures with error bars: results.json, table.md and, by plot.py, the plots.

An interval is 95 % and has two parts, added in squares: problems (the standard error over problems of the
mean over seeds; sampling is in it) with the normal quantile, and training seeds (the standard error over
seeds) with Student's quantile for seeds - 1 degrees of freedom. With one seed there is no second part; the
table says how many seeds there were.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from measure import finished, read

Record = dict[str, Any]
# Student's t, two-sided 95 %, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
NORMAL = 1.960


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """mean ± half: a 95 % interval. by_seed: the mean of each."""

    mean: float
    half: float
    by_seed: tuple[float, ...]

    @property
    def low(self) -> float:
        return self.mean - self.half


def estimate(values: Sequence[Sequence[float]]) -> Estimate:
    """values: a row a seed, a number a problem; problems in the same order in every row."""
    by_seed = tuple(fmean(row) for row in values)
    by_problem = [fmean(column) for column in zip(*values, strict=True)]
    problems = stdev(by_problem) / math.sqrt(len(by_problem))
    half = NORMAL * problems
    if len(values) > 1:
        seeds = stdev(by_seed) / math.sqrt(len(by_seed))
        half = math.hypot(half, STUDENT.get(len(values) - 1, NORMAL) * seeds)
    return Estimate(mean=fmean(by_seed), half=half, by_seed=by_seed)


def seeds_of(protocol: Mapping[str, Any], arm: str) -> list[int]:
    """The training seeds of an arm: its own, or those of all."""
    return list(protocol["arms"][arm].get("seeds", protocol["seeds"]))


class Measured:
    """All cells of the runs that are finished: per problem accuracy and tokens."""

    def __init__(self, protocol: Mapping[str, Any], out: Path) -> None:
        self.found: dict[str, dict[int | None, dict[tuple[str, int | None], Record]]] = {}
        trained = [(arm, seed) for arm in protocol["arms"] for seed in seeds_of(protocol, arm)]
        for arm, seed in [("base", None), *trained]:
            folder = out / "arms" / ("base" if seed is None else f"{arm}-{seed}")
            cells = {(r["policy"], r["think"]): r for r in read(folder / "cells.jsonl")}
            if finished(protocol, arm, cells.values()):
                self.found.setdefault(arm, {})[seed] = cells

    def has(self, arm: str, policy: str, think: int | None) -> bool:
        return any((policy, think) in cells for cells in self.found.get(arm, {}).values())

    def rows(
        self, arm: str, policy: str, think: int | None, value: Callable[[Record], list[float]]
    ) -> list[list[float]]:
        """A row a seed that has the cell."""
        return [value(cells[policy, think]) for cells in self.found[arm].values() if (policy, think) in cells]

    def accuracy(self, arm: str, policy: str, think: int | None) -> list[list[float]]:
        return self.rows(arm, policy, think, accuracy)

    def tokens(self, arm: str, policy: str, think: int | None) -> list[list[float]]:
        return self.rows(arm, policy, think, tokens)


def accuracy(record: Record) -> list[float]:
    return [right / record["samples"] for right in record["right"]]


def tokens(record: Record) -> list[float]:
    """Sampled tokens of both phases."""
    pairs = zip(record["think_tokens"], record["solve_tokens"], strict=True)
    return [(think + solve) / record["samples"] for think, solve in pairs]


def minus(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> list[list[float]]:
    """A problem at a time; b has one row (the base) or as many as a."""
    paired = list(b) * len(a) if len(b) == 1 else b
    return [[x - y for x, y in zip(p, q, strict=True)] for p, q in zip(a, paired, strict=True)]


def mean_over(parts: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Several budgets' rows into their mean."""
    return [[fmean(cell) for cell in zip(*rows, strict=True)] for rows in zip(*parts, strict=True)]


def fall(trained: Sequence[Sequence[float]], base: Sequence[float]) -> Estimate:
    """1 - mean(trained) / mean(base), its error to first order in both means."""
    whole = fmean(base)
    rows = []
    for row in trained:
        ratio = fmean(row) / whole
        rows.append(
            [
                1 - ratio - ((x - fmean(row)) - ratio * (b - whole)) / whole
                for x, b in zip(row, base, strict=True)
            ]
        )
    return estimate(rows)


def claims(protocol: Mapping[str, Any], measured: Measured) -> list[dict[str, Any]]:
    """The protocol's claims about the main arm: estimate, what it must pass, and whether it does."""
    main = next(iter(protocol["arms"]))
    wanted = protocol["claims"]
    found: list[dict[str, Any]] = []

    def claim(text: str, value: Estimate, above: float) -> None:
        found.append(
            {
                "claim": text,
                **asdict(value),
                "low": value.low,
                "must_be_above": above,
                "holds": value.low > above,
            }
        )

    thinks = wanted["unseen_budgets"]["think"]
    gains = [
        minus(measured.accuracy(main, "elastic", t), measured.accuracy("base", "elastic", t)) for t in thinks
    ]
    claim(f"accuracy gain, mean over unseen think budgets {_listed(thinks)}", estimate(mean_over(gains)), 0.0)
    free = wanted["unconstrained_tokens"]
    (base,) = measured.tokens("base", "elastic", None)
    less = fall(measured.tokens(main, "elastic", None), base)
    claim("fall of mean tokens without budgets", less, free["fall"])
    change = minus(measured.accuracy(main, "elastic", None), measured.accuracy("base", "elastic", None))
    claim("accuracy change without budgets", estimate(change), -free["margin"])
    thinks = wanted["policies"]["think"]
    for rival in ("truncate", "s1"):
        rows = [
            minus(measured.accuracy(main, "elastic", t), measured.accuracy(main, rival, t)) for t in thinks
        ]
        claim(
            f"elastic minus {rival} at equal totals, mean over think budgets {_listed(thinks)}",
            estimate(mean_over(rows)),
            0.0,
        )
    return found


def summary(protocol: Mapping[str, Any], measured: Measured) -> list[dict[str, Any]]:
    """A row an (arm, policy, budget): accuracy, tokens, gain over the base, shares."""
    rows = []
    for arm, by_seed in measured.found.items():
        cells = dict.fromkeys(cell for cells in by_seed.values() for cell in cells)
        for policy, think in cells:
            records = [c[policy, think] for c in by_seed.values() if (policy, think) in c]
            right = measured.accuracy(arm, policy, think)
            row = {
                "arm": arm,
                "policy": policy,
                "think": think,
                "seeds": len(right),
                "problems": len(right[0]),
                "samples": records[0]["samples"],
                "accuracy": asdict(estimate(right)),
                "tokens": asdict(estimate(measured.tokens(arm, policy, think))),
                "forced": fmean(record["forced"] for record in records),
                "cut": fmean(record["cut"] for record in records),
            }
            if arm != "base" and measured.has("base", policy, think):
                row["gain"] = asdict(estimate(minus(right, measured.accuracy("base", policy, think))))
            rows.append(row)
    return rows


def table(protocol: Mapping[str, Any], measured: Measured, found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: accuracy a think budget for every arm under elastic budgets, then the claims."""
    thinks = protocol["evaluate"]["think"]
    head = ["arm", "seeds", *("no budget" if t is None else f"t = {t}" for t in thinks), "tokens, no budget"]
    lines = ["Accuracy under elastic budgets, %:", "", _line(head), _line(["---"] * len(head))]
    for arm, by_seed in measured.found.items():
        cells = [arm, "–" if arm == "base" else str(len(by_seed))]
        for think in thinks:
            there = measured.has(arm, "elastic", think)
            cells.append(_percent(estimate(measured.accuracy(arm, "elastic", think))) if there else "")
        free = measured.has(arm, "elastic", None)
        count = estimate(measured.tokens(arm, "elastic", None)) if free else None
        cells.append("" if count is None else f"{count.mean:.1f} ± {count.half:.1f}")
        lines.append(_line(cells))
    for policy in ("truncate", "s1", "wish"):
        for arm in measured.found:
            if any(measured.has(arm, policy, t) for t in thinks):
                cells = [f"{arm}, {policy}", "–" if arm == "base" else str(len(measured.found[arm]))]
                for think in thinks:
                    there = measured.has(arm, policy, think)
                    cells.append(_percent(estimate(measured.accuracy(arm, policy, think))) if there else "")
                lines.append(_line([*cells, ""]))
    lines += ["", _line(["claim", "found", "must be above", "holds"]), _line(["---"] * 4)]
    for row in found:
        value = f"{100 * row['mean']:.1f} ± {100 * row['half']:.1f}"
        verdict = "yes" if row["holds"] else "no"
        lines.append(_line([row["claim"], value, f"{100 * row['must_be_above']:.0f}", verdict]))
    return "\n".join(lines) + "\n"


def write(protocol: Mapping[str, Any], out: Path) -> None:
    """results.json, table.md and the plots of what is there by now."""
    import plot

    measured = Measured(protocol, out)
    main = next(iter(protocol["arms"]))
    found = claims(protocol, measured) if main in measured.found and "base" in measured.found else []
    rows = summary(protocol, measured)
    (out / "results.json").write_text(
        json.dumps({"claims": found, "cells": rows}, indent=1) + "\n", encoding="utf-8"
    )
    (out / "table.md").write_text(table(protocol, measured, found), encoding="utf-8")
    plot.draw(protocol, measured, out)


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _percent(value: Estimate) -> str:
    return f"{100 * value.mean:.1f} ± {100 * value.half:.1f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
