"""Ten thousand answers graded in one pool: how fast, and whether processes, descriptors or memory grow.

    .venv/bin/python benchmarks/bench_grader.py [--answers 10000] [--workers 2]

Answers are drawn with a seed: numbers in many spellings, expressions that take algebra (no two the same),
text that is no mathematics, sizes that are refused, and a few that hang until their process is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections import Counter
from pathlib import Path

from elastic_decode.tasks.math_grader import Grader, compare, gold_texts

BATCH = 200


def question(rng: random.Random, hangs: float) -> tuple[str, str, float | None]:
    """(gold, answer, the grade it must get); about half of them right."""
    a, b, c = rng.randint(2, 999), rng.randint(2, 99), rng.randint(2, 99)
    d = a + (rng.random() < 0.5)
    right = float(d == a)
    draw = rng.random()
    if draw < hangs:
        return "5", rf"\binom{{10^{{9}}}}{{{500000 + a}}}", None
    if draw < 0.5:
        forms = rf"{d}", rf"{d}.0", rf"x = {d}", rf"{d}\text{{ cm}}", rf"\frac{{{d * b}}}{{{b}}}"
        return str(a), rng.choice(forms), right
    if draw < 0.6:
        return rf"({a}, {b}]", rf"\left({d}, {b}\right]", right
    if draw < 0.7:
        return rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{d * d * b}}}", right
    if draw < 0.8:
        return rf"\frac{{{a}\pi}}{{{b}}} + {c}", rf"{c} + \frac{{{d * c}\pi}}{{{b * c}}}", right
    if draw < 0.9:
        return rf"(x+{a})(x-{b})", rf"x^2 + {d - b}x - {d * b}", right
    if draw < 0.95:
        junk = r"no solution \text{exists", "}{" * 9, r"\frac{1}{0}", rf"{a} and {b}", "?"
        return str(a), rng.choice(junk), 0.0
    huge = "9" * 100_000, "10^{10^{10}}", "9!!!!!!", "(" * 200 + "1", "2^{99999999}"
    return str(a), rng.choice(huge), 0.0


def processes(root: int) -> list[int]:
    """A process and all that come from it."""
    found = [root]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def footprint() -> dict[str, float]:
    """What this process and its children hold: MiB are proportional, a shared page counted once."""
    there = processes(os.getpid())
    kib = sum(
        int(line.split()[1])
        for pid in there
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        if line.startswith("Pss:")
    )
    descriptors = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in there)
    return {"processes": len(there), "descriptors": descriptors, "MiB": round(kib / 1024)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=2.0)
    parser.add_argument("--hangs", type=float, default=0.001, help="share of answers that hang")
    options = parser.parse_args()
    rng = random.Random(0)
    asked = [question(rng, options.hangs) for _ in range(options.answers)]
    start = time.perf_counter()
    by_writing = sum(compare(gold_texts(gold), answer) is not None for gold, answer, _ in asked)
    writing = time.perf_counter() - start
    grades: Counter[str] = Counter()
    wrong: list[list[object]] = []
    with Grader(workers=options.workers, limit=options.limit) as grader:
        start = time.perf_counter()
        for place in range(0, len(asked), BATCH):
            golds, answers, expected = zip(*asked[place : place + BATCH], strict=True)
            got = grader.grade(answers, golds)
            grades.update(map(str, got))
            wrong += [
                pair for *pair, grade in zip(golds, answers, got, expected, strict=True) if pair[2] != grade
            ]
            done = min(place + BATCH, len(asked))
            if done % max(BATCH, len(asked) // 5) == 0:
                print(
                    json.dumps(
                        {"graded": done, "seconds": round(time.perf_counter() - start, 1), **footprint()}
                    )
                )
        row = {
            "answers": len(asked),
            "seconds": round(time.perf_counter() - start, 1),
            "decided_by_writing": by_writing,
            "microseconds_by_writing": round(1e6 * writing / len(asked)),
            "grades": dict(grades),
            "wrong": wrong,
            "failures": dict(grader.failures),
        }
    print(json.dumps({**row, "after_close": footprint()}))


if __name__ == "__main__":
    main()
